"""Which modules carry an adapter, at which rank: what its config says, compared with what its tensors show.

peft takes `target_modules`, `rank_pattern` and the like for regular expressions and matches them with `re`, which the
pattern of a stranger can keep busy for years. Here each is matched within a time limit, and peft gets plain names.
"""

from __future__ import annotations

import math
import re
import time
from collections.abc import Iterable, Mapping
from typing import Any

import regex  # installed with transformers; unlike `re` it takes a time limit

from comparator.core.errors import UserError

LIMIT_S = 1.0  # for all patterns of one config; an honest one takes microseconds
_PLAIN = re.compile(r"[\w.\-]*")  # as a pattern it takes linear time and means what it says
_NAMES = ("modules_to_save", "layers_pattern")  # which peft puts into regular expressions too
OTHER_SENSES = {
    "visual",
    "vision_tower",
    "vision_model",
    "vision_encoder",
    "audio_tower",
    "audio_model",
    "mtp",
}


class Patterns:
    """The patterns of one adapter's config, matched in `LIMIT_S` seconds altogether."""

    def __init__(self, config: Mapping[str, Any], source: str):
        self.config, self.source, self.left_s = config, source, LIMIT_S
        for key in _NAMES:
            for name in listed(config.get(key)):
                if not _PLAIN.fullmatch(str(name)):
                    raise self._bad(key, f"names no module: {str(name)[:80]}")

    def matches(self, key: str, pattern: str, name: str) -> bool:
        """Whether `pattern`, the value of `key`, matches the whole name. Raises `UserError` where that takes too long."""
        start = time.monotonic()
        counts = [int(n) for n in re.findall(r"(\d+)\}", pattern) if len(n) < 6]
        if len(pattern) > 100_000 or math.prod(counts) > 10_000:  # compiling would take gigabytes
            raise self._bad(key, "is a regular expression that repeats too much")
        try:
            return regex.compile(pattern).fullmatch(name, timeout=max(self.left_s, 1e-3)) is not None
        except TimeoutError:
            raise self._bad(key, "is a regular expression that takes too long to match") from None
        except (regex.error, RecursionError, MemoryError, OverflowError) as error:
            raise self._bad(key, f"is not a regular expression: {str(error)[:80]}") from None
        finally:
            self.left_s -= time.monotonic() - start

    def value(self, key: str, name: str, default: Any) -> Any:
        """What `rank_pattern` or `alpha_pattern` says of a module, or the default; as peft's `get_pattern_key`."""
        patterns = self.config.get(key)
        for pattern, value in patterns.items() if isinstance(patterns, dict) else ():
            if self.matches(key, rf"(.*\.)?({pattern})", name):
                return value
        return default

    def targets(self, name: str) -> bool:
        """Whether the config puts the adapter on this module; as peft's `check_target_module_exists`."""
        if self._in("exclude_modules", name) or self._in("modules_to_save", name):
            return False
        wanted = self.config.get("target_modules")
        return wanted is None or wanted == "all-linear" or self._in("target_modules", name)

    def _in(self, key: str, name: str) -> bool:
        value = self.config.get(key)
        if isinstance(value, str):
            return self.matches(key, value, name)
        return any(name == n or name.endswith(f".{n}") for n in listed(value))

    def _bad(self, key: str, why: str) -> UserError:
        return UserError(
            f"{key} of {self.source} {why}.",
            "Save the adapter again with module names there, or edit adapter_config.json.",
        )


def listed(value: Any) -> list:
    return list(value) if isinstance(value, (list, tuple, set)) else [] if value is None else [value]


def lora_ranks(patterns: Patterns, rows: Mapping[str, Iterable[int]]) -> dict[str, int]:
    """The rank of each LoRA module. `rows`: per module, the rows of each lora_A that lies there.

    A parameter that stacks experts has its rank once an expert, so there the config decides. Raises `UserError` where
    config and tensors contradict each other.
    """
    config, ranks = patterns.config, {}
    holders = parameter_holders(config)
    for module, found in rows.items():
        said = patterns.value("rank_pattern", module, config.get("r", 8))
        if not isinstance(said, int) or isinstance(said, bool) or said <= 0:
            raise UserError(
                f"The config of {patterns.source} gives no rank for {module}.",
                "Save the adapter again with peft's save_pretrained.",
            )
        if holds_parameter(module, holders):
            ranks[module] = said
            wrong = [n for n in found if n % said]
        else:
            ranks[module] = next(iter(found))
            wrong = [n for n in found if n != said]
        if wrong:
            raise UserError(
                f"{patterns.source} contradicts itself: its config says rank {said:,}, and its tensors of {module} have "
                f"rank {wrong[0]:,}.",
                "Save or download the adapter again.",
            )
    if rows and not holders and not any(patterns.targets(module) for module in rows):
        raise UserError(
            f"target_modules of {patterns.source} matches none of the modules in its file, such as {next(iter(rows))}.",
            "Save or download the adapter again.",
        )
    return ranks


def parameter_holders(config: Mapping[str, Any]) -> set[str]:
    """The ends of the modules whose parameters, not the modules themselves, carry the adapter (`target_parameters`)."""
    return {str(p).rpartition(".")[0] or "experts" for p in listed(config.get("target_parameters"))}


def holds_parameter(module: str, holders: Iterable[str]) -> bool:
    return any(module == h or module.endswith(f".{h}") for h in holders)


def short_name(module: str) -> str:
    """From the component before the first number on; without a number the last one. What stands before differs
    between the names of a checkpoint and those of the model (`transformer.h.0…` and `h.0…`)."""
    parts = module.split(".")
    for index, part in enumerate(parts):
        if part.isdigit():
            return ".".join(parts[max(0, index - 1) :])
    return parts[-1]


def placed(modules: Iterable[str], model: Iterable[str]) -> dict[str, str]:
    """The adapter's module names → the model's. What stands before the layer's number may differ (`model.layers.0…` and
    `model.language_model.layers.0…`); a module that has no place, or several, is left out."""
    known, by_end = set(model), {}
    for name in known:
        by_end.setdefault(short_name(name), []).append(name)
    found = {}
    for module in modules:
        if module in known:
            found[module] = module
            continue
        senses = OTHER_SENSES & set(module.split("."))
        same = [n for n in by_end.get(short_name(module), ()) if OTHER_SENSES & set(n.split(".")) == senses]
        nested = [n for n in same if n.endswith(f".{module}") or module.endswith(f".{n}")]
        if len(same) == 1 or len(nested) == 1:
            found[module] = (nested or same)[0]
    return found
