"""Put an adapter on a resident base and take it off again. The part that needs torch and peft.

peft wraps modules in place, and a model that stays wrapped is slower, has other module names and cannot be told
from one that never was. So each adapter is wrapped by peft once, on the bare base; what peft changed in the module
tree is recorded and taken back. Putting it on later means setting those entries again, taking it off means
restoring them: microseconds a module, no copy of a weight, any number of adapters over one base, and without an
adapter the base is the very tree of objects that was loaded. peft's own `disable_adapter` would leave its wrappers
in every forward, and `unload` would throw the adapter away.

Everything here runs on the engine's thread.
"""

from __future__ import annotations

import contextlib
import time
import warnings
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

from comparator.adapters import peft_config
from comparator.adapters.plan import Plan
from comparator.backends.base import Backend
from comparator.backends.dtypes import short_name
from comparator.core.errors import UserError
from comparator.core.result import LayerRow
from comparator.metrics.memory import held_tensors, nbytes, storage_key
from comparator.util import formatting
from comparator.util.compat import peft as compat
from comparator.util.compat.torch import plain_tensors, version

_NAME = "default"
_ABSENT = object()


@dataclass(frozen=True)
class Mark:
    """What a module carries: the adapter's kind, rank, dtype and bytes."""

    kind: str
    rank: int | None
    dtype: str
    bytes: int


@dataclass
class Fitted:
    """An adapter that was wrapped around a base and taken off again, ready to be put on."""

    plan: Plan
    changes: list[tuple[dict, Any, Any, Any]]  # (a dict of a module, its key, without, with)
    scalings: list[tuple[dict, float]]  # (peft's scaling dict of a layer, the value at strength 1)
    marks: dict[str, Mark]
    bytes: int
    load_s: float
    peft_model: Any
    notes: tuple[str, ...] = ()  # beside those of the plan: what only the loaded model could tell
    warmed: set[int] = field(default_factory=set)
    switch_s: float | None = None
    last_used: float = field(default_factory=time.monotonic)


def fit(model: Any, backend: Backend, plan: Plan) -> Fitted:
    """Let peft build the adapter around `model`, then take it off. `model` is afterwards as it was.

    Raises `UserError` when peft cannot, and when the adapter's weights do not belong to this model.
    """
    import peft  # noqa: F401 - not to be counted as this adapter's load time

    start = time.perf_counter()
    before = _Snapshot(model)
    try:
        with _quiet(backend), backend.reading_state_dict(model):
            peft_model, found = _build(model, plan)
        changes = before.changes()
        if (
            peft_model.active_peft_config.is_prompt_learning
        ):  # virtual tokens go in where `generate` prepares its inputs
            prepare = peft_model.prepare_inputs_for_generation
            changes.append((vars(model), "prepare_inputs_for_generation", _ABSENT, prepare))
        if plan.private is None and (altered := before.altered(model)):
            raise AltersBase(altered)
        compat.cache_dora_norms(model, backend.dequantize)
        base = before.storages | {
            storage_key(t) for t in before.tensors
        }  # also where it was given other values
        held = (*held_tensors(model), *_prompt_tensors(peft_model))
        own = {storage_key(t): nbytes(t) for t in held if storage_key(t) not in base}
        marks = _marks(model, plan.facts.kind, base)
        scalings = [
            (m.scaling, m.scaling[_NAME])
            for m in model.modules()
            if isinstance(getattr(m, "scaling", None), dict) and _NAME in m.scaling
        ]
    finally:
        before.restore()
    if not marks and not _prompt_tensors(peft_model):
        raise UserError(
            f"{plan.facts.source} changes no module of this model.",
            "Choose an adapter made for this architecture.",
        )
    return Fitted(
        plan=plan,
        changes=changes,
        scalings=scalings,
        marks=marks,
        bytes=sum(own.values()),
        load_s=time.perf_counter() - start,
        peft_model=peft_model,
        notes=tuple(found),
    )


class AltersBase(Exception):
    """An adapter wrote into the shared weights. `args[0]` names the first tensor."""


@contextlib.contextmanager
def worn(fitted: Fitted | None, scale: float = 1.0) -> Iterator[None]:
    """Inside, the base carries the adapter at this strength. Without one nothing happens."""
    if fitted is None:
        yield
        return
    start = time.perf_counter()
    for scaling, at_one in fitted.scalings:
        scaling[_NAME] = at_one * scale
    for place, key, _, new in fitted.changes:
        _set(place, key, new)
    on_s = time.perf_counter() - start
    try:
        yield
    finally:
        start = time.perf_counter()
        for place, key, old, _ in reversed(fitted.changes):
            _set(place, key, old)
        fitted.switch_s = on_s + time.perf_counter() - start
        fitted.last_used = time.monotonic()


def merge(model: Any, backend: Backend, plan: Plan) -> tuple[Any, list[str]]:
    """Merge the adapter into `model`'s own weights permanently: (the model without peft's wrappers, notes)."""
    with _quiet(backend):
        wrapped, notes = _build(model, plan)
        notes += _untie(model)
        for module in model.modules():
            if isinstance(getattr(module, "scaling", None), dict) and _NAME in module.scaling:
                module.scaling[_NAME] *= plan.adapter.scale
        try:
            merged = wrapped.merge_and_unload(safe_merge=True)
        except (ValueError, NotImplementedError, AttributeError, TypeError) as error:
            raise UserError(
                f"peft cannot merge {plan.facts.source} ({plan.facts.kind}) into this variant: {formatting.first_line(error)}",
                "Remove :merged, or merge on bf16.",
            ) from error
    return merged.eval().requires_grad_(False), notes


def _untie(model: Any) -> list[str]:
    """Give each weight that a merge will change a storage of its own, where another module has the same (a head and its
    embedding): unmerged, the adapter leaves the other one as it is."""
    import torch
    from peft.tuners.tuners_utils import BaseTunerLayer

    own_parameters = {"recurse": False, "remove_duplicate": False}
    owners = Counter(id(p) for m in model.modules() for _, p in m.named_parameters(**own_parameters))
    notes = []
    for name, module in model.named_modules():
        base = module.get_base_layer() if isinstance(module, BaseTunerLayer) else None
        for own, weight in list(base.named_parameters(**own_parameters)) if base is not None else ():
            if owners[id(weight)] > 1:
                setattr(base, own, torch.nn.Parameter(weight.detach().clone(), requires_grad=False))
                owners[id(weight)] -= 1
                notes.append(
                    f"{name} was tied and now has its own weight, so that the merge changes nothing else."
                )
    if notes:
        model.config.tie_word_embeddings = False
    return notes


def mark_rows(rows: list[LayerRow], marks: dict[str, Mark]) -> list[LayerRow]:
    """The base's rows with what carries the adapter: wrapped class, rank, dtype and bytes. Names stay the base's."""
    marked, done = [], set()
    for row in rows:
        module = row.name.rpartition(".")[0]
        mark = marks.get(module)
        if mark is None:
            marked.append(row)
            continue
        row = replace(row, module_class=f"{row.module_class} + {mark.kind}")
        if module not in done:  # once a module: its weight, not its bias
            done.add(module)
            row = replace(row, adapter_rank=mark.rank, adapter_dtype=mark.dtype, adapter_bytes=mark.bytes)
        marked.append(row)
    return marked


# ---------------------------------------------------------------- building, with peft


def _build(model: Any, plan: Plan) -> tuple[Any, list[str]]:
    """(the wrapped model, notes): `PeftModel.from_pretrained` in its three steps, without its fourth: it would take accelerate's hooks off a
    model on the CPU and put others on."""
    import peft
    import torch
    from peft import PeftModel
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
    from peft.utils import load_peft_weights, set_peft_model_state_dict

    facts = plan.facts
    if any(p.device.type == "meta" for p in model.parameters()):
        raise UserError(
            "Part of this variant is offloaded, and adapters need all layers on a device.",
            "Raise max_memory, or choose a smaller variant for this adapter.",
        )
    if facts.peft_type not in PEFT_TYPE_TO_CONFIG_MAPPING:
        raise UserError(
            f"peft {peft.__version__} does not know {facts.peft_type} ({facts.source}).",
            "A newer peft may know it.",
        )
    classes = {"CAUSAL_LM": peft.PeftModelForCausalLM}
    torch.manual_seed(0)  # what peft draws is overwritten, but for a few initializations that change the base
    try:
        config, places = peft_config.resolve(facts, model)
        wrapped = classes.get(config.task_type, PeftModel)(model, config, _NAME)
        weights = load_peft_weights(str(facts.files.path), device="cpu")
        weights = {
            peft_config.renamed(n, places): value for n, value in weights.items() if n not in plan.left_out
        }
        result = set_peft_model_state_dict(wrapped, weights, adapter_name=_NAME)
    except UserError:
        raise
    except (ValueError, TypeError, KeyError, NotImplementedError, AttributeError, RuntimeError) as error:
        said = next((line.strip() for line in str(error).splitlines()[1:] if "size mismatch" in line), None)
        raise UserError(
            f"peft cannot put {facts.source} ({facts.kind}) on this variant: {(said or formatting.first_line(error))[:300]}",
            peft_config.trained_on(facts),
        ) from error
    _check_result(wrapped, result, facts)
    if facts.peft_type == "IA3":
        _keep_dtype(wrapped)
    return wrapped.eval().requires_grad_(False), peft_config.notes(wrapped, places, facts, _NAME)


def _keep_dtype(wrapped: Any) -> None:
    """peft's IA³ returns fp32 from quantized layers whatever the input's dtype, and attention refuses keys and values of
    another dtype than the queries': the output of every IA³ layer is cast to its input's dtype."""
    for module in wrapped.modules():
        if hasattr(module, "ia3_l"):
            module.register_forward_hook(lambda _, inputs, output: output.to(inputs[0].dtype))


def _check_result(wrapped: Any, result: Any, facts: Any) -> None:
    """peft passes over tensors that find no place; here that is an adapter that does not fit."""
    unexpected = [k for k in result.unexpected_keys if k not in ("prompt_embeddings",)]
    if unexpected and facts.peft_type not in ("VBLORA", "UNILORA"):
        name = unexpected[0].removeprefix("base_model.model.").replace(f".{_NAME}", "")
        raise UserError(
            f"{facts.source} does not fit this model: the model has no module for its {name}"
            + (f" and {len(unexpected) - 1} more." if len(unexpected) > 1 else "."),
            peft_config.trained_on(facts),
        )
    prefix = getattr(getattr(wrapped, "base_model", None), "prefix", None)
    own = [k for k in result.missing_keys if prefix and prefix in k and _NAME in k]
    if own and facts.peft_type not in ("VBLORA", "TINYLORA", "UNILORA"):
        name = own[0].removeprefix("base_model.model.").replace(f".{_NAME}", "")
        raise UserError(
            f"{facts.source} is incomplete: its config requires {name}, which its file does not contain.",
            "Save or download the adapter again.",
        )


@contextlib.contextmanager
def _quiet(backend: Backend) -> Iterator[None]:
    """No warnings of peft's: what matters a column says in its own words. And no import of gptqmodel where nothing is
    GPTQ: peft asks it about every module, which takes seconds and sets environment variables of the process."""
    with contextlib.ExitStack() as stack:
        if "gptqmodel" not in backend.requires:
            stack.enter_context(compat.without_gptqmodel())
        stack.enter_context(warnings.catch_warnings())
        warnings.simplefilter("ignore")
        yield


# ---------------------------------------------------------------- what peft changed


class _Snapshot:
    """Every module's attributes before peft, to tell afterwards what it changed. Holds no copy of a tensor."""

    def __init__(self, model: Any):
        self.modules = list(model.modules())
        self.objects = [vars(m) for m in self.modules]
        config = getattr(model, "config", None)
        if config is not None:  # layer replication writes the number of layers
            self.objects.append(vars(config))
        self.before: list[tuple[dict, dict]] = []
        for own in self.objects:
            self.before.append((own, dict(own)))
            self.before += [(value, dict(value)) for value in own.values() if isinstance(value, dict)]
        self.storages = {storage_key(t) for t in held_tensors(model)}
        self.tensors = [plain for _, t in _tensors(model) for plain in plain_tensors(t)]
        self.stamps = {name: _stamp(t) for name, t in _tensors(model)}

    def changes(self) -> list[tuple[dict, Any, Any, Any]]:
        found = []
        for place, old in self.before:
            for key in dict.fromkeys((*old, *place)):
                was, now = old.get(key, _ABSENT), place.get(key, _ABSENT)
                if was is not now:
                    found.append((place, key, was, now))
        return found

    def altered(self, model: Any) -> str | None:
        """The first of the base's own tensors that is no longer what it was."""
        now = {id(t): _stamp(t) for _, t in _tensors(model)}
        for name, stamp in self.stamps.items():
            if now.get(stamp[0], stamp) != stamp:
                return name
        return None

    def restore(self) -> None:
        for place, old in self.before:
            if place.keys() != old.keys() or any(place[k] is not v for k, v in old.items()):
                place.clear()
                place.update(old)


def _tensors(model: Any) -> Iterator[tuple[str, Any]]:
    yield from model.named_parameters()
    yield from model.named_buffers()


def _stamp(tensor: Any) -> tuple:
    plain = plain_tensors(tensor)
    return (id(tensor), *((t.data_ptr(), tuple(t.shape), str(t.dtype), version(t)) for t in plain))


def _set(place: dict, key: Any, value: Any) -> None:
    if value is _ABSENT:
        place.pop(key, None)
    else:
        place[key] = value


def _prompt_tensors(peft_model: Any) -> list[Any]:
    encoder = dict(peft_model.named_children()).get("prompt_encoder")
    return [] if encoder is None else [*encoder.parameters(), *encoder.buffers()]


def _marks(model: Any, kind: str, base: set) -> dict[str, Mark]:
    """Module name → what it carries. The outermost wrapper has the name that the base's module had."""
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import AuxiliaryTrainingWrapper

    marks: dict[str, Mark] = {}
    for name, module in model.named_modules():
        if not isinstance(module, (BaseTunerLayer, AuxiliaryTrainingWrapper)):
            continue
        if any(name.startswith(f"{outer}.") for outer in marks):
            continue
        own = {storage_key(t): t for t in held_tensors(module) if storage_key(t) not in base}
        if not own:
            continue
        rank = getattr(module, "r", None)
        rank = rank.get(_NAME) if isinstance(rank, dict) else None
        largest = max(own.values(), key=nbytes)
        title = kind if isinstance(module, BaseTunerLayer) else "own copy"
        marks[name] = Mark(
            kind=title,
            rank=rank if isinstance(rank, int) and rank > 0 else None,
            dtype=short_name(largest.dtype),
            bytes=sum(nbytes(t) for t in own.values()),
        )
    return marks
