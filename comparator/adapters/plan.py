"""What will be done with an adapter on a variant: locate, describe, check, decide. Before anything is loaded.

The decision is whether the adapter can share a resident base with other columns, or needs
a copy of its own because it writes into the base's weights (`:merged`, and a few kinds that peft loads so).
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from comparator.adapters import peft_config
from comparator.adapters.compatibility import HEADS, check_fit, embedding_of, short_name
from comparator.adapters.describe import PROMPT_TYPES, AdapterFacts, describe, module_of
from comparator.adapters.locate import WEIGHTS, builtin_names, open_adapter
from comparator.adapters.unchanged_tensors import unchanged
from comparator.backends import backend_for
from comparator.backends.base import AdapterKind
from comparator.core.errors import UserError
from comparator.core.settings import Settings
from comparator.core.variant import Adapter, Cell, Variant
from comparator.sources import Checkpoint
from comparator.sources.checkpoint import Progress


@dataclass(frozen=True)
class Plan:
    """`key` identifies the adapter's weights, whatever its strength; `private` says why it needs its own base."""

    adapter: Adapter
    facts: AdapterFacts
    notes: tuple[str, ...]
    key: tuple
    private: str | None = None
    left_out: frozenset[str] = frozenset()  # tensors that are the model's own and need not be loaded

    @property
    def pool_key(self) -> str:
        """Keeps a private base apart from the shared one."""
        return f"{self.key}*{self.adapter.scale!r}:{self.adapter.merged}" if self.private else ""


def plan(
    adapter: Adapter,
    checkpoint: Checkpoint,
    variant: Variant,
    *,
    progress: Progress | None = None,
    settings: Settings | None = None,
) -> Plan:
    """Raises `UserError` for everything that can be known to be wrong before loading."""
    files = open_adapter(adapter, progress=progress, settings=settings)
    facts = describe(files)
    notes = [*check_fit(facts, checkpoint), *_unknown_settings(facts)]
    if adapter.scale != 1.0 and not facts.scalable:
        raise UserError(
            f"{facts.source} is {facts.kind}, which cannot be scaled.",
            f"Write {Adapter(adapter.source, adapter.revision, 1.0, adapter.merged).notation}.",
        )
    if adapter.scale != 1.0 and facts.saved_whole:
        notes.append(
            f"The scale applies to the {facts.kind} weights; modules stored in full "
            f"({', '.join(facts.saved_whole)}) are not scaled."
        )
    left_out = frozenset(_unchanged(facts, checkpoint))
    private = facts.alters_base
    if private is None and (own := [n for n in facts.brought if n not in left_out]):
        private = f"it brings its own {module_of(own[0])}"
    if adapter.merged:
        _check_merge(facts)
        private = "it is merged into the weights"
    elif private:
        notes.append(f"This adapter has its own copy of the base in memory, because {private}.")
    backend_for(variant).check_adapter(
        variant,
        AdapterKind(
            facts.source, facts.kind, facts.peft_type, bool(facts.config.get("use_dora")), adapter.merged
        ),
    )
    stamp = (files.path / WEIGHTS).stat()
    key = (str(files.path), files.revision, stamp.st_mtime_ns, stamp.st_size)
    return Plan(adapter, facts, tuple(notes), key, private, left_out)


def _unknown_settings(facts: AdapterFacts) -> list[str]:
    unknown = [ascii(key)[1:-1][:40] for key in peft_config.unknown_settings(facts)]
    if not unknown:
        return []
    more = f" and {len(unknown) - 8} more" if len(unknown) > 8 else ""
    return [
        f"adapter_config.json has settings that the installed peft does not know: {', '.join(unknown[:8])}{more}. They are "
        "ignored, and the adapter may not do what it was trained for."
    ]


def _unchanged(facts: AdapterFacts, checkpoint: Checkpoint) -> set[str]:
    """Of the tensors that it brings, those that are the model's own; a tied head is stored as the embedding."""
    by_name = {t.name: t for t in facts.tensors}
    ends = {}
    for name in facts.brought:
        module = short_name(module_of(name))
        if checkpoint.tied and module in HEADS:
            module = embedding_of(checkpoint) or module
        ends[name] = f"{module}.{name.rpartition('.')[2]}"
    return unchanged(facts.files.path / WEIGHTS, [by_name[n] for n in facts.brought], ends, checkpoint)


def _check_merge(facts: AdapterFacts) -> None:
    if facts.peft_type in PROMPT_TYPES:
        raise UserError(
            f"{facts.source} is {facts.kind}: it adds virtual tokens and changes no weights, so there is nothing to merge.",
            "Leave :merged out.",
        )


def same_twice(cells: Iterable[Cell], settings: Settings | None = None) -> str | None:
    """The label of a cell that is there twice under two spellings of its adapter (`./x` and its full path)."""
    seen: set[tuple] = set()
    for cell in cells:
        if cell.adapter is None:
            continue
        adapter = cell.adapter
        source = adapter.source.strip()
        if source.lower() in builtin_names():
            place = source.lower()
        else:
            # A Hub repo is no path here, and resolving one changes nothing about which is which.
            place = str(Path(os.path.expanduser(source)).resolve())
        key = (cell.variant.notation, place, adapter.revision, adapter.scale, adapter.merged)
        if key in seen:
            return cell.label
        seen.add(key)
    return None
