"""Full precision: the checkpoint as it is, in fp32, fp16 or bf16. Quantizes nothing."""

from __future__ import annotations

from comparator.backends import dtypes, saving, sizes, transformers_loader
from comparator.backends.base import Backend, LoadedModel, Method, Placement, Progress, Training
from comparator.core.errors import UserError
from comparator.core.variant import Variant


class FullPrecision(Backend):
    name = "full"
    requires = ("torch", "transformers")
    loaded_by = ("transformers", "vLLM")
    methods = (
        Method(
            "fp32",
            "32-bit float",
            "Every weight in 4 bytes. The numerical reference.",
            precision=100,
            bits=32,
            decode=("slower", ""),
        ),
        Method(
            "bf16",
            "16-bit brain float",
            "2 bytes per weight, the range of fp32, 8 bits of precision.",
            precision=90,
        ),
        Method(
            "fp16", "16-bit float", "2 bytes per weight, 11 bits of precision, a narrow range.", precision=80
        ),
    )

    def tensor_sizes(self, variant, checkpoint, device=""):
        return [sizes.plain(t, sizes.FLOAT_BYTES[variant.method]) for t in sizes.held(checkpoint)]

    def compute_dtype(self, variant, checkpoint) -> str:
        return variant.method

    def load(self, checkpoint, variant: Variant, placement: Placement, progress: Progress) -> LoadedModel:
        if variant.method == "bf16" and not dtypes.supports_bf16(placement.device):
            raise UserError("This GPU has no bf16.", "Use fp16 instead.")
        model = transformers_loader.from_pretrained(checkpoint, placement, progress, dtype=variant.method)
        return LoadedModel(model, "torch Linear", transformers_loader.lent_notes(checkpoint))

    def save(
        self, checkpoint, variant: Variant, placement: Placement, target, progress: Progress, change=None
    ):
        """A checkpoint in its own dtype is copied."""
        if change is None and {t.dtype for t in checkpoint.tensors} == {variant.method}:
            saving.copy_checkpoint(checkpoint.path, target, progress)
        else:
            saving.write_loaded(self, checkpoint, variant, placement, target, progress, change)

    def training(self, variant: Variant, device: str) -> Training:
        return Training(
            dtype=variant.method, quantized=False, activation_width=4 if variant.method == "fp32" else 2
        )

    def code(self, variant, placement, *, layers=(), kernel=None):
        return [], [], [f"dtype={dtypes.torch_name(variant.method)}"]
