"""One resident GGUF file: what the engine asks of it, answered by its llama.cpp process."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from comparator.backends.gguf import write
from comparator.core.errors import Stopped
from comparator.core.messages import Generation, Loaded, Prompt
from comparator.core.request import GenerationSettings
from comparator.core.variant import Adapter
from comparator.decoding.sampling import overflowed
from comparator.metrics import energy, environment, interference, latency
from comparator.runtimes.base import OnToken, ResidentModel
from comparator.runtimes.llama_cpp import rows
from comparator.runtimes.llama_cpp.child import Child
from comparator.runtimes.llama_cpp.chooser import Rules
from comparator.runtimes.llama_cpp.weights import FileWeights
from comparator.runtimes.llama_cpp.worker import MOST_BATCH
from comparator.sources.gguf_header import GgufHeader
from comparator.sources.tokenizer import load_tokenizer

if TYPE_CHECKING:
    from comparator.adapters import Plan


@dataclass
class _Kept:
    """Called with each token and when it was chosen."""

    tokens: list[int]
    times: list[float]
    emit: OnToken

    def __call__(self, token: int, at_s: float) -> None:
        self.tokens.append(token)
        self.times.append(at_s)
        self.emit((token, at_s))


@dataclass(kw_only=True, eq=False)
class LlamaCppModel(ResidentModel):
    """`vocabulary` is the checkpoint's, to which wider logits of the file are cut."""

    file: Path
    gpu: int | None
    threads: int
    cache: str  # type of keys and values; "": llama.cpp's own
    child: Child
    rules: Rules
    header: GgufHeader
    elsewhere: bool = False  # this build of llama.cpp cannot use the GPU that the column was to be on
    buffers: dict[str, int] = field(default_factory=dict)  # of the current context, by kind
    _tokenizer: Any = None

    def use(self) -> None:
        """A process that has ended is started again."""
        if not self.child.alive:
            self.child.close()
            self.child = Child(self.variant.notation)
            self.child.open(self.file, self.gpu, self.threads, lambda: None, self.cache)
            self.buffers = {}

    def unload(self) -> None:
        self.child.close()

    @property
    def held_bytes(self) -> int:
        return super().held_bytes if self.child.alive else 0

    # ------------------------------------------------------------ generating

    def generate(
        self,
        prompt: Prompt,
        settings: GenerationSettings,
        cancel: threading.Event,
        emit: OnToken,
        adapter: Adapter | None = None,
    ) -> Generation:
        ids = list(prompt.token_ids)
        prepare_s = self._prepare(ids, settings.max_new_tokens, cancel)
        choose = self.rules.chooser(settings, len(ids))
        tokens: list[int] = []
        times: list[float] = []
        # With nothing between logits and argmax the child need not wait for this process.
        greedy = settings.temperature <= 0 and not choose.processors
        decode = self._greedy if greedy else self._chosen
        self.child.ask("watch_peak")
        watched = interference.watch(self.device, self.child.pid)
        with energy.metered(self.device) as used, watched as seen:
            start_s = time.perf_counter()
            reason = decode(ids, settings.max_new_tokens, choose, cancel, _Kept(tokens, times, emit))
        risen = self.child.ask("risen_bytes")
        return Generation(
            token_ids=tuple(tokens),
            finish_reason=reason,
            latency=latency.from_timestamps(start_s, times, len(ids), seen.found),
            prepare_s=prepare_s,
            run_peak_bytes=None if self.gpu is not None else self.held_bytes + (risen or 0),  # of main memory
            kv_cache_bytes=self.buffers.get("KV"),
            decode_path="llama.cpp",
            joules_per_token=used.per_token(times),
            notes=self._tokenizer_note(ids),
        )

    def _greedy(self, ids: list[int], count: int, choose: Any, cancel: threading.Event, keep: _Kept) -> str:
        """Keep each token that the child chooses; returns why it ended."""
        steps = self.child.greedy(ids, count, self.rules.ends, self.vocabulary, cancel)
        with contextlib.closing(steps):
            try:
                while True:
                    keep(*next(steps))
            except StopIteration as end:
                if end.value == "overflowed":
                    raise overflowed(len(keep.tokens)) from None
                return end.value

    def _chosen(self, ids: list[int], count: int, choose: Any, cancel: threading.Event, keep: _Kept) -> str:
        """Choose each token from its logits here; returns why it ended."""
        import torch

        history = torch.tensor([ids + [0] * count])
        try:
            for step, logits in enumerate(self._steps(ids, keep.tokens, count, cancel)):
                at = len(ids) + step
                token = choose(history[:, :at], torch.from_numpy(logits), step)
                history[0, at] = token
                keep(token, time.perf_counter())
                if token in self.rules.ends:
                    return "eos"
                if cancel.is_set():
                    return "stopped"
        except Stopped:
            return "stopped"
        return "length"

    def _steps(
        self, ids: list[int], tokens: Sequence[int], count: int, cancel: threading.Event
    ) -> Iterator[np.ndarray]:
        """Logits (1, vocabulary) after the prompt, and after each of `tokens`, which may grow meanwhile; `count` in all."""
        for start in range(0, len(ids), MOST_BATCH):
            self.child.feed(ids[start : start + MOST_BATCH], cancel)
        for step in range(count):
            yield self.child.last_logits[:, : self.vocabulary]
            if step + 1 < count:
                self.child.feed(tokens[step : step + 1], cancel)

    def _prepare(self, ids: list[int], count: int, cancel: threading.Event) -> float:
        """A context of the right size, its memory touched by one short pass. Seconds."""
        start_s = time.perf_counter()
        if self._use(len(ids) + count, 1):
            try:
                self.child.feed(ids[:MOST_BATCH][:64], cancel)
            except Stopped:
                pass
            self._use(len(ids) + count, 1)
        return time.perf_counter() - start_s

    def _use(self, tokens: int, rows: int) -> bool:
        """An empty context; returns whether it was made again."""
        before, self.buffers = self.buffers, self.child.ask("use", tokens, rows)
        return before != self.buffers

    def _tokenizer_note(self, ids: list[int]) -> tuple[str, ...]:
        """Where llama.cpp would read the prompt's text as other tokens than those that every column gets."""
        if self._tokenizer is None:
            self._tokenizer = load_tokenizer(self.checkpoint)
        text = self._tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        theirs = self.child.ask("tokenize", text)
        if theirs is None or theirs == ids:
            return ()
        at = next((i for i, (a, b) in enumerate(zip(ids, theirs, strict=False)) if a != b), len(ids))
        return (
            f"llama.cpp's own tokenizer reads this prompt as {len(theirs):,} tokens, which differ from position {at + 1:,} "
            f"on. It was given the {len(ids):,} tokens of the model's tokenizer, like every variant.",
        )

    def weights(self) -> FileWeights | None:
        """None for a family whose tensors are not known to be the checkpoint's in another order."""
        if self.header.architecture not in write.TURNED:
            return None
        names = rows.names_of(self.header, self.checkpoint)
        return FileWeights(self.file, self.header, names, self.checkpoint)

    def describe(self, fresh: bool, plan: Plan | None = None) -> Loaded:
        """With the environment of the CPU where the other columns are on a GPU."""
        loaded = super().describe(fresh, plan)
        return replace(loaded, environment=environment.read(self.device)) if self.elsewhere else loaded

    # ------------------------------------------------------------ logits

    def answer_logits(
        self, prompt_ids: Sequence[int], token_ids: Sequence[int], cancel: threading.Event
    ) -> Generator[Any]:
        self._use(len(prompt_ids) + len(token_ids), 1)
        for logits in self._steps(list(prompt_ids), token_ids, len(token_ids), cancel):
            if cancel.is_set():
                raise Stopped
            yield logits[0].copy()

    def window_logits(self, token_ids: Sequence[int], skip: int, cancel: threading.Event) -> Any:
        """In passes of `MOST_BATCH` tokens, llama.cpp's physical batch."""
        logits = np.empty((len(token_ids) - skip, self.vocabulary), np.float32)
        for place, part in self.chunked_logits(token_ids, skip, MOST_BATCH, cancel):
            logits[place] = part
        return logits

    def chunked_logits(
        self, token_ids: Sequence[int], skip: int, chunk: int, cancel: threading.Event
    ) -> Iterator[tuple[slice, Any]]:
        self._use(len(token_ids), MOST_BATCH)
        chunk = min(chunk, MOST_BATCH)
        for start in range(0, len(token_ids), chunk):
            piece = token_ids[start : start + chunk]
            end, low = start + len(piece), max(start, skip)
            if end <= skip:
                self.child.feed(piece, cancel)
                continue
            self.child.feed(piece, cancel, every=True)
            part = np.empty((end - low, self.child.vocabulary), np.float32)
            self.child.copy_logits(part, low - start)
            yield slice(low - skip, end - skip), part[:, : self.vocabulary]
