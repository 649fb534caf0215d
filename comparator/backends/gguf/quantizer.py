"""Run as a process: ggml's own quantization of rows, since a failed check in native code ends the process that it is in.

    python -m comparator.backends.gguf.quantizer THREADS

For each line `NUMBER ROWS WIDTH` on stdin (number of the ggml type), followed by ROWS × WIDTH float32 values, it writes the
number of bytes as a line and the quantized rows to stdout. Ends with its stdin. `Quantizer` is the other end.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from comparator.core.errors import UserError
from comparator.util import processes


class Quantizer:
    """`with Quantizer() as quantize: stored = quantize(weight, type_number)`: (rows, bytes per row)."""

    def __enter__(self) -> Quantizer:
        environment = dict(os.environ) | {"GGML_NO_BACKTRACE": "1"}
        environment["PYTHONPATH"] = processes.python_path()
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        self._errors = tempfile.TemporaryFile()
        self._process = subprocess.Popen(
            [sys.executable, "-m", "comparator.backends.gguf.quantizer", str(cores)], env=environment,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._errors,
        )  # fmt: skip
        return self

    def __exit__(self, *_: Any) -> None:
        self._process.kill()
        self._process.wait()
        for stream in (self._process.stdin, self._process.stdout, self._errors):
            with contextlib.suppress(OSError):
                stream.close()

    def __call__(self, weight: Any, number: int) -> Any:
        """Rows of a float32 array (…, width). Raises `UserError` where the process has ended."""
        import numpy as np

        width = weight.shape[-1]
        rows = weight.size // width
        sent, received = self._process.stdin, self._process.stdout
        try:
            sent.write(f"{number} {rows} {width}\n".encode())
            sent.write(memoryview(np.ascontiguousarray(weight, np.float32)).cast("B"))
            sent.flush()
            size = int(received.readline() or -1)
        except OSError:
            size = -1
        data = received.read(size) if size > 0 else b""
        if size < 0 or len(data) < size:
            raise self._ended()
        return np.frombuffer(data, np.uint8).reshape(rows, -1)

    def _ended(self) -> UserError:
        code = self._process.wait()
        self._errors.seek(0)
        lines = self._errors.read().decode(errors="replace").strip().splitlines()
        because = f": {lines[-1][:300]}" if lines else ""
        return UserError(
            f"The process that quantizes for GGUF ended with code {code}{because}.",
            "Choose another type, such as gguf:q8_0, or name a file.",
        )


def serve(threads: int) -> None:
    import ctypes

    import numpy as np

    from comparator.util.compat import xllamacpp

    library = xllamacpp.load()
    with ThreadPoolExecutor(threads) as pool:
        while line := sys.stdin.buffer.readline():
            number, rows, width = map(int, line.split())
            values = np.frombuffer(sys.stdin.buffer.read(4 * rows * width), np.float32)
            row_bytes = library.ggml_row_size(number, width)
            stored = np.empty(rows * row_bytes, np.uint8)
            source = values.ctypes.data_as(ctypes.POINTER(ctypes.c_float))
            step = -(-rows // threads)

            def part(first: int) -> None:
                count = min(step, rows - first)  # noqa: B023 - ends before the next line is read
                library.ggml_quantize_chunk(
                    number, source, stored.ctypes.data, first * width, count, width, None  # noqa: B023
                )  # fmt: skip

            list(pool.map(part, range(0, rows, step)))
            sys.stdout.buffer.write(f"{stored.nbytes}\n".encode())
            sys.stdout.buffer.write(stored.data)
            sys.stdout.buffer.flush()


if __name__ == "__main__":
    serve(int(sys.argv[1]))
