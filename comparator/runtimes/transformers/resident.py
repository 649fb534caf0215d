"""One resident transformers model, with the adapters that are attached to it and its decode plans."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from comparator.backends.base import Backend, LoadedModel
from comparator.core.errors import Stopped, UserError
from comparator.core.messages import Generation, Loaded, Prompt
from comparator.core.request import GenerationSettings
from comparator.core.result import LayerRow
from comparator.core.variant import Adapter
from comparator.decoding.generate import Stepper, decoding, interruptible
from comparator.decoding.introspect import input_device
from comparator.decoding.kv_cache import CHUNK, is_quantized
from comparator.runtimes.base import OnToken, ResidentModel
from comparator.runtimes.transformers import devices, weights
from comparator.util.compat.transformers import takes_dynamic_cache

if TYPE_CHECKING:
    from comparator.adapters import Plan
    from comparator.adapters.attach import Fitted
    from comparator.decoding import Decoder
    from comparator.decoding.timed_batch import TimedBatch

ADAPTERS = 8  # that a base keeps attached; the least recently used goes first


@dataclass(kw_only=True, eq=False)
class TransformersModel(ResidentModel):
    """`model` is the torch module. `adapters`: peft's modules around this base, ready to be switched on."""

    backend: Backend
    loaded: LoadedModel
    warmed: set[int] = field(default_factory=set)
    adapters: dict[tuple, Fitted] = field(default_factory=dict)
    _decoder: Decoder | None = None

    @property
    def model(self) -> Any:
        return self.loaded.model

    @property
    def decoder(self) -> Decoder:
        """How this model decodes, with the CUDA graphs that were captured for it."""
        if self._decoder is None:
            from comparator.decoding import Decoder

            self._decoder = Decoder(self.model, self.device)
        return self._decoder

    @property
    def held_bytes(self) -> int:
        attached = sum(a.bytes for a in self.adapters.values())
        return (self.memory.resident_bytes or 0) + attached + (self._decoder.bytes if self._decoder else 0)

    def use(self) -> None:
        devices.work_on(self.device)

    # ------------------------------------------------------------ generating and scoring

    def generate(
        self,
        prompt: Prompt,
        settings: GenerationSettings,
        cancel: threading.Event,
        emit: OnToken,
        adapter: Adapter | None = None,
    ) -> Generation:
        from comparator.runtimes.transformers.run import run_once

        fitted = self.fitted(adapter)
        with self.using(adapter):
            run = run_once(self, prompt, settings, cancel, emit, adapter)
        return replace(run, adapter_switch_s=fitted.switch_s if fitted else None)

    def answer_logits(
        self, prompt_ids: Sequence[int], token_ids: Sequence[int], cancel: threading.Event
    ) -> Generator[Any]:
        import torch

        stepper = Stepper(self.model, list(prompt_ids), len(token_ids))
        with interruptible(self.model, cancel), decoding(self.model) as begin_decoding:
            for step, token in enumerate(token_ids):
                if cancel.is_set():
                    raise Stopped
                # By step: held across a yield, inference mode would leak to whoever asks for the next one.
                with torch.inference_mode():
                    logits = stepper.next_logits()[0]
                    stepper.push(token)
                if step == 0:
                    begin_decoding()
                yield logits

    def answer_many(
        self,
        prompts: Sequence[Sequence[int]],
        settings: GenerationSettings,
        cancel: threading.Event,
        on_logits: Callable[[int, Any], None],
        forced: Sequence[Sequence[int]] | None = None,
    ) -> list[Any] | None:
        from comparator.decoding import batch

        if self.spread or not takes_dynamic_cache(self.model) or is_quantized(self.model):
            return None
        return batch.answer(self.model, prompts, settings, cancel, on_logits, forced)

    def timed_batch(
        self, prompts: Sequence[Sequence[int]], new_tokens: int, cancel: threading.Event
    ) -> TimedBatch:
        import torch

        from comparator.decoding.timed_batch import TimedBatch

        if not takes_dynamic_cache(self.model):
            raise UserError(
                "This architecture keeps its state in its own kind of cache, which cannot be decoded in batches here."
            )
        given = torch.tensor([list(ids) for ids in prompts], device=input_device(self.model))
        return TimedBatch(self.model, given, new_tokens, cancel)

    def window_logits(self, token_ids: Sequence[int], skip: int, cancel: threading.Event) -> Any:
        """In the model's own dtype; through the cache where that is quantized, as a decode reads it."""
        import torch

        if is_quantized(self.model):
            parts = self._chunked(list(token_ids), skip, CHUNK, cancel)
            return torch.cat([logits for _, logits in parts])
        with torch.inference_mode(), interruptible(self.model, cancel):
            inputs = torch.tensor([token_ids], dtype=torch.long, device=input_device(self.model))
            return self.model(input_ids=inputs, use_cache=False, return_dict=True).logits[0, skip:]

    def chunked_logits(
        self, token_ids: Sequence[int], skip: int, chunk: int, cancel: threading.Event
    ) -> Iterator[tuple[slice, Any]] | None:
        """The same mathematics in another order, so what differs is rounding; with LLM.int8 also the outliers, which it
        picks by what is in the batch. None for state-space models, which take one token at a time after the first pass."""
        if not takes_dynamic_cache(self.model) or "mamba" in type(self.model).__name__.lower():
            return None
        return self._chunked(list(token_ids), skip, chunk, cancel)

    def _chunked(
        self, token_ids: list[int], skip: int, chunk: int, cancel: threading.Event
    ) -> Iterator[tuple[slice, Any]]:
        import torch

        feeder = _Feeder(self.model, token_ids)
        with interruptible(self.model, cancel):
            for start in range(0, len(token_ids), chunk):
                end = min(start + chunk, len(token_ids))
                with torch.inference_mode():
                    logits = feeder.feed(end)
                low = max(start, skip)
                if end > low:
                    yield slice(low - skip, end - skip), logits[low - start :]

    # ------------------------------------------------------------ weights

    def weights(self) -> weights.ModelWeights:
        return weights.ModelWeights(self.model, self.backend)

    def replaceable(self, donor: ResidentModel) -> list[str]:
        return weights.replaceable(donor.model, donor.backend, self.model)

    def with_layers_of(
        self, donor: ResidentModel, names: Iterable[str]
    ) -> contextlib.AbstractContextManager[Any]:
        return weights.swapped(self.model, donor.model, names)

    # ------------------------------------------------------------ adapters

    def fitted(self, adapter: Adapter | None) -> Fitted | None:
        """What is attached of an adapter; None without one, and where it is merged."""
        return self.adapters.get(_name(adapter)) if adapter is not None and not adapter.merged else None

    def has(self, adapter: Adapter | None) -> bool:
        return super().has(adapter) or self.fitted(adapter) is not None

    def attach(self, plan: Plan) -> float | None:
        """Raises `UserError`, and `attach.AltersBase` where the base must not be used any more."""
        from comparator.adapters import attach

        known, name = self.fitted(plan.adapter), _name(plan.adapter)
        if plan.adapter.merged or (known is not None and known.plan.key == plan.key):
            return None
        self.adapters.pop(name, None)  # the files have changed since
        while len(self.adapters) >= ADAPTERS:
            self.adapters.pop(min(self.adapters, key=lambda n: self.adapters[n].last_used))
        self.adapters[name] = attach.fit(self.model, self.backend, plan)
        return self.adapters[name].load_s

    @contextlib.contextmanager
    def using(self, adapter: Adapter | None) -> Iterator[None]:
        from comparator.adapters import attach

        with attach.worn(self.fitted(adapter), adapter.scale if adapter else 1.0):
            yield

    def layers(self, adapter: Adapter | None = None) -> tuple[LayerRow, ...]:
        from comparator.adapters import attach

        fitted = self.fitted(adapter)
        return tuple(attach.mark_rows(self.rows, fitted.marks) if fitted else self.rows)

    def describe(self, fresh: bool, plan: Plan | None = None) -> Loaded:
        loaded = super().describe(fresh, plan)
        if plan is None:
            return loaded
        fitted = self.fitted(plan.adapter)
        extra = fitted.bytes if fitted else 0
        memory = replace(
            self.memory, adapter_bytes=extra, resident_bytes=(self.memory.resident_bytes or 0) + extra
        )
        kernel = self.kernel if plan.adapter.merged else f"{self.kernel} + {plan.facts.kind}"
        notes = (*loaded.notes, *(fitted.notes if fitted else ()))
        return replace(loaded, kernel=kernel, memory=memory, notes=notes)


class _Feeder(Stepper):
    """A `Stepper` that is fed several known tokens at a time and gives the logits of all of them."""

    def __init__(self, model: Any, token_ids: list[int]):
        super().__init__(model, token_ids, 0)
        self._extra.pop("logits_to_keep", None)

    def feed(self, end: int) -> Any:
        """(new tokens, vocabulary), in the model's dtype, for the tokens up to `end`."""
        self.length = end
        return self._forward().logits[0]


def _name(adapter: Adapter) -> tuple[str, str | None]:
    return adapter.source.strip(), adapter.revision
