"""Columns executed by transformers and torch in this process."""

from comparator.runtimes.transformers.resident import TransformersModel
from comparator.runtimes.transformers.runtime import Transformers

__all__ = ["Transformers", "TransformersModel"]
