"""One linear layer: a recipe and gptqmodel's solver → the packed layer."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from comparator.backends.gptqmodel_layers import shapes
from comparator.backends.gptqmodel_layers.on_the_spot import LoadedHere, Progress
from comparator.backends.gptqmodel_layers.walk import Linear
from comparator.backends.sizes import TensorSize
from comparator.core.errors import UserError
from comparator.sources import Checkpoint


@dataclass(frozen=True)
class Recipe(LoadedHere):
    """What decides the quantized weights, beside the model and the calibration text."""

    bits: int = 4
    group_size: int = 128  # -1: one group a row
    desc_act: bool = False
    sym: bool = True
    damp: float = 0.1
    method: ClassVar[str] = "gptq"

    def quantize(
        self,
        model: Any,
        samples: list[list[int]],
        target: Path,
        tokenizer: Any,
        progress: Progress,
        device: str,
    ):
        """See `quantize.quantize`."""
        from comparator.backends.gptq.quantize import quantize

        quantize(model, samples, self, target, tokenizer, progress, device)

    def sizes(self, checkpoint: Checkpoint) -> list[TensorSize]:
        return list(shapes.packed_sizes(checkpoint, self.bits, self.group_size, g_idx=True))

    def config(self, left_out: bool, kept: list[list[str]]) -> dict[str, Any]:
        """`quantization_config` as it stands in config.json."""
        import importlib.metadata as metadata

        versions = [f"{name}:{metadata.version(name)}" for name in ("gptqmodel", "optimum")]
        config: dict[str, Any] = {
            "quant_method": "gptq",
            "bits": self.bits,
            "group_size": self.group_size,
            "desc_act": self.desc_act,
            "sym": self.sym,
            "damp_percent": self.damp,
            "true_sequential": True,
            # The first format stores zero points less one, which has no room for an asymmetric zero.
            "checkpoint_format": "gptq" if self.sym else "gptq_v2",
            "meta": {"quantizer": [*versions, "quant-comparator"]},
        }
        if left_out:  # without this entry transformers takes every linear layer of a block for quantized
            config["modules_in_block_to_quantize"] = kept
        return config


def solver_for(layer: Linear, recipe: Recipe) -> Any:
    from gptqmodel.quantization import GPTQ, QuantizeConfig

    config = QuantizeConfig(
        bits=recipe.bits,
        group_size=recipe.group_size,
        desc_act=recipe.desc_act,
        sym=recipe.sym,
        damp_percent=recipe.damp,
        # Orders columns by activation within what the groups allow; costs nothing at run time. Rules out the other.
        act_group_aware=not recipe.desc_act and recipe.group_size > 0,
        offload_to_disk=False,
    )
    solver = GPTQ(layer.module, qcfg=config)
    solver.quantizer.configure(bits=recipe.bits, sym=recipe.sym, perchannel=True)
    return solver


def solve(layer: Linear, solver: Any, recipe: Recipe) -> Any:
    """Round the layer's weights, put the rounded ones in their place, and return them packed (on the CPU)."""
    import torch
    from gptqmodel.nn_modules.qlinear.torch import TorchLinear

    rounded, scales, zeros, group_of, *_ = solver.quantize()
    solver.free()
    if not bool(torch.isfinite(scales).all()):
        raise UserError(
            f"GPTQ found no finite scales for {layer.name}: the activations overflow.",
            "Use other calibration text, or a larger damp.",
        )
    module = layer.module
    module.weight.data = rounded.reshape(module.weight.shape).to(module.weight.dtype)
    packed = TorchLinear(
        bits=recipe.bits,
        group_size=recipe.group_size,
        sym=recipe.sym,
        desc_act=recipe.desc_act,
        in_features=layer.inputs,
        out_features=layer.outputs,
        bias=getattr(module, "bias", None) is not None,
        register_buffers=True,
    )
    carrier = torch.nn.Linear(layer.inputs, layer.outputs, bias=False)
    # Packed from the solver's own values: the rounded layer's 16 bits may have moved them.
    carrier.weight.data = rounded.float().cpu()
    if getattr(module, "bias", None) is not None:
        carrier.bias = torch.nn.Parameter(module.bias.data.float().cpu())
    packed.hf_pack(
        carrier,
        scales.float().cpu(),
        zeros.float().cpu(),
        group_of.to(torch.int32).cpu(),
        pack_impl="original",  # the others compile an extension first
    )
    _set_zero_format(packed, zeros, recipe)
    return packed


def _set_zero_format(packed: Any, zeros: Any, recipe: Recipe) -> None:
    """Leave zero points as the checkpoint's format wants them: as they are (gptq_v2), or less one (gptq).

    gptqmodel's packers do not agree on which of the two they write (7.6's "original" writes the second and says
    the first), so the packed words are asked.
    """
    from gptqmodel import QuantizeConfig
    from gptqmodel.utils.model import convert_gptq_v1_to_v2_format_module, convert_gptq_v2_to_v1_format_module

    stored = int(packed.qzeros[0, 0]) & (2**recipe.bits - 1)
    written = 2 if stored == int(zeros[0, 0]) else 1
    packed.qzero_format(format=written)
    wanted = 1 if recipe.sym else 2
    if written == 2 and wanted == 1:
        convert_gptq_v2_to_v1_format_module(packed, QuantizeConfig(bits=recipe.bits, offload_to_disk=False))
    elif written == 1 and wanted == 2:
        convert_gptq_v1_to_v2_format_module(packed, recipe.bits, packed.pack_dtype)
