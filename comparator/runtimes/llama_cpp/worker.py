"""Run as a process: llama.cpp with one model, answering over a pipe. A crash in it ends this process alone.

    python -m comparator.runtimes.llama_cpp.worker PIPE MEMORY

PIPE is the file descriptor of a `multiprocessing` connection: a request is (method of `Model`, *arguments), an answer is
("ok", result) or ("failed", reason), after any number of ("item", value). MEMORY is that of a file which both processes map: its first byte is set to abort
a pass, logits are written behind its first page. Ends when its stdin does, so that it never outlives the app.
"""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import os
import re
import sys
import threading
import time
import traceback
from multiprocessing.connection import Connection
from typing import Any

import numpy as np

from comparator.metrics import memory
from comparator.util.compat import xllamacpp as c_api

PAGE = 4096  # before the logits; its first byte aborts a pass
ROWS = 64  # of logits that the shared memory holds
MOST_BATCH = 512  # tokens of one pass
_BUFFER = re.compile(r"(\S+)\s+(model|KV|compute|output|RS) buffer size =\s*([\d.]+) MiB")


class Failed(Exception):
    """llama.cpp refused, in its own words."""


class Model:
    """One model and one context, whose size is what the last request needed."""

    def __init__(self, memory_file: int, connection: Connection):
        self.connection, self.library = connection, c_api.load()
        if problem := c_api.layout_problem(self.library):
            raise Failed(f"xllamacpp is a different build from {c_api.WRITTEN_FOR}: {problem}")
        self.lines: list[tuple[int, str]] = []
        self.log = c_api.LogCallback(self._log)
        self.library.llama_log_set(self.log, None)
        self.library.llama_backend_init()
        self.memory_file, self.shared = memory_file, mmap.mmap(memory_file, PAGE)
        self.abort = c_api.AbortCallback(lambda _: self.shared[0] != 0)
        self.model = self.context = self.batch = None
        self.shape: tuple[int, int] | None = None  # of the context: (tokens, rows of logits in one pass)
        self.threads, self.vocabulary, self.position = 1, 0, 0
        self.cache = ""
        self.track: Any = None

    # ------------------------------------------------------------ requests

    def offloads(self) -> bool:
        """Whether this build can use a GPU."""
        return self.library.llama_supports_gpu_offload()

    def open(self, file: str, gpu: int | None, threads: int, cache: str = "") -> dict[str, Any]:
        """Load the file; `gpu`: the number of the GPU for all layers, None for the CPU. cache: type of keys and values, of
        `xllamacpp.CACHE_TYPES`; "" is llama.cpp's own, f16."""
        self.cache = cache
        self.before = memory.resident_set()
        parameters = self.library.llama_model_default_params()
        parameters.n_gpu_layers = 0
        if gpu is not None:
            parameters.n_gpu_layers, parameters.split_mode = c_api.ALL_LAYERS, c_api.SPLIT_NONE
            parameters.main_gpu = gpu
        self.threads = threads
        with memory.track("cpu") as peak:
            self.model = self.library.llama_model_load_from_file(os.fsencode(file), parameters)
        if not self.model:
            raise Failed(self._complaint("it cannot load the file"))
        self.vocabulary = self.library.llama_vocab_n_tokens(self.library.llama_model_get_vocab(self.model))
        self.batch = self.library.llama_batch_init(MOST_BATCH, 0, 1)
        os.ftruncate(self.memory_file, PAGE + ROWS * 4 * self.vocabulary)
        self.shared = mmap.mmap(self.memory_file, PAGE + ROWS * 4 * self.vocabulary)
        return {
            "vocabulary": self.vocabulary,
            "buffers": self._buffers(),
            "risen_bytes": peak.above_bytes,
            "system": self.library.llama_print_system_info().decode(),
        }

    def use(self, tokens: int, rows: int) -> dict[str, int]:
        """An empty context for `tokens` tokens, with logits for up to `rows` tokens of one pass; its buffers' bytes."""
        shape = (-(-tokens // 256) * 256, rows)  # llama.cpp rounds up as well
        if self.shape != shape:
            self._new_context(*shape)
        self.library.llama_memory_clear(self.library.llama_get_memory(self.context), True)
        self.position = 0
        return self.context_buffers

    def feed(self, token_ids: list[int], every: bool) -> int:
        """Decode up to `MOST_BATCH` tokens after those that were fed. `every`: keep the logits of each; else those of the
        last alone, which are then in the first row of the shared memory. Returns the number of rows kept, 0 if aborted."""
        rows = self._pass(token_ids, every)
        if rows and not every:
            self.rows_to_share(0, 1)
        return rows

    def greedy(self, token_ids: list[int], count: int, ends: frozenset[int], width: int) -> str:
        """Decode the prompt and up to `count` tokens, each the most probable of the first `width`, without waiting for the
        parent; sends (token, `time.perf_counter()`) as it goes. Returns why it ended."""
        for start in range(0, len(token_ids), MOST_BATCH):
            if not self._pass(token_ids[start : start + MOST_BATCH], False):
                return "stopped"
        for step in range(count):
            logits = np.ctypeslib.as_array(
                self.library.llama_get_logits_ith(self.context, -1), (self.vocabulary,)
            )
            token = int(logits[:width].argmax())  # where one is NaN: that one
            if not np.isfinite(logits[token]):
                return "overflowed"
            self.connection.send(("item", (token, time.perf_counter())))
            if token in ends:
                return "eos"
            if self.shared[0]:
                return "stopped"
            if step + 1 < count:
                self._pass([token], False)
        return "length"

    def _pass(self, token_ids: list[int], every: bool) -> int:
        batch, count = self.batch, len(token_ids)
        batch.n_tokens = count
        for i, token in enumerate(token_ids):
            batch.token[i], batch.pos[i], batch.n_seq_id[i] = token, self.position + i, 1
            batch.seq_id[i][0], batch.logits[i] = 0, every or i == count - 1
        # One token is not aborted: the callback is asked after each operation.
        self.library.llama_set_abort_callback(
            self.context, self.abort if count > 1 else c_api.AbortCallback(), None
        )
        code = self.library.llama_decode(self.context, batch)
        if code == 2:
            return 0
        if code:
            raise Failed(self._complaint(f"llama_decode returned {code}"))
        self.library.llama_synchronize(self.context)
        self.position += count
        return count if every else 1

    def rows_to_share(self, first: int, count: int) -> None:
        """Copy rows of the last pass's logits into the shared memory, `ROWS` at most."""
        source = ctypes.addressof(self.library.llama_get_logits(self.context).contents)
        width = 4 * self.vocabulary
        target = np.frombuffer(self.shared, np.float32, count * self.vocabulary, PAGE)
        ctypes.memmove(target.ctypes.data, source + first * width, count * width)

    def tokenize(self, text: str) -> list[int] | None:
        """Token ids as llama.cpp's own tokenizer gives them, special tokens read as such; None without a tokenizer."""
        vocabulary, data = self.library.llama_model_get_vocab(self.model), text.encode()
        if self.library.llama_vocab_type(vocabulary) == 0:
            return None
        ids = (ctypes.c_int32 * (len(data) + 16))()
        count = self.library.llama_tokenize(vocabulary, data, len(data), ids, len(ids), False, True)
        return list(ids[: max(0, count)])

    def grown_bytes(self) -> int:
        """How far this process has grown since before the model was loaded."""
        return memory.resident_set() - self.before

    def watch_peak(self) -> None:
        """Begin to measure how far this process's memory rises."""
        self.track = contextlib.ExitStack()
        self.peak = self.track.enter_context(memory.track("cpu"))

    def risen_bytes(self) -> int | None:
        self.track.close()
        return self.peak.above_bytes

    # ------------------------------------------------------------ inside

    def _new_context(self, tokens: int, rows: int) -> None:
        if self.context:
            self.library.llama_free(self.context)
        self.context = self.shape = None
        parameters = self.library.llama_context_default_params()
        parameters.n_ctx = tokens
        parameters.n_batch = parameters.n_ubatch = min(tokens, MOST_BATCH)
        parameters.n_outputs_max = parameters.n_outputs_max_per_seq = min(rows, parameters.n_batch)
        parameters.n_threads = parameters.n_threads_batch = self.threads
        if self.cache:  # quantized values need flash attention
            parameters.type_k = parameters.type_v = c_api.CACHE_TYPES[self.cache]
            parameters.flash_attn_type = c_api.FLASH_ATTENTION
        self.lines.clear()
        self.context = self.library.llama_init_from_model(self.model, parameters)
        if not self.context:
            raise Failed(self._complaint(f"it has no memory for a context of {tokens:,} tokens"))
        self.shape, self.context_buffers = (tokens, rows), self._buffers()

    def _log(self, level: int, text: bytes, _: Any) -> None:
        self.lines.append((level, text.decode(errors="replace").strip()))
        del self.lines[:-4000]

    def _buffers(self) -> dict[str, int]:
        """Bytes by kind ("model", "KV", "compute", "output") as llama.cpp has just logged them."""
        sizes: dict[str, int] = {}
        for _, line in self.lines:
            if match := _BUFFER.search(line):
                sizes[match[2]] = sizes.get(match[2], 0) + round(float(match[3]) * 2**20)
        return sizes

    def _complaint(self, otherwise: str) -> str:
        errors = [line for level, line in self.lines if level == 4 and line]  # GGML_LOG_LEVEL_ERROR
        return ". ".join(errors[:2])[:400] or otherwise


def serve(connection: Connection, memory_file: int) -> None:
    model = None
    while True:
        name, *arguments = connection.recv()
        try:
            model = model or Model(memory_file, connection)
            connection.send(("ok", getattr(model, name)(*arguments)))
        except Failed as reason:
            connection.send(("failed", str(reason)))
        except (OSError, AttributeError, MemoryError) as error:  # a library of another build, say
            connection.send(("failed", f"{type(error).__name__}: {error}"))


def _end_with_parent() -> None:
    while os.read(0, 1):
        pass
    os._exit(1)


if __name__ == "__main__":
    threading.Thread(target=_end_with_parent, daemon=True).start()
    try:
        serve(Connection(int(sys.argv[1])), int(sys.argv[2]))
    except EOFError:
        os._exit(0)
    except BaseException:
        traceback.print_exc()  # the parent quotes the last line
        os._exit(1)
