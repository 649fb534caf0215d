"""adapter_config.json → the config that peft builds from: known settings only, and module names in place of patterns."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import fields
from typing import Any

from comparator.adapters.describe import PREFIX, AdapterFacts, is_own, lora_rows, module_of
from comparator.adapters.targets import (
    Patterns,
    holds_parameter,
    lora_ranks,
    parameter_holders,
    placed,
    short_name,
)
from comparator.core.errors import UserError

_WHOLE_MODEL = "all-linear"


def unknown_settings(facts: AdapterFacts) -> list[str]:
    """Keys of the adapter's config that the installed peft has no setting for. Imports peft."""
    known = _fields(facts)
    return sorted(k for k in facts.config if known and k not in known)


def _fields(facts: AdapterFacts) -> set[str]:
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

    config_class = PEFT_TYPE_TO_CONFIG_MAPPING.get(facts.peft_type)
    return {f.name for f in fields(config_class)} if config_class else set()


def resolve(facts: AdapterFacts, model: Any) -> tuple[Any, dict[str, str]]:
    """(peft's config, the adapter's module names → the model's) for an adapter on this model.

    Raises `UserError` for modules of the adapter that the model does not have, and for those that its config names and
    its file lacks; and what peft raises.
    """
    from peft import PeftConfig

    known, patterns = _fields(facts), Patterns(facts.config, facts.source)
    settings = {k: v for k, v in facts.config.items() if k in known and k != "runtime_config"}
    names = [name for name, _ in model.named_modules()]
    places = placed(dict.fromkeys(m for t in facts.tensors if (m := module_of(t.name))), names)
    rows = lora_rows(facts.tensors) if facts.peft_type == "LORA" else {}
    missing = [m for m in rows if m not in places]
    # peft itself knows how experts that were single layers became one module; it wants its own names for that.
    experts = missing and all(".experts." in m for m in missing)
    if rows and not experts and not facts.config.get("layer_replication"):
        if missing:
            raise UserError(
                f"{facts.source} does not fit this model: the model has no module for its {missing[0]}"
                + (f" and {len(missing) - 1} more modules." if len(missing) > 1 else "."),
                trained_on(facts),
            )
        _check_complete(facts, patterns, model, places)
        settings |= _exact(facts, patterns, model, places, rows)
    else:
        settings |= _named(facts, patterns, names, places)
    return PeftConfig.from_peft_type(
        **{**settings, "peft_type": facts.peft_type, "inference_mode": True}
    ), places


def notes(wrapped: Any, places: Mapping[str, str], facts: AdapterFacts, adapter: str) -> list[str]:
    """What a reader has to know of the adapter on this very model."""
    found = []
    if moved := next(((ours, theirs) for ours, theirs in places.items() if ours != theirs), None):
        found.append(
            f"The adapter's module names differ from this model's: its {moved[0]} was put on {moved[1]}, and so on."
        )
    more = ("use_dora", "modules_to_save", "trainable_token_indices")
    if facts.peft_type == "LORA" and not facts.alters_base and not any(facts.config.get(key) for key in more):
        updates = (p for n, p in wrapped.named_parameters() if ".lora_B." in n or ".lora_embedding_B." in n)
        strengths = [getattr(m, "scaling", None) for m in wrapped.modules()]
        strong = any(s.get(adapter) for s in strengths if isinstance(s, dict))
        if not (strong and any(bool(p.any()) for p in updates)):
            found.append("The adapter has no effect: its update of the weights is 0.")
    return found


def renamed(tensor: str, places: Mapping[str, str]) -> str:
    """A tensor's name with its module called as in the model."""
    module = module_of(tensor)
    if module not in places:
        return tensor
    own = tensor.removeprefix(PREFIX).removeprefix(module)
    return f"{PREFIX}{places[module]}{own}"


def trained_on(facts: AdapterFacts) -> str:
    return f"It was trained on {facts.base_model}." if facts.base_model else "Is it made for this model?"


def _exact(
    facts: AdapterFacts,
    patterns: Patterns,
    model: Any,
    places: Mapping[str, str],
    rows: Mapping[str, list[int]],
) -> dict[str, Any]:
    """For a LoRA: the modules of its tensors, each with its own rank and alpha."""
    config = facts.config
    holders, alpha = parameter_holders(config), config.get("lora_alpha", 8)
    modules = [m for m in rows if not holds_parameter(m, holders)]
    ranks = {places[m]: r for m, r in lora_ranks(patterns, rows).items() if m in modules}
    alphas = {places[m]: patterns.value("alpha_pattern", m, alpha) for m in modules}
    rank = Counter(ranks.values()).most_common(1)[0][0] if ranks else config.get("r", 8)
    for name, _ in model.named_parameters():
        if any(name == p or name.endswith(f".{p}") for p in config.get("target_parameters") or ()):
            ranks[name] = patterns.value("rank_pattern", name, config.get("r", 8))
            alphas[name] = patterns.value("alpha_pattern", name, alpha)
    return {
        "target_modules": sorted(places[m] for m in modules),
        "exclude_modules": None,
        "layers_to_transform": None,
        "layers_pattern": None,
        "r": rank,
        "rank_pattern": _by_value(ranks, rank),
        "alpha_pattern": _by_value(alphas, alpha),
    }


def _named(
    facts: AdapterFacts, patterns: Patterns, names: Iterable[str], places: Mapping[str, str]
) -> dict[str, Any]:
    """For all others: their own lists of names, and names in place of each regular expression."""
    config, changed = facts.config, {}
    own = dict.fromkeys(m for t in facts.tensors if is_own(t.name) and (m := module_of(t.name)))
    for key in ("target_modules", "feedforward_modules", "exclude_modules"):
        value = config.get(key)
        if not isinstance(value, str) or value.lower() == _WHOLE_MODEL:
            continue
        among = {m: places.get(m, m) for m in own} if key != "exclude_modules" else {n: n for n in names}
        changed[key] = sorted({p for m, p in among.items() if patterns.matches(key, value, m)})
        if key == "target_modules" and any(p not in places.values() for p in changed[key]):
            changed[key] = sorted({p.rpartition(".")[2] for p in changed[key]})  # peft renames these
        if key == "target_modules" and not changed[key]:
            raise UserError(
                f"target_modules of {facts.source} matches none of the modules in its file.",
                "Save or download the adapter again.",
            )
    for key in [k for k, v in config.items() if k.endswith("_pattern") and isinstance(v, dict)]:
        if all(re.fullmatch(r"[\w.\-]*", str(pattern)) for pattern in config[key]):
            continue
        values = {places.get(m, m): value for m in own if (value := patterns.value(key, m, None)) is not None}
        changed[key] = _by_value(values, None)
    return changed


def _by_value(values: Mapping[str, Any], default: Any) -> dict[str, Any]:
    """One pattern of plain names for each value that is not the default: what `get_pattern_key` takes."""
    grouped: dict[Any, list[str]] = {}
    for name, value in values.items():
        if value != default:
            grouped.setdefault(value, []).append(re.escape(name))
    return {"|".join(names): value for value, names in grouped.items()}


def _check_complete(facts: AdapterFacts, patterns: Patterns, model: Any, places: Mapping[str, str]) -> None:
    """Raises `UserError` where the config targets a module of the model that the file holds nothing for."""
    config = facts.config
    if config.get("target_modules") in (None, _WHOLE_MODEL) or config.get("layers_to_transform") is not None:
        return
    # What stands before the part that both names share: `model.language_model.` in the adapter, `model.` in the model.
    heads = {(m.removesuffix(short_name(m)), p.removesuffix(short_name(p))) for m, p in places.items()}
    there = set(places.values())
    for name, module in model.named_modules():
        end = short_name(name)
        weight = getattr(module, "weight", getattr(module, "qweight", None))
        if name in there or weight is None or weight.dim() != 2:
            continue
        for ours, theirs in heads:
            if name == theirs + end and patterns.targets(ours + end):
                raise UserError(
                    f"{facts.source} is incomplete: its config requires {ours + end}, which its file does not contain.",
                    "Save or download the adapter again.",
                )
