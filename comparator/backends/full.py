"""Full precision: the checkpoint as it is, in fp32, fp16 or bf16. Quantizes nothing."""

from __future__ import annotations

from comparator.backends import loading
from comparator.backends.base import Backend, LoadedModel, Method, Placement, Progress
from comparator.types import Problem, Variant


class FullPrecision(Backend):
    name = "full"
    requires = ("torch", "transformers")
    methods = (
        Method(
            "fp32",
            "32-bit float",
            "Every weight in 4 bytes. The numerical yardstick.",
            precision=100,
            bits=32,
        ),
        Method("bf16", "bfloat16", "2 bytes a weight, the range of fp32, 8 bits of precision.", precision=90),
        Method(
            "fp16", "16-bit float", "2 bytes a weight, 11 bits of precision, a narrow range.", precision=80
        ),
    )

    def needed_bytes(self, variant, checkpoint) -> int:
        return checkpoint.parameters * (4 if variant.method == "fp32" else 2)

    def load(self, checkpoint, variant: Variant, placement: Placement, progress: Progress) -> LoadedModel:
        if variant.method == "bf16" and not loading.supports_bf16(placement.device):
            raise Problem("This GPU has no bf16.", "Use fp16 instead.")
        model = loading.from_pretrained(checkpoint, placement, progress, dtype=variant.method)
        return LoadedModel(model, "torch Linear", loading.lent_notes(checkpoint))

    def code(self, variant, placement, *, tied=False, kernel=None):
        return [], [], [f"dtype={loading.torch_name(variant.method)}"]
