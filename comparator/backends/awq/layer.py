"""AWQ of layers with the same input: the scale of each input that rounds best, the clipping of each group, codes, and the
packed layer. All in float32, weights as (outputs, inputs).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from comparator.backends.gptqmodel_layers import shapes
from comparator.backends.gptqmodel_layers.on_the_spot import LoadedHere, Progress
from comparator.backends.gptqmodel_layers.walk import Linear
from comparator.backends.sizes import TensorSize
from comparator.core.errors import UserError
from comparator.sources import Checkpoint

_RATIOS = 20  # exponents of the activations' mean that are tried, 0 to 0.95
_SHRINKS = 10  # limits that are tried for a group, 100 % to 55 % of its largest weight


@dataclass(frozen=True)
class Recipe(LoadedHere):
    """What decides the quantized weights, beside the model and the calibration text."""

    bits: int = 4
    group_size: int = 128  # -1: one group a row
    sym: bool = False
    method: ClassVar[str] = "awq"

    def quantize(
        self,
        model: Any,
        samples: list[list[int]],
        target: Path,
        tokenizer: Any,
        progress: Progress,
        device: str = "cpu",
    ) -> None:
        from comparator.backends.awq.quantize import quantize

        quantize(model, samples, self, target, tokenizer, progress, device)

    def sizes(self, checkpoint: Checkpoint) -> list[TensorSize]:
        return list(shapes.packed_sizes(checkpoint, self.bits, self.group_size))

    def config(self, kept: list[str]) -> dict[str, Any]:
        """`quantization_config` as it stands in config.json. `kept`: names of linear layers that are not quantized."""
        import importlib.metadata as metadata

        versions = [f"gptqmodel:{metadata.version('gptqmodel')}", "quant-comparator"]
        return {
            "quant_method": "awq",
            "bits": self.bits,
            "group_size": self.group_size,
            "zero_point": not self.sym,
            "version": "gemm",
            "modules_to_not_convert": kept or None,
            "meta": {"quantizer": versions},
        }


@dataclass
class Activations:
    """What enters layers during calibration, each token's divided by the root of its size. mean: of the absolute values,
    (inputs,); rows: some of them, (n, inputs)."""

    mean: Any
    rows: Any


@dataclass
class Rounded:
    """codes (outputs, inputs) int32; scales and zeros (outputs, groups) float32, scales as fp16 has them."""

    codes: Any
    scales: Any
    zeros: Any

    @property
    def weight(self) -> Any:
        outputs, groups = self.scales.shape
        codes = self.codes.reshape(outputs, groups, -1)
        return ((codes - self.zeros[..., None]) * self.scales[..., None]).reshape(outputs, -1)


def rounded(weight: Any, recipe: Recipe) -> Rounded:
    """To the nearest of 2^bits levels between the smallest and the largest weight of a group."""
    import torch

    size = recipe.group_size if recipe.group_size > 0 else weight.shape[1]
    groups, top = weight.reshape(weight.shape[0], -1, size), 2**recipe.bits - 1
    if recipe.sym:
        scales = groups.abs().amax(-1) / (2 ** (recipe.bits - 1) - 1)
    else:
        low, high = groups.amin(-1).clamp(max=0), groups.amax(-1).clamp(min=0)
        scales = (high - low) / top
    scales = scales.clamp(min=1e-5).half().float()
    middle = torch.full_like(scales, 2.0 ** (recipe.bits - 1))
    zeros = middle if recipe.sym else (-low / scales).round().clamp(0, top)
    codes = ((groups / scales[..., None]).round() + zeros[..., None]).clamp(0, top)
    return Rounded(codes.reshape(weight.shape).int(), scales, zeros)


def best_scale(
    weights: list[Any], seen: Activations, recipe: Recipe, report: Callable[[], None]
) -> Any | None:
    """(inputs,) factors s for the columns of layers with the same input, such that rounding W·s and dividing by s moves
    their outputs least; None where plain rounding does."""
    import torch

    size = recipe.group_size if recipe.group_size > 0 else weights[0].shape[1]
    share = sum(_share_of_group(w, size).sum(0) for w in weights) / sum(w.shape[0] for w in weights)
    least, best = _error(weights, None, seen.rows, recipe), None
    for step in range(_RATIOS):
        report()
        ratio = step / _RATIOS
        scale = (seen.mean.pow(ratio) / (share.pow(1 - ratio) + 1e-4)).clamp(min=1e-4)
        scale = scale / (scale.max() * scale.min()).sqrt()
        if not bool(torch.isfinite(scale).all()):
            continue
        if (error := _error(weights, scale, seen.rows, recipe)) < least:
            least, best = error, scale
    return best


def _share_of_group(weight: Any, size: int) -> Any:
    """Each weight's size as a share of the largest of its group, (outputs, inputs)."""
    groups = weight.abs().reshape(weight.shape[0], -1, size)
    return (groups / groups.amax(-1, keepdim=True).clamp(min=1e-6)).reshape(weight.shape)


def _error(weights: list[Any], scale: Any | None, rows: Any, recipe: Recipe) -> float:
    total = 0.0
    for weight in weights:
        scaled = weight if scale is None else weight * scale
        restored = rounded(scaled, recipe).weight
        difference = (restored if scale is None else restored / scale) - weight
        total += float((rows @ difference.T).square().sum())
    return total


def clipped(weight: Any, rows: Any, recipe: Recipe, report: Callable[[], None]) -> Any:
    """The weight with each group limited to that share of its largest value which moves the group's part of the output
    least: fewer levels are spent on what is rare."""
    import torch

    outputs = weight.shape[0]
    size = recipe.group_size if recipe.group_size > 0 else weight.shape[1]
    inputs = rows.reshape(rows.shape[0], -1, size)
    products = torch.einsum("ngi,ngj->gij", inputs, inputs)
    groups = weight.reshape(outputs, -1, size)
    largest = groups.abs().amax(-1, keepdim=True)
    least = torch.full(groups.shape[:2], float("inf"), device=weight.device)
    best = largest.clone()
    for step in range(_SHRINKS):
        report()
        limit = largest * (1 - step / (2 * _SHRINKS))
        limited = torch.minimum(torch.maximum(groups, -limit), limit).reshape(weight.shape)
        difference = (rounded(limited, recipe).weight - weight).reshape(groups.shape)
        error = (torch.einsum("ogi,gij->ogj", difference, products) * difference).sum(-1)
        better = error < least
        least = torch.where(better, error, least)
        best = torch.where(better[..., None], limit, best)
    return torch.minimum(torch.maximum(groups, -best), best).reshape(weight.shape)


def packed(layer: Linear, values: Rounded, recipe: Recipe) -> Any:
    """The layer as gptqmodel stores it, on the CPU."""
    import torch
    from gptqmodel.nn_modules.qlinear.torch_awq import AwqTorchLinear
    from gptqmodel.quantization.awq.utils.packing_utils import pack_awq

    if not bool(torch.isfinite(values.scales).all()):
        raise UserError(
            f"AWQ found no finite scales for {layer.name}: its weights overflow fp16.",
            "Use nf4 or int8 for this model.",
        )
    bias = layer.module.bias
    made = AwqTorchLinear(
        bits=recipe.bits,
        group_size=recipe.group_size,
        sym=recipe.sym,
        desc_act=False,
        in_features=layer.inputs,
        out_features=layer.outputs,
        bias=bias is not None,
        register_buffers=True,
    )
    codes, zeros = values.codes.T.contiguous().cpu(), values.zeros.T.contiguous().int().cpu()
    made.qweight, made.qzeros = pack_awq(codes, zeros, recipe.bits)
    made.scales = values.scales.T.contiguous().half().cpu()
    if bias is not None:
        made.bias = bias.data.half().cpu()
    return made
