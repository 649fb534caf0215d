"""One decode step, captured once and replayed per token, with the host one step behind the device.

While the host waits for token n, the step for token n + 1 is already queued: its input is the token that the device
chose. On a CPU replaying just calls the step, which tests the logic without a GPU.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from typing import Any

from comparator.core.request import GenerationSettings
from comparator.decoding.generate import Stepper
from comparator.decoding.sampling import Chooser, gumbel, overflowed
from comparator.decoding.static_state import StaticDecodeState
from comparator.util.compat.torch import clear_cublas_workspaces

_SLOTS = 4  # tokens on their way to the host; two would do


class CapturedStep:
    """A captured decode step on `fixed`. `greedy`: the choice of the token is part of the graph.

    `path`: its name in the document; `context`: makes the context manager in which the step runs.
    """

    def __init__(
        self,
        fixed: StaticDecodeState,
        path: str,
        greedy: bool,
        step: Callable[[], Any] | None = None,
        context: Callable[[], Any] = contextlib.nullcontext,
    ):
        self.fixed, self.path, self.greedy, self.context = fixed, path, greedy, context
        self.forward = step or fixed.forward
        self.replay: Callable[[], None] = self.step
        self.keep_alive: list[Any] = []  # objects that must live as long as the captured step
        self.notes: tuple[str, ...] = ()  # parts of the step that are not the library's own
        self.graph_bytes = 0  # intermediates and workspaces that the graph holds between replays
        self._cuda = fixed.device.type == "cuda"

    def step(self) -> None:
        with self.context():
            self.fixed.logits.copy_(self.forward())
        if self.greedy:
            self.fixed.choose(self.fixed.logits)
        self.fixed.position.add_(1)

    def record(self, pool: Any = None) -> None:
        """Capture the step. The caller has filled `fixed` and run the step at least twice."""
        import torch

        if not self._cuda:
            return
        graph = torch.cuda.CUDAGraph()
        # cuBLAS must allocate its workspace in the graph's own memory: one allocated before would be freed at the next
        # unload while the graph still points to it.
        clear_cublas_workspaces()
        torch.cuda.empty_cache()
        before = torch.cuda.memory_reserved(self.fixed.device)
        # "thread_local": other threads may use CUDA meanwhile (the page reads the free memory). torch's default stream
        # for captures belongs to the GPU that captured first; a step on another one needs its own.
        stream = torch.cuda.Stream(self.fixed.device)
        with torch.cuda.graph(graph, pool=pool, stream=stream, capture_error_mode="thread_local"):
            self.step()
        clear_cublas_workspaces()
        torch.cuda.empty_cache()
        self.graph_bytes = max(0, torch.cuda.memory_reserved(self.fixed.device) - before)
        self.replay = graph.replay
        self.keep_alive.append(graph)

    def tokens(
        self, stepper: Stepper, choose: Chooser, settings: GenerationSettings
    ) -> Iterator[tuple[int, float]]:
        """(token id, `perf_counter` when it reached the host), at most `max_new_tokens`. The prefill is one eager
        forward pass, as on the eager path."""
        count = settings.max_new_tokens
        logits = stepper.next_logits()
        token = choose(stepper.ids, logits, 0)
        first_s = time.perf_counter()
        if count == 1:
            yield token, first_s
            return
        self.fixed.fill(stepper.cache, stepper.length, token, logits.shape[-1])
        stepper.push(token)
        stepper.release()
        line = DecodePipeline(self, stepper, choose, settings)
        line.launch(1)
        yield token, first_s
        for step in range(1, count):
            if step + 1 < count:
                line.launch(step + 1)
            yield line.read(step), time.perf_counter()


class DecodePipeline:
    """Steps that are launched ahead and read in order. Without `stepper` and `choose` the graph chooses the tokens."""

    def __init__(
        self,
        recorded: CapturedStep,
        stepper: Stepper | None = None,
        choose: Chooser | None = None,
        settings: GenerationSettings | None = None,
    ):
        import torch

        self.recorded, self.fixed = recorded, recorded.fixed
        self.stepper, self.choose, self.settings = stepper, choose, settings
        cuda = self.fixed.device.type == "cuda"
        self.host = torch.zeros((_SLOTS, self.fixed.batch), dtype=torch.long, pin_memory=cuda)
        self.events = [torch.cuda.Event() for _ in range(_SLOTS)] if cuda else None
        self.noise: list[Any] = []
        if choose is not None and settings.temperature > 0:
            size = self.fixed.logits.shape[-1]
            self.noise = [torch.zeros(size, pin_memory=cuda) for _ in range(_SLOTS)]

    def launch(self, step: int) -> None:
        slot = step % _SLOTS
        noise = None
        if self.noise:
            # Drawn while the device runs the previous step; its slot was read three steps ago.
            self.noise[slot].numpy()[:] = gumbel(self.settings.seed, step, self.noise[slot].shape[-1])
            noise = self.noise[slot].to(self.fixed.device, non_blocking=True)
        self.recorded.replay()
        if not self.recorded.greedy:
            self.fixed.choose(self.choose.scores(self.stepper.ids, self.fixed.logits, noise))
        if self.choose is not None and self.choose.processors:
            self.stepper.push_from(self.fixed.token)  # for a repetition penalty, on the device
        self.host[slot].copy_(self.fixed.chosen, non_blocking=True)
        if self.events:
            self.events[slot].record()

    def read(self, step: int) -> int:
        """The first sequence's token of a step."""
        return self.read_all(step)[0]

    def read_all(self, step: int) -> list[int]:
        """The step's tokens, one per sequence. Waits for the device."""
        slot = step % _SLOTS
        if self.events:
            self.events[slot].synchronize()
        tokens = self.host[slot].tolist()
        if min(tokens) < 0:
            raise overflowed(step)
        return tokens
