"""Is every weight there that the model needs? Asked of transformers itself, before anything is loaded.

The model is built without memory (on torch's meta device) and "loaded" from tensors that have only the names and shapes of
the headers. So renamed and merged weights, tied ones and those that may be missing are transformers' own rules, and 8B
shapes take a tenth of a second. On the engine's thread only: transformers sets the default dtype meanwhile.
"""

from __future__ import annotations

import contextlib
import math
import re
import threading
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Any

from comparator.core.errors import UserError
from comparator.sources import consistency, packed
from comparator.sources.checkpoint import Checkpoint
from comparator.util import formatting

_TABLES = 5 * 10**7  # elements that a small model may compute once
_AGAIN = "Download or copy the whole checkpoint again, or save the model again with save_pretrained."


@dataclass(frozen=True)
class Examination:
    """`problem` is why the checkpoint must not be loaded; `left_over` are tensors that the model does not take.

    `took_s`: seconds, transformers' import aside.
    """

    tensors: int
    dtype: str
    left_over: tuple[str, ...] = ()
    problem: UserError | None = None
    took_s: float = field(default=0.0, compare=False)

    @property
    def line(self) -> str:
        if self.problem:
            return f"examined: {self.problem.problem}"
        return "examined: " + ", ".join(
            ["complete", f"{self.tensors:,} tensors", self.dtype, *([self.note] if self.note else [])]
        )

    @property
    def note(self) -> str | None:
        if not self.left_over:
            return None
        return f"{len(self.left_over)} tensors are not used: {listed(self.left_over)}"


def require_complete(checkpoint: Checkpoint) -> Examination:
    """Raises `UserError` where weights are missing or have another shape than the config gives them."""
    result = examine(checkpoint)
    if result.problem:
        raise UserError(result.problem.problem, result.problem.advice)
    return result


def examine(checkpoint: Checkpoint) -> Examination:
    """Each checkpoint once. Imports torch and transformers."""
    # Without tensors that a resident variant lends: the cache would keep them alive.
    return _examine(replace(checkpoint, lent=None), (checkpoint.path / "config.json").stat().st_mtime_ns)


@lru_cache(maxsize=32)
def _examine(checkpoint: Checkpoint, _changed: int) -> Examination:
    import transformers  # noqa: F401  its import is not part of the time

    left_over: list[str] = []
    problem, began = None, time.perf_counter()
    try:
        left_over = _left_over(checkpoint)
    except UserError as error:
        problem = error
    took_s = time.perf_counter() - began
    return Examination(len(checkpoint.tensors), checkpoint.dtype, tuple(left_over), problem, took_s)


def _left_over(checkpoint: Checkpoint) -> list[str]:
    import torch
    import transformers

    state, unclear = _logical(checkpoint)
    state = {name: torch.empty(shape, dtype=torch.bfloat16, device="meta") for name, shape in state.items()}
    try:
        config = transformers.AutoConfig.from_pretrained(
            checkpoint.path, local_files_only=True, trust_remote_code=False
        )
        for part in (config, config.get_text_config()):
            vars(part).pop("quantization_config", None)
        model_class = transformers.MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
        if model_class.config_class is type(
            config.get_text_config()
        ):  # of text and images, its text part alone
            config = config.get_text_config()
        with _bounded(checkpoint):
            _, info = model_class.from_pretrained(
                None, config=config, state_dict=state, device_map={"": "meta"}, dtype=torch.bfloat16,
                output_loading_info=True, ignore_mismatched_sizes=True,
            )  # fmt: skip
    except _TooMuch as error:
        raise UserError(
            f"config.json of {checkpoint.source} describes a larger model than its files contain{error}.",
            "The files do not belong together: download the whole checkpoint again.",
        ) from None
    except Exception as error:
        text = formatting.first_line(error)
        raise UserError(
            f"transformers cannot build {checkpoint.source} ({checkpoint.architecture}): {text}",
            "Check that config.json and the weights belong together, and that this transformers version knows the model.",
        ) from None
    check_loaded(checkpoint.source, info, unclear)
    return sorted(info["unexpected_keys"])


def _logical(checkpoint: Checkpoint) -> tuple[dict[str, tuple[int, ...]], dict[str, int | None]]:
    """(the model's tensors by name and shape, without what lies beside packed weights; the tails of the names of those
    whose shape the headers do not tell, with their number of values where that is known)."""
    quantization = checkpoint.quantization
    if quantization is None:
        return {t.name: t.shape for t in checkpoint.tensors}, {}
    shapes: dict[str, tuple[int, ...]] = {}
    unclear: dict[str, int | None] = {}
    names = {t.name for t in checkpoint.tensors}
    for tensor in checkpoint.tensors:
        if packed.is_state(tensor.name, quantization):
            continue
        name, shape = packed.parameter(tensor, quantization)
        shapes[name] = shape
        count = packed.count_of(tensor, names)
        if count or tensor.dtype in ("uint8", "int8") or (name != tensor.name and shape == tensor.shape):
            unclear[_tail(name)] = count
            if experts := _experts(name):
                unclear[experts] = None
    return shapes, unclear


def _tail(name: str) -> str:
    """A tensor's name from the number of its layer on, which stays where transformers renames what is before it."""
    found = re.search(r"\w+\.\d+\..*", name)
    return found[0] if found else ".".join(name.split(".")[-2:])


def _experts(name: str) -> str | None:
    """A name for all experts of a layer, whether each is a tensor or transformers has merged them; None for others."""
    found = re.search(r"\w+\.\d+\.(?=.*\bexperts\.)", name)
    return f"{found[0]}*.experts" if found else None


def check_loaded(source: str, info: dict[str, Any], unclear: Mapping[str, int | None] | None = None) -> None:
    """Raises `UserError` for weights that transformers found missing or of another shape; else they would be random.

    Args:
        info: what `from_pretrained(output_loading_info=True)` returns.
        unclear: tails of names whose stored shape says nothing, with the number of values that they hold, where that is
            known.
    """
    missing = sorted(info["missing_keys"])
    unexpected = sorted(info["unexpected_keys"])
    if missing:
        raise UserError(
            f"{len(missing)} of the weights that {source} needs are missing in its files: {listed(missing)}."
            f"{_cause(missing, unexpected)}",
            _AGAIN,
        )
    unclear = unclear or {}
    for name, _, built in sorted(info["mismatched_keys"]):
        if (count := unclear.get(_tail(name))) and count != math.prod(built):
            raise UserError(
                f"{name} of {source} has {count:,} values; according to its config.json it is {tuple(built)}, "
                f"{math.prod(built):,} values.",
                "It is truncated, or config.json belongs to another model: download the whole checkpoint again.",
            )
    wrong = sorted(m for m in info["mismatched_keys"] if not unclear.keys() & {_tail(m[0]), _experts(m[0])})
    if wrong:
        name, stored, built = wrong[0]
        raise UserError(
            f"{len(wrong)} weights of {source} have a different shape from that in its config.json: {name} is "
            f"{tuple(stored)} in the files and {tuple(built)} by config.json.",
            "The files do not belong together: download the whole checkpoint again.",
        )
    if bad := [n for n in unexpected if packed.is_packed_weight(n) or packed.is_state(n)]:
        raise UserError(
            f"{source} contains quantized weights that the model does not use: {listed(bad)}.",
            "Use a checkpoint in which these modules are not quantized.",
        )


def _cause(missing: list[str], unexpected: list[str]) -> str:
    """What most likely happened, as a sentence with a space before it; "" where nothing can be told."""
    for end in missing[:20]:
        stems = [u.removesuffix(end) for u in unexpected if u.endswith(end) and u != end]
        if stems:
            return f" The names in the files start with “{stems[0]}”, which must be removed."
    first = re.sub(r"\W*_orig_mod\b", "", unexpected[0]) if unexpected else ""
    if unexpected and first != unexpected[0] and first in missing:
        return " The names in the files contain “_orig_mod.” (a compiled model was saved), which must be removed."
    layers = sorted({int(m[1]) for n in missing if (m := re.search(r"\.(\d+)\.", n))})
    if layers and all(re.search(r"\.\d+\.", n) for n in missing):
        shown = ", ".join(map(str, layers[:5])) + (" …" if len(layers) > 5 else "")
        return f" They are of layer {shown}: a shard is missing, or config.json belongs to a model with more layers."
    if all(re.search(r"(?:lm_head|embed_out|output)\.weight$", n) for n in missing):
        return " The output head is not stored, and config.json says that it is not the embedding (tie_word_embeddings)."
    return ""


def listed(names: Iterable[str]) -> str:
    names = list(names)
    return ", ".join(names[:3]) + (" …" if len(names) > 3 else "")


class _TooMuch(Exception):
    pass


@contextlib.contextmanager
def _bounded(checkpoint: Checkpoint) -> Iterator[None]:
    """While open, building a model stops at more parameters or elements than the files could ever fill, and at tables (of
    positions, masks) that take more than the weights: those are allocated by a number of the config alone."""
    from torch.nn.modules.module import (
        register_module_buffer_registration_hook,
        register_module_parameter_registration_hook,
    )

    left = [4 * len(checkpoint.tensors) + 20_000, 8 * checkpoint.parameters + 10**9]
    left_in_tables = [checkpoint.parameters + _TABLES]
    thread = threading.get_ident()
    promised, there = (
        consistency.layers(_config(checkpoint)),
        consistency.layers_of(t.name for t in checkpoint.tensors),
    )
    layers = f": {promised:,} layers, the files contain {there:,}" if promised and promised > there else ""

    def count(_module: Any, name: str, parameter: Any) -> None:
        if parameter is None or threading.get_ident() != thread:
            return
        left[0], left[1] = left[0] - 1, left[1] - parameter.numel()
        if min(left) < 0:
            raise _TooMuch(layers or f", with a {name} of {tuple(parameter.shape)}")

    def count_table(_module: Any, name: str, table: Any) -> None:
        if table is None or threading.get_ident() != thread:
            return
        left_in_tables[0] -= table.numel()
        if left_in_tables[0] < 0:
            raise _TooMuch(f", with a {name} of {tuple(table.shape)}")

    hooks = (
        register_module_parameter_registration_hook(count),
        register_module_buffer_registration_hook(count_table),
    )
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _config(checkpoint: Checkpoint) -> dict[str, Any]:
    from comparator.sources.folder import read_json

    return read_json(checkpoint.path / "config.json")
