"""Ready-made checkpoints whose weights are unpacked as they load, because no packed kernel runs here.

Base of the backends that do so. The model is plain linear layers in a float dtype: same rounding as on disk, the memory of
full precision. The column's notes say both sizes.
"""

from __future__ import annotations

import warnings
from typing import Any, ClassVar

from comparator.backends import dtypes, sizes
from comparator.backends.base import DTYPES, LoadedModel, Placement, Progress, Training
from comparator.backends.ready_made import FromCheckpoint, left_over_note, tokenizer_note
from comparator.core.errors import UserError
from comparator.core.variant import Variant
from comparator.sources import Checkpoint
from comparator.util.formatting import megabytes


class Unpacked(FromCheckpoint):
    """Subclasses set `reads`, `config_class` and `methods`, and refuse in `check_source` what transformers would unpack
    wrongly."""

    loaded_by = ("transformers", "vLLM")
    config_class: ClassVar[str] = ""
    """transformers' quantization config for the format; it takes `dequantize`."""
    why: ClassVar[str] = (
        "transformers unpacks it while loading, because its packed kernels are code that it would have to download and run"
    )
    """Why it is unpacked, as a clause for the column's note."""

    def stored_as(self, checkpoint: Checkpoint) -> str:
        """How the weights lie on disk, in words ("FP8")."""
        raise NotImplementedError

    def more_notes(self, checkpoint: Checkpoint) -> list[str]:
        """What else the column's reader should hear: what else the format's kernels would round, say."""
        return []

    def layer_name(self, checkpoint: Checkpoint) -> str:
        """What multiplies the unpacked weights: library and class."""
        return "torch Linear"

    def tensor_sizes(self, variant: Variant, checkpoint: Checkpoint, device: str = ""):
        """Of the unpacked weights; the files are smaller."""
        opened = self.opened(variant)
        return sizes.unpacked(opened, _width(dtype_of(opened)))

    def compute_dtype(self, variant: Variant, checkpoint: Checkpoint) -> str:
        return dtype_of(self.opened(variant))

    def unpack(self, variant: Variant, placement: Placement, progress: Progress, dtype: str) -> Any:
        """The model with all weights in `dtype`."""
        import transformers

        quantization = getattr(transformers, self.config_class)(dequantize=True)
        with (
            warnings.catch_warnings()
        ):  # that the checkpoint has such a config too: this is what is asked for
            warnings.filterwarnings("ignore", "You passed `quantization_config`")
            return self.load_opened(
                variant, placement, progress, dtype=dtype, quantization_config=quantization
            )

    def load(self, checkpoint, variant: Variant, placement: Placement, progress: Progress) -> LoadedModel:
        opened = self.opened(variant)
        dtype = dtype_of(opened)
        if dtype == "bf16" and not dtypes.supports_bf16(placement.device):
            raise UserError(
                f"This GPU has no bf16, to which {opened.source} is unpacked.",
                "Use the full-precision model as fp16, or gptq.",
            )
        model = self.unpack(variant, placement, progress, dtype)
        held = {id(p): p.numel() * p.element_size() for p in model.parameters()}
        stored = self.stored_as(opened)
        notes = [
            f"{stored} on disk, {dtype} here: {megabytes(sum(t.bytes for t in opened.tensors))} in its files, "
            f"{megabytes(sum(held.values()))} once loaded. {self.why}; the weights are rounded as they are stored, and "
            f"use the memory of {dtype}.",
            *self.more_notes(opened),
        ]
        notes += tokenizer_note(opened, checkpoint) + left_over_note(opened)
        return LoadedModel(model, f"{self.layer_name(opened)}, unpacked from {stored}", notes)

    def training(self, variant: Variant, device: str) -> Training:
        """As on full precision, which the loaded model is."""
        dtype = dtype_of(self.opened(variant))
        return Training(dtype=dtype, quantized=False, activation_width=_width(dtype))

    def code(self, variant: Variant, placement: Placement, *, layers: Any = (), kernel: str | None = None):
        dtype = max(layers, key=lambda row: row.bytes).logical_dtype if layers else "bf16"
        return (
            [f"from transformers import {self.config_class}"],
            [f"quantization = {self.config_class}(dequantize=True)"],
            [f"dtype={dtypes.torch_name(dtype)}", "quantization_config=quantization"],
        )


def dtype_of(checkpoint: Checkpoint) -> str:
    """That of what is not quantized: transformers leaves those weights as they are stored, so all have to be in it."""
    return checkpoint.dtype if checkpoint.dtype in DTYPES else "bf16"


def _width(dtype: str) -> int:
    return 4 if dtype == "fp32" else 2
