"""Requests of the harness → one column's answers.

The harness's own class for transformers models does the work (tokens, windows, stop sequences, sums of log-probabilities),
around the resident column in place of a torch model, so a column scores what `lm_eval` scores on the same weights.
"""

from __future__ import annotations

import copy
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from comparator.core.errors import Stopped, UserError
from comparator.core.messages import Prompt
from comparator.core.request import GenerationSettings
from comparator.engine.protocol import OnProgress, Task, TaskContext
from comparator.fidelity.tasks import ColumnRef
from comparator.util.recent import Recent

if TYPE_CHECKING:
    from comparator.runtimes import ResidentModel

Answer = Any  # (log-probability, whether greedy), a sum of log-probabilities, or a text
_SAMPLING = ("temperature", "top_p", "top_k", "repetition_penalty")
_IGNORED = ("attention_mask", "pad_token_id", "use_cache", "do_sample")
_ready: Recent[str, Any] = Recent(2)  # a tokenizer's copy and a config each, by the model's folder


@dataclass(frozen=True)
class AnswerRequests(Task):
    """`kind`: the method of `lm_eval.api.model.LM`; `arguments`: of each request. Gives a tuple of answers."""

    column: ColumnRef
    kind: str
    arguments: tuple[tuple[Any, ...], ...]

    @property
    def runs_on(self) -> str:
        return self.column.handle

    def run(
        self, context: TaskContext, cancel: threading.Event, on_progress: OnProgress
    ) -> tuple[Answer, ...]:
        from lm_eval.api.instance import Instance

        requests = [Instance(self.kind, {}, arguments, 0) for arguments in self.arguments]
        with context.column(self.column.handle, self.column.adapter) as column:  # attaches the adapter
            model = _ready.get(str(column.checkpoint.path))
            if model is None:
                tokenizer = copy.deepcopy(context.tokenizer(column))  # the harness gives it a padding token
                model = _ready.put(str(column.checkpoint.path), _harness_model(column, tokenizer))
            if self.kind != "generate_until":
                with model.model.at(column, self.column, cancel):
                    return tuple(getattr(model, self.kind)(requests, disable_tqdm=True))
        with model.model.at(column, self.column, cancel):
            return tuple(model.generate_until(requests, disable_tqdm=True))


def _harness_model(column: ResidentModel, tokenizer: Any) -> Any:
    import logging

    from lm_eval.models.huggingface import HFLM
    from transformers import AutoConfig

    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    config = AutoConfig.from_pretrained(column.checkpoint.path)
    return HFLM(_ColumnModel(config), backend="causal", tokenizer=tokenizer, batch_size=1)


class _ColumnModel:
    """What the harness calls of a transformers model: `model(ids).logits` and `model.generate`."""

    def __init__(self, config: Any):
        import torch

        self.config, self.device = config, torch.device("cpu")
        self._column: ResidentModel | None = None

    @contextmanager
    def at(self, column: ResidentModel, ref: ColumnRef, cancel: threading.Event) -> Iterator[None]:
        self._column, self._ref, self._cancel, self._seed = column, ref, cancel, 0
        try:
            yield
        finally:
            self._column = None  # else it would outlive its unloading

    def __call__(self, ids: Any) -> Any:
        """`ids` (1, tokens) → logits (1, tokens, vocabulary), in the model's dtype where it is a torch model."""
        import torch

        assert self._column is not None
        logits = torch.as_tensor(self._column.window_logits(ids[0].tolist(), 0, self._cancel))
        return SimpleNamespace(logits=logits.to("cpu").unsqueeze(0))

    def generate(self, input_ids: Any, max_length: int, stopping_criteria: Any, **settings: Any) -> Any:
        """`input_ids` (1, tokens) → the same with the new tokens. Raises `UserError` for settings that are unknown here."""
        import torch

        assert self._column is not None
        if unknown := set(settings) - {*_SAMPLING, *_IGNORED}:
            raise UserError(
                f"The task decodes with {', '.join(sorted(unknown))}.", "That is not offered here."
            )
        sampling = {k: settings[k] for k in _SAMPLING if settings.get(k) is not None}
        if not settings.get("do_sample"):
            sampling["temperature"] = 0.0
        prompt = input_ids[0].tolist()
        ids, enough = list(prompt), _Linked(self._cancel)

        def take(step: tuple[int, float]) -> None:
            if enough.is_set():
                return
            ids.append(step[0])
            whole = torch.tensor([ids])
            if any(stop(whole, None) for stop in stopping_criteria):
                enough.set()

        wanted = GenerationSettings(max_new_tokens=max_length - len(prompt), seed=self._seed, **sampling)
        self._seed += 1  # several answers to one request differ
        self._column.generate(Prompt(tuple(prompt), False), wanted, enough, take, self._ref.adapter)
        if self._cancel.is_set():
            raise Stopped
        return torch.tensor([ids])


class _Linked(threading.Event):
    """Set where another event is, too."""

    def __init__(self, other: threading.Event):
        super().__init__()
        self._other = other

    def is_set(self) -> bool:
        return super().is_set() or self._other.is_set()
