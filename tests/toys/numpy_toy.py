"""A method and a runtime without torch, in one file: what a new runtime needs at the least.

A bigram model of random numbers: the logits after a token are a row of E times O, whatever came before.
"""

from __future__ import annotations

import time

import numpy as np

from comparator.backends.base import Backend, Method, TensorSize
from comparator.core.errors import Stopped
from comparator.core.messages import Generation
from comparator.core.result import Memory
from comparator.metrics import latency
from comparator.runtimes.base import ResidentModel, Runtime

RANK = 4


def matrices(vocabulary: int) -> tuple[np.ndarray, np.ndarray]:
    """E (vocabulary, RANK) and O (RANK, vocabulary) in float32."""
    random = np.random.default_rng(7)
    return (
        random.standard_normal((vocabulary, RANK), dtype=np.float32),
        random.standard_normal((RANK, vocabulary), dtype=np.float32),
    )


class ToyBackend(Backend):
    name = "toy"
    runtime = "numpy"
    methods = (Method("toy", "Toy", "Random numbers, multiplied by numpy.", precision=1, bits=32),)

    def tensor_sizes(self, variant, checkpoint, device=""):
        return [TensorSize(name, 4 * RANK * (checkpoint.vocab_size or 0)) for name in ("E", "O")]


class NumpyRuntime(Runtime):
    name = "numpy"

    def load(self, checkpoint, variant, placement, progress, residents=(), plan=None):
        progress(None, "rolling dice")
        start = time.perf_counter()
        made = matrices(checkpoint.vocab_size)
        return ToyModel(
            runtime=self,
            checkpoint=checkpoint,
            variant=variant,
            device=placement.device,
            kernel="numpy matmul",
            vocabulary=checkpoint.vocab_size,
            memory=Memory(resident_bytes=sum(m.nbytes for m in made)),
            load_s=time.perf_counter() - start,
            matrices=made,
        )


class ToyModel(ResidentModel):
    unloaded: list[str] = []  # handles, for the tests

    def __init__(self, *, matrices, **fields):
        super().__init__(**fields)
        self.matrices = matrices

    def generate(self, prompt, settings, cancel, emit, adapter=None):
        tokens, times, start = list(prompt.token_ids), [], time.perf_counter()
        while len(times) < settings.max_new_tokens and not cancel.is_set():
            tokens.append(int(self._logits(tokens[-1:])[0].argmax()))
            times.append(time.perf_counter())
            emit((tokens[-1], times[-1]))
        return Generation(
            token_ids=tuple(tokens[len(prompt.token_ids) :]),
            finish_reason="stopped" if cancel.is_set() else "length",
            latency=latency.from_timestamps(start, times, len(prompt.token_ids)),
            decode_path="numpy",
        )

    def answer_logits(self, prompt_ids, token_ids, cancel):
        for token in (prompt_ids[-1], *token_ids[:-1]):
            if cancel.is_set():
                raise Stopped
            yield self._logits([token])[0]

    def window_logits(self, token_ids, skip, cancel):
        return self._logits(token_ids[skip:])

    def unload(self):
        self.unloaded.append(self.handle)

    def _logits(self, token_ids):
        e, o = self.matrices
        return e[list(token_ids)] @ o
