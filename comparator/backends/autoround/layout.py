"""AutoRound's config → the layout in which its weights are packed: GPTQ's or AWQ's. Configs and headers.

transformers hands such checkpoints to the auto-round package. The packed integers are those of GPTQ or AWQ, so with that
method's config, and the group of each input written out where it is missing, they load without it.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from typing import Any

from comparator.backends.gptq.checks import stored_format
from comparator.backends.gptqmodel_layers.checks import packed_modules
from comparator.core.errors import UserError
from comparator.sources import Checkpoint, TensorInfo

_OTHER = "Use a checkpoint with integer weights of 2, 3, 4 or 8 bits, and activations in 16 bits."


@dataclass(frozen=True)
class Layout:
    """checkpoint: as transformers will see it, with `quantization` of the method `method`. groups: (name, inputs, group
    size) of every g_idx that has to be added."""

    checkpoint: Checkpoint
    method: str
    groups: tuple[tuple[str, int, int], ...] = ()

    def added(self) -> dict[str, Any]:
        import torch

        return {name: (torch.arange(inputs) // size).int() for name, inputs, size in self.groups}


def read(checkpoint: Checkpoint) -> Layout:
    """Raises `UserError` for a checkpoint that takes the auto-round package."""
    config = checkpoint.quantization or {}
    packing = str(config.get("packing_format") or config.get("backend") or "auto_round").lower()
    kind, act_bits = str(config.get("data_type") or "int").lower(), config.get("act_bits", 16)
    bits, group = config.get("bits"), config.get("group_size", 128)
    if not kind.startswith("int") or (isinstance(act_bits, int) and act_bits < 16) or not _known(packing):
        raise UserError(
            f"{checkpoint.source} was made by AutoRound with data_type={kind}, act_bits={act_bits}, packing_format={packing}, "
            "which requires the auto-round package.",
            _OTHER,
        )
    if bits not in (2, 3, 4, 8) or not isinstance(group, int) or isinstance(group, bool) or group == 0:
        raise UserError(f"{checkpoint.source} says bits={bits!r}, group_size={group!r}.", _OTHER)
    packed = packed_modules(
        checkpoint, "AutoRound", ("qzeros", "scales"), "It is damaged, or of another format: use another one."
    )
    sym = bool(config.get("sym", True))
    if "awq" in packing:
        quantization = {
            "quant_method": "awq", "bits": bits, "group_size": group, "zero_point": not sym, "version": "gemm",
            "modules_to_not_convert": _plain(config) or None,
        }  # fmt: skip
        return Layout(replace(checkpoint, quantization=quantization), "awq")
    named = "gptq" if "gptq" in packing else "gptq_v2"
    quantization = {
        "quant_method": "gptq", "bits": bits, "group_size": group, "desc_act": False, "sym": sym,
        # AutoRound's releases do not agree on which zero points a name means; symmetric ones can be told apart.
        "checkpoint_format": (stored_format(checkpoint, bits) if sym else None) or named,
        "modules_in_block_to_quantize": [[n] for n in dict.fromkeys(re.sub(r"^.*?\.\d+\.", "", n) for n in packed)],
    }  # fmt: skip
    groups = _missing_groups(checkpoint, packed, bits, group)
    tensors = tuple(TensorInfo(name, "int32", (inputs,), inputs, 4 * inputs) for name, inputs, _ in groups)
    seen = replace(checkpoint, quantization=quantization, tensors=(*checkpoint.tensors, *tensors))
    return Layout(seen, "gptq", groups)


def _known(packing: str) -> bool:
    return packing.startswith(
        ("auto_round", "auto-round", "autoround", "auto_gptq", "auto_awq")
    ) and not re.search(r"fp\d|gguf|compress|act", packing)


def _plain(config: dict[str, Any]) -> list[str]:
    """Modules that AutoRound left in 16 bits."""
    extra = config.get("extra_config")
    own = extra if isinstance(extra, dict) else {}
    return sorted(name for name, v in own.items() if isinstance(v, dict) and v.get("bits", 0) > 8)


def _missing_groups(
    checkpoint: Checkpoint, packed: list[str], bits: int, group: int
) -> tuple[tuple[str, int, int], ...]:
    shapes = {t.name: t.shape for t in checkpoint.tensors}
    found = []
    for name in packed:
        if f"{name}.g_idx" not in shapes:
            inputs = shapes[f"{name}.qweight"][0] * 32 // bits
            found.append((f"{name}.g_idx", inputs, group if group > 0 else inputs))
    return tuple(found)
