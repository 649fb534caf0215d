"""One decode step, recorded once and replayed per token, with the host one step behind the device.

While the host waits for token n, the step for token n + 1 is already queued: its input is the token that the device
itself chose. On a CPU the "recording" just calls the step, which is how the logic is tested without a GPU.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from typing import Any

from comparator.decode.fixed import Fixed
from comparator.generate import Chooser, Stepper, gumbel, overflowed
from comparator.types import GenerationSettings

_SLOTS = 4  # tokens on their way to the host; two would do


class Recorded:
    """A recorded step on `fixed`. `greedy`: the choice of the token is part of the recording.

    `path` is what the document calls it; `inside` opens what the step is run in.
    """

    def __init__(
        self,
        fixed: Fixed,
        path: str,
        greedy: bool,
        step: Callable[[], Any] | None = None,
        inside: Callable[[], Any] = contextlib.nullcontext,
    ):
        self.fixed, self.path, self.greedy, self.inside = fixed, path, greedy, inside
        self.forward = step or fixed.forward
        self.replay: Callable[[], None] = self.step
        self.kept: list[Any] = []  # what must live as long as the recording
        self.notes: tuple[str, ...] = ()  # what of the step is not the library's own
        self.graph_bytes = 0  # intermediates and workspaces that the graph holds between replays
        self._cuda = fixed.device.type == "cuda"

    def step(self) -> None:
        with self.inside():
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
        # cuBLAS takes its workspace from the graph's own memory when it has none yet, and must: one taken before
        # would go with the next unloading while the graph still points to it.
        torch._C._cuda_clearCublasWorkspaces()
        torch.cuda.empty_cache()
        before = torch.cuda.memory_reserved(self.fixed.device)
        # Other threads (the page asking for free memory, say) may go on using CUDA meanwhile.
        # torch keeps one stream to capture on, of the GPU that came first; a step on another one needs its own.
        stream = torch.cuda.Stream(self.fixed.device)
        with torch.cuda.graph(graph, pool=pool, stream=stream, capture_error_mode="thread_local"):
            self.step()
        torch._C._cuda_clearCublasWorkspaces()
        torch.cuda.empty_cache()
        self.graph_bytes = max(0, torch.cuda.memory_reserved(self.fixed.device) - before)
        self.replay = graph.replay
        self.kept.append(graph)

    def tokens(
        self, stepper: Stepper, choose: Chooser, settings: GenerationSettings
    ) -> Iterator[tuple[int, float]]:
        """(token id, `perf_counter` when it reached the host), at most `max_new_tokens`. The prompt goes through
        the model eagerly, in one forward, exactly as on the eager path."""
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
        line = Line(self, stepper, choose, settings)
        line.launch(1)
        yield token, first_s
        for step in range(1, count):
            if step + 1 < count:
                line.launch(step + 1)
            yield line.read(step), time.perf_counter()


class Line:
    """Steps on their way: launched ahead, read in order. Without `stepper` and `choose` what is recorded chooses."""

    def __init__(
        self,
        recorded: Recorded,
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
            # Drawn while the device is busy with the step before; its slot was read three steps ago.
            self.noise[slot].numpy()[:] = gumbel(self.settings.seed, step, self.noise[slot].shape[-1])
            noise = self.noise[slot].to(self.fixed.device, non_blocking=True)
        self.recorded.replay()
        if not self.recorded.greedy:
            self.fixed.choose(self.choose.scores(self.stepper.ids, self.fixed.logits, noise))
        if self.choose is not None and self.choose.processors:
            self.stepper.push_from(self.fixed.token)  # what a repetition penalty looks at, on the device
        self.host[slot].copy_(self.fixed.chosen, non_blocking=True)
        if self.events:
            self.events[slot].record()

    def read(self, step: int) -> int:
        """The token of that step, of the first sequence."""
        return self.read_all(step)[0]

    def read_all(self, step: int) -> list[int]:
        """One token a sequence. Waits for the device."""
        slot = step % _SLOTS
        if self.events:
            self.events[slot].synchronize()
        tokens = self.host[slot].tolist()
        if min(tokens) < 0:
            raise overflowed(step)
        return tokens
