"""The next token from llama.cpp's logits, by the same rules as every other column."""

from __future__ import annotations

from typing import Any

from comparator.backends.transformers_loader import set_generation_config
from comparator.core.request import GenerationSettings
from comparator.decoding.introspect import end_of_sequence
from comparator.decoding.sampling import Chooser
from comparator.sources import Checkpoint


class Rules:
    """transformers' logits processors and stop tokens of a checkpoint, from its model without weights."""

    def __init__(self, checkpoint: Checkpoint):
        import torch
        import transformers

        config = transformers.AutoConfig.from_pretrained(
            checkpoint.path, local_files_only=True, trust_remote_code=False
        )
        with torch.device("meta"):
            self.model = transformers.AutoModelForCausalLM.from_config(config, trust_remote_code=False)
        set_generation_config(self.model, checkpoint.path)
        self.ends = frozenset(end_of_sequence(self.model))

    def chooser(self, settings: GenerationSettings, prompt_length: int) -> Any:
        return Chooser(self.model, settings, prompt_length, "cpu")
