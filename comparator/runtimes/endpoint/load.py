"""Many requests to one server at once, timed: each connection sends one request after another."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from comparator.core.endpoints import Endpoint
from comparator.core.errors import Stopped, UserError
from comparator.core.messages import Prompt
from comparator.core.request import GenerationSettings
from comparator.runtimes.base import RequestTimes, ServerLoad
from comparator.runtimes.endpoint import reading
from comparator.runtimes.endpoint.client import Client
from comparator.runtimes.endpoint.dialect import Dialect
from comparator.runtimes.endpoint.problems import Refused, cut
from comparator.util import streams


@dataclass
class Load(ServerLoad):
    """Prompts are sent in the form that the server takes; what is not token ids is their text."""

    endpoint: Endpoint
    dialect: Dialect
    tokenizer: Any
    cancel: threading.Event
    clients: list[Client] = field(default_factory=list)
    endless: bool = True  # the server takes `ignore_eos`: no token ends an answer

    def open(self, at_once: int) -> None:
        self.clients += [Client(self.endpoint) for _ in range(at_once - len(self.clients))]
        if self.dialect.extras:
            self._try_endless()
        # The connections are opened before anything is timed.
        streams.at_once([lambda c=c: c.round_trip_s(self.cancel) for c in self.clients], self.cancel)

    def run(self, prompts: Sequence[Sequence[int]], new_tokens: int) -> list[RequestTimes]:
        bodies: queue.SimpleQueue = queue.SimpleQueue()
        for ids in prompts:  # made before the first is sent: writing them takes time from reading answers
            bodies.put(self._body(ids, new_tokens))
        times: list[RequestTimes] = []

        def work(client: Client) -> None:
            while not self.cancel.is_set():
                try:
                    body = bodies.get_nowait()
                except queue.Empty:
                    return
                times.append(self._timed(client, body))

        streams.at_once([lambda c=c: work(c) for c in self.clients], self.cancel)
        if self.cancel.is_set():
            raise Stopped
        return times

    def __exit__(self, *_: Any) -> None:
        for client in self.clients:
            client.close()

    def _body(self, ids: Sequence[int], new_tokens: int) -> dict[str, Any]:
        text = (
            ""
            if self.dialect.form == "ids"
            else self.tokenizer.decode(list(ids), clean_up_tokenization_spaces=False)
        )
        prompt = Prompt(tuple(ids), False, text=text, messages=(("user", text),))
        body = self.dialect.body(prompt, GenerationSettings(max_new_tokens=new_tokens))
        return body | ({"ignore_eos": True} if self.endless and self.dialect.extras else {})

    def _try_endless(self) -> None:
        body = self._body(self.tokenizer("Hello")["input_ids"], 1)
        body.pop("stream_options", None)
        try:
            self.clients[0].ask(body, self.cancel)
        except Refused:
            self.endless = False

    def _timed(self, client: Client, body: dict[str, Any]) -> RequestTimes:
        start_s, times, tokens, prompt_tokens, finish = time.perf_counter(), [], 0, None, None
        counted = None
        try:
            for at_s, piece in client.stream(body, self.cancel):
                if not piece:
                    start_s = at_s
                    continue
                choice = reading.choice_of(piece)
                finish = reading.finish_of(choice) or finish
                prompt_tokens = reading.prompt_tokens(piece) or prompt_tokens
                counted = reading.answer_tokens(piece) or counted
                ids = reading.ids_of(choice)
                if ids or reading.text_of(choice):
                    times.append(at_s)
                    tokens += max(1, len(ids))
        except UserError as problem:
            return RequestTimes(start_s, tuple(times), tokens, error=problem.problem)
        error = None if times and finish else cut(self.endpoint).problem
        return RequestTimes(start_s, tuple(times), counted or tokens, prompt_tokens, error)
