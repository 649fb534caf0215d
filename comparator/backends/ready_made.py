"""Checkpoints that were quantized elsewhere, `METHOD@SOURCE`: opening them, and whether they fit the comparison's model.

`FromCheckpoint` is the base of backends that load such checkpoints with transformers. Reads configs and headers here; loads
no weights.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

from comparator.backends import saving, sizes, transformers_loader
from comparator.backends.base import Backend, Placement, Progress
from comparator.core.errors import UserError
from comparator.core.variant import Variant, sort_options
from comparator.sources import Checkpoint, isolated, open_checkpoint, packed
from comparator.sources.examine import require_complete

# What has to be the same in both models; by several names, since families differ.
_SIZES = (
    ("hidden_size", "n_embd", "d_model"),
    ("num_hidden_layers", "n_layer", "num_layers"),
    ("num_attention_heads", "n_head"),
    ("num_key_value_heads",),
    ("intermediate_size", "n_inner", "ffn_dim"),
    ("vocab_size",),
)


class FromCheckpoint(Backend):
    """A backend whose methods take a source. Subclasses set `reads`, and `settings` where options come from it."""

    decided: ClassVar[tuple[str, ...]] = ()
    """Options that `settings` fills in. With a source they stay in the notation when they name a default, too: the
    checkpoint may contradict it."""
    overridable: ClassVar[tuple[str, ...]] = ()
    """Those of `decided` that may be asked for otherwise than the checkpoint says: how its weights are multiplied, not how
    they are stored. Left out, they are the checkpoint's."""

    def __init__(self):
        self._opened: dict[tuple[str | None, str | None], Checkpoint] = {}

    def check_source(self, checkpoint: Checkpoint) -> None:
        """Raises `UserError` for a checkpoint that is damaged, or of a kind that the method cannot load, in the method's own
        terms. Asked before `require_complete`, which knows names and shapes only."""

    def settings(self, checkpoint: Checkpoint, variant: Variant) -> dict[str, str | None]:
        """Options that the checkpoint decides, as text; None for a default. Raises `UserError` for a checkpoint that the
        method cannot load."""
        return {}

    def complete(self, variant: Variant, checkpoint: Checkpoint, progress: Progress | None = None) -> Variant:
        """The options that the checkpoint decides are filled in; one that contradicts it is refused by name."""
        if not variant.source:
            return self.complete_on_the_spot(variant, checkpoint, progress)
        opened = open_source(variant, progress)
        require_method(opened, variant.method, self.reads)
        self.check_source(opened)
        require_complete(opened)
        settings = self.settings(opened, variant)
        fixed = {name: value for name, value in settings.items() if name not in self.overridable}
        refuse_contradictions(opened, self.requested(variant), fixed)
        check_same_model(opened, checkpoint)
        self._opened[variant.source, variant.revision] = opened
        return self.with_options(variant, settings)

    def complete_on_the_spot(
        self, variant: Variant, checkpoint: Checkpoint, progress: Progress | None = None
    ) -> Variant:
        """As `complete`, without a source. Here: such a method needs one."""
        raise UserError(
            f"{variant.method} cannot be made here: it loads checkpoints that were quantized elsewhere.",
            f"Name one: {variant.method}@user/repo, or {variant.method}@ and the path of a folder.",
        )

    def canonical(self, variant: Variant) -> Variant:
        result = super().canonical(variant)
        if not variant.source:
            return result
        named = {name: value for name, value in self.requested(variant).items() if name in self.decided}
        return self._written(variant, {**self.requested(result), **named})

    def with_options(self, variant: Variant, settings: dict[str, str | None]) -> Variant:
        """The canonical variant with these options; None takes one out. An option that is asked for otherwise than
        `settings` says stays as it is asked for, also where it has its default."""
        requested = self.requested(variant)
        asked = {n: v for n, v in requested.items() if n in self.overridable and n in settings}
        values = {**requested, **settings, **asked}
        defaults = {o.name: o.default for o in self.method(variant.method).options}
        written = {}
        for name, value in values.items():
            own = settings.get(name) or defaults[name]
            if value is not None and (value != defaults[name] or (name in asked and value != own)):
                written[name] = value
        return self.canonical(self._written(variant, written))

    def _written(self, variant: Variant, values: dict[str, str]) -> Variant:
        """The variant with exactly these options, defaults included."""
        tokens: dict[str, str | None] = {}
        for option in self.method(variant.method).options:
            if (value := values.get(option.name)) is None:
                continue
            key, equals, rest = option.form.format(name=option.name, value=value).partition("=")
            tokens[key] = value if (option.kind, value) == ("flag", "false") else rest if equals else None
        return replace(variant, options=sort_options(tokens))

    def opened(self, variant: Variant) -> Checkpoint:
        """What `complete` looked at last: asking the Hub once a run is enough."""
        key = (variant.source, variant.revision)
        if key not in self._opened:
            self._opened[key] = open_source(variant)
        return self._opened[key]

    def tensor_sizes(self, variant: Variant, checkpoint: Checkpoint, device: str = ""):
        return sizes.as_stored(self.opened(variant))

    def save(
        self,
        checkpoint,
        variant: Variant,
        placement: Placement,
        target: Path,
        progress: Progress,
        change=None,
    ):
        """A ready-made checkpoint is copied as it is."""
        if not variant.source:
            self.save_on_the_spot(checkpoint, variant, placement, target, progress, change)
        elif change is not None:
            raise saving.refuse_change(variant)
        else:
            saving.copy_checkpoint(self.opened(variant).path, target, progress)

    def save_on_the_spot(
        self,
        checkpoint,
        variant: Variant,
        placement: Placement,
        target: Path,
        progress: Progress,
        change=None,
    ) -> None:
        """As `save`, without a source."""
        saving.write_loaded(self, checkpoint, variant, placement, target, progress, change)

    def load_opened(
        self, variant: Variant, placement: Placement, progress: Progress, *, dtype: str, **arguments: Any
    ) -> Any:
        """The source as a transformers model: `transformers_loader.from_pretrained` of its folder."""
        return transformers_loader.from_pretrained(
            self.opened(variant), placement, progress, dtype=dtype, **arguments
        )


def open_source(variant: Variant, progress: Progress | None = None) -> Checkpoint:
    """The checkpoint behind `METHOD@SOURCE`, downloaded where it is a Hub repo. Raises `UserError`."""
    name = f"{variant.source}@{variant.revision}" if variant.revision else str(variant.source)
    return open_checkpoint(name, progress=progress)


def require_method(checkpoint: Checkpoint, method: str, reads: tuple[str, ...]) -> None:
    """Raises `UserError` where the checkpoint is full precision, or is none that `method` loads. `reads`: as the backend
    has it."""
    from comparator.backends import readers

    if checkpoint.quantization is None:
        raise UserError(
            f"{checkpoint.source} is not quantized: its config.json has no quantization_config.",
            f"Name a checkpoint that was saved quantized after {method}@.",
        )
    fitting = readers(checkpoint.quantization)
    if method in fitting:
        return
    how = packed.method_of(checkpoint.quantization)
    if how not in reads:
        problem = f"{checkpoint.source} was quantized with {how}, not {' or '.join(reads)}."
    elif fitting:
        problem = f"{checkpoint.source} was quantized by {how} to {fitting[0]}, not to {method}."
    else:
        problem = f"{checkpoint.source} was quantized with {how}, in a way that no method here loads."
    raise UserError(
        problem, f"Write {fitting[0]}@{checkpoint.source}." if fitting else "Name another checkpoint."
    )


def refuse_contradictions(
    checkpoint: Checkpoint, requested: dict[str, str], settings: dict[str, str | None]
) -> None:
    """Raises `UserError` for an option that says otherwise than the checkpoint, by name."""
    for name, value in settings.items():
        if value is not None and requested.get(name, value) != value:
            raise UserError(
                f"{name}={requested[name]} is requested, but {checkpoint.source} was made with {name}={value}.",
                "Leave the option out: it comes from the checkpoint.",
            )


def check_same_model(quantized: Checkpoint, model: Checkpoint) -> None:
    """Raises `UserError` where the checkpoint is of another architecture or size than the comparison's model."""
    if quantized.architecture != model.architecture:
        raise other_architecture(quantized.source, quantized.architecture, model)
    check_sizes(quantized.source, config_of(quantized.path), model)


def other_architecture(source: str, architecture: str, model: Checkpoint) -> UserError:
    return UserError(
        f"{source} is a {architecture}; the comparison's model {model.source} is a {model.architecture}.",
        "Compare it with the model it was made from.",
    )


def check_sizes(source: str, config: dict[str, Any], model: Checkpoint) -> None:
    """Raises `UserError` for a size in `config`, as config.json names it, that is not the model's."""
    ours = config_of(model.path)
    for names in _SIZES:
        one, other = _first(ours, names), _first(config, names)
        if one is not None and other is not None and one != other:
            raise UserError(
                f"{source} has {names[0]} {other:,}; the comparison's model {model.source} has {one:,}.",
                "It was made from a model of another size: compare it with that one.",
            )


def tokenizer_note(quantized: Checkpoint, model: Checkpoint) -> list[str]:
    """A warning where the checkpoint's tokenizer is not the model's; all columns get the model's token ids."""
    strangers = any(isolated.needed(c.revision) for c in (model, quantized))
    one, other = (_vocabulary(c, strangers) for c in (model, quantized))
    if one is None or other is None or one == other:
        return []
    differ = sum(one.get(k) != v for k, v in other.items()) + sum(k not in other for k in one)
    return [
        f"{quantized.source} has a different tokenizer ({differ:,} of {max(len(one), len(other)):,} entries "
        "differ). Every variant is given the token ids of the comparison's model, so this one may give strange answers."
    ]


def left_over_note(checkpoint: Checkpoint) -> list[str]:
    """A note that names the tensors which the model does not take, where there are any."""
    note = require_complete(checkpoint).note
    return [f"{checkpoint.source}: {note}."] if note else []


def with_quantization(checkpoint: Checkpoint, quantization: dict[str, Any]) -> Any:
    """The checkpoint's config for transformers, with another `quantization_config`."""
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(checkpoint.path, local_files_only=True, trust_remote_code=False)
    config.quantization_config = quantization
    return config


def config_of(path: Path) -> dict[str, Any]:
    return json.loads((path / "config.json").read_text(encoding="utf-8"))


def _first(config: dict[str, Any], names: tuple[str, ...]) -> int | None:
    text = config.get("text_config") if isinstance(config.get("text_config"), dict) else {}
    return next((v for n in names for c in (text, config) if isinstance(v := c.get(n), int)), None)


def _vocabulary(checkpoint: Checkpoint, strangers: bool) -> dict[str, int] | None:
    file = checkpoint.path / "tokenizer.json"
    if not file.is_file():
        return None
    try:
        if strangers:  # what was made here of a stranger's model has a copy of its tokenizer
            return isolated.IsolatedTokenizer(checkpoint).get_vocab()
        from tokenizers import Tokenizer

        return Tokenizer.from_file(str(file)).get_vocab(with_added_tokens=True)
    except Exception:  # a tokenizer of a newer kind; the model's own is what is used
        return None
