"""Checkpoints that bitsandbytes quantized and transformers saved: their options, what they hold, what is wrong with them.

Reads configs, headers and the small records beside the weights; loads no weights.
"""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from comparator.backends.base import DTYPES
from comparator.backends.options import ONLY
from comparator.core.errors import UserError
from comparator.sources import Checkpoint, TensorInfo, packed, weights

HEADS = ("lm_head", "embed_out", "output_projection")  # as causal language models call it
FOUR_BIT = ("nf4", "fp4")
RECORD = ".weight.quant_state.bitsandbytes__"  # JSON beside a 4-bit weight: shape, block size, type
_MOST_RECORD_BYTES = 4096
_MOST_NAMES = 4  # of a skip list in the notation; a longer one stays in the checkpoint
_NAME = re.compile(r"[\w-]+(?:\.[\w-]+)*", re.ASCII)
_BLOCKS = (32, 64, 128, 256, 512, 1024, 2048, 4096)
_SHORT = {"float32": "fp32", "float16": "fp16", "bfloat16": "bf16"}
_AGAIN = "Download the whole checkpoint again, or save the model again with save_pretrained."


def method_of(quantization: dict[str, Any]) -> str | None:
    """The method whose weights a checkpoint holds, by its quantization_config; None where it does not say."""
    if quantization.get("load_in_8bit"):
        return None if quantization.get("load_in_4bit") else "int8"
    kind = quantization.get("bnb_4bit_quant_type", "fp4")  # as transformers reads it
    return kind if quantization.get("load_in_4bit") and kind in FOUR_BIT else None


def options(checkpoint: Checkpoint, skip: str | None = None) -> dict[str, str | None]:
    """What the checkpoint decides, as option → text. `skip`: as it is asked for.

    What is stored is read from the tensors, where config.json could contradict them. Raises `UserError` for what the
    options cannot say, and for another `skip`.
    """
    config, method = checkpoint.quantization or {}, method_of(checkpoint.quantization or {})
    if skip is None:
        names = _skip(checkpoint)
        skip = "+".join(names) if 0 < len(names) <= _MOST_NAMES else None
    else:
        _check_skip(checkpoint, skip)
    found: dict[str, str | None] = {"dtype": _plain_dtype(checkpoint), "skip": skip}
    if method == "int8":
        threshold = config.get("llm_int8_threshold", 6.0)
        if not 0 <= threshold < math.inf:
            raise _unknown(checkpoint, "llm_int8_threshold", threshold, "a number from 0 up")
        return {**found, "threshold": f"{threshold:g}"}
    compute = str(config.get("bnb_4bit_compute_dtype") or "float32")
    if compute not in _SHORT:
        raise _unknown(checkpoint, "bnb_4bit_compute_dtype", compute, ", ".join(_SHORT))
    names = {t.name for t in checkpoint.tensors}
    nested = any(name.endswith(".weight.nested_absmax") for name in names)
    storage = next(
        t.dtype for t in checkpoint.tensors if f"{t.name.removesuffix('.weight')}{RECORD}{method}" in names
    )
    if storage not in ("uint8", *DTYPES):
        raise _unknown(checkpoint, "bnb_4bit_quant_storage", storage, ", ".join(("uint8", *_SHORT)))
    return {**found, "compute": _SHORT[compute], "dq": str(nested).lower(), "storage": storage}


def check(checkpoint: Checkpoint) -> None:
    """Raises `UserError` naming the first layer that is damaged, or that transformers would read as something else."""
    method, quantized = method_of(checkpoint.quantization or {}), quantized_modules(checkpoint)
    tensors = {t.name: t for t in checkpoint.tensors}
    _check_config(checkpoint)
    _check_experts(checkpoint, quantized)
    (_check_int8 if method == "int8" else _check_four_bit)(checkpoint, tensors, str(method))
    if not quantized:
        raise UserError(f"{checkpoint.source} contains no {method} weights.", _AGAIN)
    _check_skip_list(checkpoint, quantized)


def set_compute(folder: Path, dtype: str) -> None:
    """Have a checkpoint's 4-bit layers multiply in another dtype, by torch's name of it."""
    file = folder / "config.json"
    config = json.loads(file.read_text(encoding="utf-8"))
    config["quantization_config"]["bnb_4bit_compute_dtype"] = dtype
    file.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


# ------------------------------------------------------------ the tensors


def quantized_modules(checkpoint: Checkpoint) -> list[str]:
    """Names of the quantized modules: those with scales beside a weight."""
    names = {t.name for t in checkpoint.tensors}
    stems = {
        re.sub(r"\.(?:SCB|weight\.absmax)$", "", n) for n in names if n.endswith((".SCB", ".weight.absmax"))
    }
    return sorted(s for s in stems if f"{s}.weight" in names)


def _plain_dtype(checkpoint: Checkpoint) -> str | None:
    """The dtype of most of what is not quantized; None for one that `dtype=` does not have."""
    quantized = set(quantized_modules(checkpoint))
    counts: Counter[str] = Counter()
    for tensor in checkpoint.tensors:
        if tensor.name.removesuffix(".weight") not in quantized and not packed.is_state(
            tensor.name, checkpoint.quantization
        ):
            counts[tensor.dtype] += tensor.bytes
    return next((name for name, _ in counts.most_common() if name in DTYPES), None)


def _plain_layers(checkpoint: Checkpoint) -> list[str]:
    """Modules with a weight matrix that is not quantized, other than embeddings."""
    quantized = set(quantized_modules(checkpoint))
    modules = [
        t.name.removesuffix(".weight")
        for t in checkpoint.tensors
        if t.name.endswith(".weight") and len(t.shape) == 2
    ]
    return [
        m
        for m in modules
        if m not in quantized
        and (_is_head(m) or "embed" not in m.rpartition(".")[2])
        and not m.endswith(("wte", "wpe"))
    ]


def _check_config(checkpoint: Checkpoint) -> None:
    """Whether transformers can make its own config of what config.json says."""
    from transformers import BitsAndBytesConfig

    try:
        BitsAndBytesConfig.from_dict(dict(checkpoint.quantization or {}))
    except (TypeError, ValueError, AttributeError) as error:
        raise UserError(
            f"transformers cannot read the quantization_config of {checkpoint.source}: {str(error)[:200]}.",
            "Correct it in its config.json, or download it again.",
        ) from None


def _check_four_bit(checkpoint: Checkpoint, tensors: dict[str, TensorInfo], method: str) -> None:
    records = {n.partition(RECORD)[0]: n for n in tensors if RECORD in n}
    stems = {
        re.sub(r"\.weight\.(?:absmax|quant_map)$", "", n)
        for n in tensors
        if re.search(r"\.weight\.(?:absmax|quant_map)$", n)
    }
    stems |= {
        n.removesuffix(".weight") for n, t in tensors.items() if n.endswith(".weight") and t.dtype == "uint8"
    }
    for module in sorted(stems | set(records)):
        parts = [f"{module}.weight", f"{module}.weight.absmax", f"{module}.weight.quant_map"]
        nested = [f"{module}.weight.nested_absmax", f"{module}.weight.nested_quant_map"]
        if any(name in tensors for name in nested):
            parts += nested
        _require(checkpoint, tensors, parts, module)
        if module not in records:
            raise _damaged(checkpoint, f"{module} has no record of its shape ({module}{RECORD}{method})")
        if not records[module].endswith(f"__{method}"):
            raise UserError(
                f"config.json of {checkpoint.source} says {method}, but {module} holds "
                f"{records[module].rpartition('__')[2]} weights.",
                "The files do not belong together: download the whole checkpoint again.",
            )
    for module, record in layer_records(checkpoint):
        _check_sizes(checkpoint, tensors, module, record)


def _check_sizes(
    checkpoint: Checkpoint, tensors: dict[str, TensorInfo], module: str, record: dict[str, Any]
) -> None:
    """Whether weight, scales and codebooks have the sizes and dtypes that go with the layer's record."""
    weight = f"{module}.weight"
    count, block = math.prod(record["shape"]), record["blocksize"]
    blocks, nested = -(-count // block), f"{weight}.nested_absmax" in tensors
    wanted = {
        weight: (-(-count // 2), tensors[weight].dtype),
        f"{weight}.absmax": (blocks, "uint8") if nested else (4 * blocks, "fp32"),
        f"{weight}.quant_map": (4 * 16, "fp32"),
    }
    if nested != ("nested_blocksize" in record):
        raise _damaged(checkpoint, f"{module} has half of what double quantization stores")
    if nested:
        wanted[f"{weight}.nested_absmax"] = (-(-blocks // record["nested_blocksize"]) * 4, "fp32")
        wanted[f"{weight}.nested_quant_map"] = (4 * 256, "fp32")
    for name, (size, dtype) in wanted.items():
        if (tensors[name].bytes, tensors[name].dtype) != (size, dtype):
            raise _damaged(
                checkpoint,
                f"{name} has {tensors[name].bytes:,} bytes ({tensors[name].dtype}), where a layer of "
                f"{tuple(record['shape'])} in blocks of {block} has {size:,} ({dtype})",
            )


def _check_int8(checkpoint: Checkpoint, tensors: dict[str, TensorInfo], method: str) -> None:
    stems = {n.removesuffix(".SCB") for n in tensors if n.endswith(".SCB")}
    stems |= {
        n.removesuffix(".weight") for n, t in tensors.items() if n.endswith(".weight") and t.dtype == "int8"
    }
    for module in sorted(stems):
        _require(checkpoint, tensors, [f"{module}.weight", f"{module}.SCB"], module)
        weight, scales = tensors[f"{module}.weight"], tensors[f"{module}.SCB"]
        if (weight.dtype, scales.dtype, scales.shape) != ("int8", "fp32", weight.shape[:1]):
            raise _damaged(
                checkpoint,
                f"{module} has {weight.dtype} weights of {weight.shape} and {scales.dtype} scales (SCB) of "
                f"{scales.shape}",
            )
    for stored in _stored(checkpoint, ".weight_format"):
        if any(layout := _read(stored)):
            raise UserError(
                f"{stored.info.name.removesuffix('.weight_format')} of {checkpoint.source} is laid out for one kind of "
                f"GPU (weight_format {layout[0]}), as by bitsandbytes before 0.45.",
                "Use a checkpoint in rows (weight_format 0), or int8 without a source to quantize the model itself.",
            )


def _require(checkpoint: Checkpoint, tensors: dict[str, TensorInfo], names: list[str], module: str) -> None:
    if lost := [n for n in names if n not in tensors]:
        kind = lost[0].removeprefix(f"{module}.")
        raise _damaged(checkpoint, f"{module} has no {kind}")


def _damaged(checkpoint: Checkpoint, what: str) -> UserError:
    return UserError(f"{checkpoint.source} is damaged: {what}.", _AGAIN)


def _unknown(checkpoint: Checkpoint, key: str, value: object, possible: str) -> UserError:
    return UserError(f"{checkpoint.source} says {key}={str(value)[:80]}.", f"It must be {possible}.")


def layer_records(checkpoint: Checkpoint) -> Iterator[tuple[str, dict[str, Any]]]:
    """(module, record) of every 4-bit weight. Raises `UserError` for one that is not what bitsandbytes writes."""
    for stored in _stored(checkpoint, RECORD):
        module = stored.info.name.partition(RECORD)[0]
        try:
            record = json.loads(_read(stored))
            sound = _is_sound(record, stored.info.name.rpartition("__")[2])
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            sound = False
        if not sound:
            raise _damaged(checkpoint, f"the record of {module}.weight cannot be read")
        yield module, record


def _is_sound(record: dict[str, Any], method: str) -> bool:
    """Whether a record has what bitsandbytes reads from it. It comes from a stranger, and names attributes of torch."""
    nested = "nested_blocksize" in record
    blocks = [record["blocksize"], *([record["nested_blocksize"]] if nested else [])]
    return (
        record["quant_type"] == method
        and len(record["shape"]) == 2
        and all(type(n) is int and 0 < n < 2**32 for n in record["shape"])
        and all(n in _BLOCKS for n in blocks)
        and record["dtype"] in _SHORT
        and (not nested or (record["nested_dtype"] in _SHORT and math.isfinite(record["nested_offset"])))
    )


def _stored(checkpoint: Checkpoint, part: str) -> list[weights.Stored]:
    """Those of the checkpoint's tensors whose name has `part` in it, with their place in the files."""
    names = {t.name for t in checkpoint.tensors if part in t.name}  # without a vision tower's
    return [s for s in weights.read_folder(checkpoint.path, checkpoint.source) if s.info.name in names]


def _read(stored: weights.Stored) -> bytes:
    with open(stored.file, "rb") as file:
        file.seek(stored.start)
        return file.read(min(stored.info.bytes, _MOST_RECORD_BYTES))


# ------------------------------------------------------------ which modules stay


def _listed(checkpoint: Checkpoint) -> list[str] | None:
    """llm_int8_skip_modules: names of modules, which transformers reads as regular expressions. None: its own default."""
    names = (checkpoint.quantization or {}).get("llm_int8_skip_modules")
    if names is None:
        return None
    wrong = (
        names
        if not isinstance(names, list)
        else next((n for n in names if not _NAME.fullmatch(str(n))), None)
    )
    if wrong is not None:
        raise UserError(
            f"llm_int8_skip_modules of {checkpoint.source} holds {str(wrong)[:80]!r}, which is not the name of a module.",
            "Write the names of the modules that are not quantized into that list in its config.json.",
        )
    return [str(name) for name in names]


def _matches(module: str, names: list[str]) -> bool:
    """As transformers leaves modules out: by the beginning of the full name up to a dot, or by its end."""
    return any(module == n or module.startswith(f"{n}.") or module.endswith(n) for n in names)


def _skip(checkpoint: Checkpoint) -> list[str]:
    """The list as the option `skip` says it: names that this model has, beside the head."""
    plain = _plain_layers(checkpoint)
    names = {n for n in _listed(checkpoint) or [] if any(_matches(m, [n]) for m in plain) and not _is_head(n)}
    return [*([ONLY] if any(map(_is_head, quantized_modules(checkpoint))) else []), *sorted(names)]


def _check_skip(checkpoint: Checkpoint, asked: str) -> None:
    """Raises `UserError` where other modules are to be left alone than the checkpoint left. The head may be named."""
    names, own = {n for n in asked.split("+") if not _is_head(n)}, set(_skip(checkpoint))
    if any(map(_is_head, asked.split("+"))):
        names.discard(ONLY)  # the head is named
    if names != own:
        made = f"skip={'+'.join(sorted(own))[:200]}" if own else "no skip="
        raise UserError(
            f"skip={asked} is requested, but {checkpoint.source} was made with {made}.",
            "Leave the option out: it comes from the checkpoint.",
        )


def skip_note(checkpoint: Checkpoint) -> list[str]:
    """A note on a skip list that is too long for the notation."""
    if len(_skip(checkpoint)) <= _MOST_NAMES:
        return []
    names = [name for name in _skip(checkpoint) if name != ONLY]
    return [
        f"{checkpoint.source} names {len(names)} modules that are not quantized: {names[0]}, {names[1]} …"
    ]


def _check_skip_list(checkpoint: Checkpoint, quantized: list[str]) -> None:
    """transformers decides by the list which layers are quantized: one that does not fit the tensors fills them with noise."""
    listed, plain, roles = _listed(checkpoint), _plain_layers(checkpoint), {_role(m) for m in quantized}
    names = list(HEADS) if listed is None else listed
    unlisted = [m for m in plain if (_role(m) in roles or _is_head(m)) and not _matches(m, names)]
    if listed is not None and checkpoint.tied and not any(map(_is_head, names)):
        unlisted.append(HEADS[0])  # it is the embedding, so not among the tensors
    listed_too = [m for m in quantized if _matches(m, names)]
    if wrong := unlisted[:1] or listed_too[:1]:
        how = "not quantized, and is not in" if unlisted else "quantized, and is in"
        raise UserError(
            f"{wrong[0]} of {checkpoint.source} is {how} the list of modules to skip (llm_int8_skip_modules): "
            "transformers would misread its weight.",
            "Correct the list in its config.json: the modules that are not quantized, by their full names.",
        )


def _is_head(name: str) -> bool:
    return name.rpartition(".")[2] in HEADS


def _role(name: str) -> str:
    """A module's name without the number of its layer."""
    return re.sub(r"\.\d+\.", ".*.", name)


def _check_experts(checkpoint: Checkpoint, quantized: list[str]) -> None:
    if experts := [m for m in quantized if re.search(r"\.experts\.\d+\.", m)]:
        raise UserError(
            f"{checkpoint.source} has quantized experts ({experts[0]} and {len(experts) - 1:,} more), saved by an older "
            "transformers. This one keeps the experts of a layer as one parameter, which bitsandbytes does not quantize.",
            f"Use {method_of(checkpoint.quantization or {})} without a source, which leaves the experts in 16 bits.",
        )
