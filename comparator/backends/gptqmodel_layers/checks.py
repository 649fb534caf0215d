"""What has to hold in every checkpoint of gptqmodel's layers (`*.qweight` with its zero points and scales), by headers."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable

from comparator.core.errors import UserError
from comparator.sources import Checkpoint


def packed_modules(checkpoint: Checkpoint, title: str, parts: Iterable[str], advice: str) -> list[str]:
    """Names of the modules with a packed weight. Raises `UserError` where there is none, or where one of `parts` is not
    beside each of them."""
    names = {t.name for t in checkpoint.tensors}
    packed = sorted(n.removesuffix(".qweight") for n in names if n.endswith(".qweight"))
    if not packed:
        raise UserError(
            f"{checkpoint.source} says that it is {title} but contains no packed weight (*.qweight).",
            "The files do not belong together: download the checkpoint again.",
        )
    for part in parts:
        if lost := [n for n in packed if f"{n}.{part}" not in names]:
            more = f" and {len(lost) - 1} more" if len(lost) > 1 else ""
            raise UserError(f"{checkpoint.source} has no {part} for {lost[0]}{more}.", advice)
    return packed


def refuse_head(checkpoint: Checkpoint, packed: Iterable[str]) -> None:
    """Raises `UserError` for a packed weight outside of the layers."""
    if outside := [n for n in packed if not re.search(r"\.\d+\.", n)]:
        raise UserError(
            f"{outside[0]} of {checkpoint.source} is quantized ({outside[0]}.qweight), and transformers reads packed "
            "weights in the layers only: it would fill this module with random numbers.",
            "Use a checkpoint that was quantized with lm_head=False, which is the usual way.",
        )


def plain_among_packed(
    checkpoint: Checkpoint, packed: Iterable[str], left_out: Callable[[str], bool] = lambda name: False
) -> str | None:
    """A module that is not packed, while the same module of other layers is; without those that are `left_out` on
    purpose. None where there is none."""
    roles = {role(n) for n in packed}
    plain = (t.name.removesuffix(".weight") for t in checkpoint.tensors if t.name.endswith(".weight"))
    return next((n for n in plain if role(n) in roles and not left_out(n)), None)


def refuse_fused_experts(checkpoint: Checkpoint, packed: Iterable[str]) -> None:
    """Raises `UserError` where experts are packed one by one, and transformers keeps those of a layer as one parameter."""
    experts = [n for n in packed if re.search(r"\.experts\.\d+\.", n)]
    if not experts:
        return
    import torch
    import transformers

    config = transformers.AutoConfig.from_pretrained(
        checkpoint.path, local_files_only=True, trust_remote_code=False
    )
    for part in (config, config.get_text_config()):
        vars(part).pop("quantization_config", None)
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config)
    if experts[0] not in {name for name, _ in model.named_modules()}:
        raise UserError(
            f"{checkpoint.source} has each expert packed separately ({experts[0]}.qweight), and transformers keeps the "
            "experts "
            f"of a {checkpoint.architecture} layer as one parameter, which it does not read packed.",
            "Compare the full-precision model, with methods that quantize it as it loads.",
        )


def role(name: str) -> str:
    """A module's name without the number of its layer."""
    return re.sub(r"\.\d+\.", ".*.", name)
