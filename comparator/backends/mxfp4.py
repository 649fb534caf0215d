"""MXFP4 checkpoints, as gpt-oss is published: the experts' weights are 4-bit floats (E2M1) in blocks of 32 with a power of two
as scale (`*_blocks` and `*_scales`), everything else is bf16."""

from __future__ import annotations

from comparator.backends.base import Method
from comparator.backends.unpacked import Unpacked
from comparator.core.errors import UserError
from comparator.sources import Checkpoint, TensorInfo

_BYTES = 16  # of a block: 32 values
_EXPERTS = ("gate_up_proj", "down_proj")  # what transformers unpacks
_AGAIN = "It is damaged or cut off: download the checkpoint again."


class MXFP4(Unpacked):
    name = "mxfp4"
    requires = ("torch", "transformers")
    reads = ("mxfp4",)
    config_class = "Mxfp4Config"
    quantizes_experts = True
    methods = (
        Method("mxfp4", "MXFP4 checkpoint", "4-bit floats in blocks of 32 for the experts, as gpt-oss is published: "
               "mxfp4@user/repo. Unpacked as it loads, so memory and speed are those of bf16.", takes_source=True,
               needs_source=True, precision=25, bits=4, decode=("similar", "similar")),
    )  # fmt: skip

    def stored_as(self, checkpoint: Checkpoint) -> str:
        return "MXFP4"

    def layer_name(self, checkpoint: Checkpoint) -> str:
        return "transformers experts"

    def check_source(self, checkpoint: Checkpoint) -> None:
        source, stored = checkpoint.source, {t.name: t for t in checkpoint.tensors}
        blocks = [t for t in checkpoint.tensors if t.name.endswith("_blocks")]
        if not blocks:
            raise UserError(f"{source} says mxfp4, but contains no blocks of 4-bit floats.", _AGAIN)
        for tensor in blocks:
            _check(source, tensor, stored.get(tensor.name.removesuffix("blocks") + "scales"))
        if alone := [
            n for n in stored if n.endswith("_scales") and f"{n.removesuffix('scales')}blocks" not in stored
        ]:
            raise UserError(f"{alone[0]} of {source} has no matching blocks.", _AGAIN)


def _check(source: str, blocks: TensorInfo, scales: TensorInfo | None) -> None:
    """blocks: (experts, outputs, inputs ÷ 32, 16 bytes); scales: the same without the bytes."""
    if blocks.name.removesuffix("_blocks").rpartition(".")[2] not in _EXPERTS:
        raise UserError(
            f"{blocks.name} of {source} is in MXFP4, and transformers unpacks {' and '.join(_EXPERTS)} of experts only.",
            "Use a checkpoint of gpt-oss, or ct@ for what llm-compressor saved in MXFP4.",
        )
    if scales is None:
        raise UserError(f"{blocks.name} of {source} has no matching scales.", _AGAIN)
    if (
        (blocks.dtype, scales.dtype) != ("uint8", "uint8")
        or len(blocks.shape) != 4
        or blocks.shape[-1] != _BYTES
    ):
        raise UserError(
            f"{blocks.name} of {source} is {blocks.dtype} {blocks.shape} with {scales.dtype} scales; blocks of 32 are uint8 "
            f"(experts, outputs, blocks, {_BYTES}).",
            _AGAIN,
        )
    if scales.shape != blocks.shape[:-1]:
        raise UserError(
            f"{scales.name} of {source} has the shape {scales.shape}; its blocks make it {blocks.shape[:-1]}.",
            _AGAIN,
        )
