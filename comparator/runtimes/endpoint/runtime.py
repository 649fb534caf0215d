"""Making a server a column: connect, find out what it understands, and answer through it."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Generator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from comparator.backends.base import Placement, Progress
from comparator.core.endpoints import find_endpoint
from comparator.core.errors import Stopped, UserError
from comparator.core.messages import Generation, Loaded, Prompt
from comparator.core.request import GenerationSettings
from comparator.core.result import Environment
from comparator.core.settings import get_settings
from comparator.core.variant import Adapter, Variant
from comparator.metrics import latency
from comparator.runtimes.base import Choices, OnToken, ResidentModel, Runtime, ServerLoad
from comparator.runtimes.endpoint import dialect as dialects
from comparator.runtimes.endpoint.problems import Refused, named
from comparator.runtimes.endpoint.reading import Answer, Vocabulary, choice_of
from comparator.sources.tokenizer import load_tokenizer

if TYPE_CHECKING:
    from comparator.adapters import Plan
    from comparator.runtimes.endpoint.client import Client
    from comparator.sources import Checkpoint

TOP = (20, 5, 1)  # log-probabilities to ask for: what vLLM gives, what OpenAI gives, the chosen token's own
SAMPLING = "Sampled with the server's own random numbers, not with those that the other variants share."
REENCODED = (
    "The server returns no token ids: its text was tokenized with the comparison's model, which may split it differently "
    "from the server."
)


class EndpointRuntime(Runtime):
    name = "endpoint"
    absent = {
        **Runtime.absent,
        "adapters": "the server loads its own",
        "max_memory": "the server places its model",
        "memory": "a server does not report it",
        "layers": "a server does not report them",
        "full logits": "a server returns only the most likely tokens",
    }

    def load(
        self,
        checkpoint: Checkpoint,
        variant: Variant,
        placement: Placement,
        progress: Progress,
        residents: Sequence[ResidentModel] = (),
        plan: Plan | None = None,
    ) -> ResidentModel:
        from comparator.runtimes.endpoint.client import Client

        progress(None, "asking the server")
        endpoint, start_s = find_endpoint(variant.source or "", get_settings().endpoints), time.perf_counter()
        tokenizer = load_tokenizer(checkpoint)
        client, cancel = Client(endpoint), _Cancel(progress)
        try:
            entries = dialects.listed(client, cancel)
            model = dialects.model_of(client, entries)
            dialect = dialects.find(client, model, tokenizer, cancel)
            facts = dialects.ask_about(client, model, entries, cancel)
        except BaseException:
            client.close()
            raise
        says = ", ".join([f"model {_short(model)}", *facts.details])
        return EndpointModel(
            runtime=self,
            checkpoint=checkpoint,
            variant=variant,
            device="server",
            kernel=facts.title,
            vocabulary=checkpoint.vocab_size or len(tokenizer),
            prepare_s=time.perf_counter() - start_s,
            notes=[f"Computed by {facts.title}, which reports: {says}.", dialects.NOTES[dialect.form]],
            client=client,
            tokenizer=tokenizer,
            dialect=dialect,
            facts=facts,
            entries=entries,
        )


class _Cancel(threading.Event):
    """Set as soon as reporting progress raises, which it does at Stop."""

    def __init__(self, progress: Progress):
        super().__init__()
        self._progress = progress

    def is_set(self) -> bool:
        try:
            self._progress(None, "asking the server")
        except Stopped:
            self.set()
        return super().is_set()


class EndpointModel(ResidentModel):
    """A connection to one model of one server."""

    def __init__(
        self,
        *,
        client: Client,
        tokenizer: Any,
        dialect: dialects.Dialect,
        facts: dialects.Facts,
        entries: list[dict[str, Any]],
        **fields: Any,
    ):
        super().__init__(**fields)
        self.client, self.tokenizer, self.dialect, self.facts = client, tokenizer, dialect, facts
        self._known, self._served = Vocabulary(tokenizer), dialects.served(entries)

    def generate(
        self,
        prompt: Prompt,
        settings: GenerationSettings,
        cancel: threading.Event,
        emit: OnToken,
        adapter: Adapter | None = None,
    ) -> Generation:
        body, answer = self.dialect.body(prompt, settings), Answer(self.tokenizer)
        with contextlib.suppress(Stopped):
            away_s = self.client.round_trip_s(cancel)
            for at_s, piece in self.client.stream(body, cancel):
                for token in answer.add(at_s, piece):
                    emit(token)
        if not cancel.is_set():
            answer.require_end(self.client.endpoint)
        figures = latency.from_timestamps(answer.start_s, answer.times_s, len(prompt.token_ids))
        return Generation(
            token_ids=tuple(answer.ids),
            finish_reason=answer.finish or "stopped",
            latency=latency.record(figures, round_trip_s=away_s) if answer.times_s else figures,
            decode_path=f"server, {dialects.WORDS[self.dialect.form]}",
            notes=tuple(_notes(answer, prompt, settings)),
            text="" if answer.given and prompt.token_ids else answer.text,
        )

    def answer_choices(
        self, prompt: Prompt, token_ids: Sequence[int], cancel: threading.Event
    ) -> Generator[Choices]:
        steps = self._forced if self.dialect.form == "ids" else self._unforced
        return steps(prompt, list(token_ids), cancel)

    def _forced(self, prompt: Prompt, token_ids: list[int], cancel: threading.Event) -> Generator[Choices]:
        """One request for a token after each beginning of the answer; the server reuses what it computed before."""
        top = None
        for step in range(len(token_ids)):
            longer = replace(prompt, token_ids=(*prompt.token_ids, *token_ids[:step]))
            body = self.dialect.body(longer, GenerationSettings(max_new_tokens=1), fresh=False)
            body.pop("stream_options", None)
            top = self._top(body, cancel) if top is None else top
            answer = self.client.ask(body | ({"logprobs": top} if top else {}), cancel)
            yield self._first(choice_of(answer))

    def _top(self, body: dict[str, Any], cancel: threading.Event) -> int:
        """How many log-probabilities the server gives; 0 for none."""
        for count in TOP:
            with contextlib.suppress(Refused):
                choice = choice_of(self.client.ask({**body, **self._logprobs(count)}, cancel))
                known = [c for c in self._known.choices(choice) if c is not None and c.log_p]
                return count if known else 0
        return 0

    def _logprobs(self, count: int) -> dict[str, Any]:
        if not count:
            return {}
        return (
            {"logprobs": True, "top_logprobs": count} if self.dialect.form == "chat" else {"logprobs": count}
        )

    def _first(self, choice: dict[str, Any]) -> Choices:
        """What was put first in an answer of one token."""
        answer = Answer(self.tokenizer)
        answer.add(0.0, {"choices": [choice]})
        known = [c for c in self._known.choices(choice) if c is not None]
        if known:
            return known[0]
        if not answer.given and (token := self._known.id_of({"token": answer.text})) is not None:
            return Choices(token)
        if not answer.ids:
            raise UserError(
                f"{named(self.client.endpoint)} returned no token to continue a part of the answer."
            )
        return Choices(answer.ids[0])

    def _unforced(self, prompt: Prompt, token_ids: list[int], cancel: threading.Event) -> Generator[Choices]:
        """Its own greedy answer, up to where it differs: only there are both after the same text."""
        body = self.dialect.body(prompt, GenerationSettings(max_new_tokens=len(token_ids)))
        body.pop("stream_options", None)
        top = self._top({**body, "max_tokens": 1}, cancel)
        choice = choice_of(self.client.ask(body | self._logprobs(top), cancel))
        answer = Answer(self.tokenizer)
        answer.add(0.0, {"choices": [choice]})
        known = self._known.choices(choice) if top else []
        for step, token in enumerate(token_ids):
            if cancel.is_set():
                raise Stopped
            if step < len(known) and known[step] is not None:
                first = known[step]
            elif not top and step < len(answer.ids):
                first = Choices(answer.ids[step])
            else:
                return
            yield first
            if first.first != token:
                return

    def server_load(self, cancel: threading.Event) -> ServerLoad:
        from comparator.runtimes.endpoint.load import Load

        return Load(self.client.endpoint, self.dialect, self.tokenizer, cancel)

    def is_current(self) -> bool:
        """Whether the server has the same models as when it was asked."""
        try:
            return dialects.served(dialects.listed(self.client, threading.Event())) == self._served
        except UserError:
            return False

    def unload(self) -> None:
        self.client.close()

    def describe(self, fresh: bool, plan: Plan | None = None) -> Loaded:
        """Where it ran is the server's affair: not this machine, as far as is known."""
        where = Environment(device=f"{self.facts.title} at {_where(self.variant)}")
        return replace(super().describe(fresh, plan), environment=where)


def _where(variant: Variant) -> str:
    return f"endpoint@{variant.source}"


def _short(model: str) -> str:
    """A model's id without the folders of the server's machine."""
    return model.rpartition("/")[2] if model.startswith("/") or "\\" in model else model[:100]


def _notes(answer: Answer, prompt: Prompt, settings: GenerationSettings) -> list[str]:
    notes = []
    if not answer.given and answer.ids:
        notes.append(REENCODED)
    if settings.temperature > 0:
        notes.append(SAMPLING)
    if answer.prompt_tokens and answer.prompt_tokens != len(prompt.token_ids):
        notes.append(
            f"The server counted {answer.prompt_tokens} tokens in the prompt, which has {len(prompt.token_ids)} here: it is not "
            "quite the prompt of the other columns."
        )
    if answer.cached:
        notes.append(
            f"The server had {answer.cached} tokens of the prompt from an earlier request, so its TTFT is shorter than "
            "for a new prompt."
        )
    if answer.pieces and len(answer.ids) > 1.2 * answer.pieces + 1:
        notes.append(
            f"The {len(answer.ids)} tokens came in {answer.pieces} pieces: inter-token latencies are the times between "
            "pieces."
        )
    return notes
