"""A variant → a checkpoint to take along: weights, tokenizer, generation config, and a model card of what was measured."""

from __future__ import annotations

from comparator.exporting.job import Exported, ExportRequest, export

__all__ = ["ExportRequest", "Exported", "export"]
