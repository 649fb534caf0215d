"""Events → a terminal: states, live text and figures on stderr. Knows nothing of how they come about.

On a terminal one line shows what is being done and is overwritten; in a log each new state is a line of its own.
"""

from __future__ import annotations

import contextlib
import logging
import os
import re
import shutil
import signal
import sys
import threading
import warnings
from collections.abc import Iterator
from typing import TextIO

from comparator import figures, words
from comparator.cli.tables import printable
from comparator.types import (
    Cell,
    CellResult,
    Event,
    Failed,
    Finished,
    Generated,
    Generating,
    Loading,
    Queued,
    Scoring,
)

_SECONDS = re.compile(r" \(\d+ s\)$")  # a counting message is one state


class Progress:
    """Call it with each event. `answers` False: neither text nor figures, only what is being done."""

    def __init__(self, stream: TextIO | None = None, repeats: int = 1, answers: bool = True):
        self.stream = stream or sys.stderr
        self.live = self.stream.isatty()
        self.repeats = repeats
        self.answers = answers
        self.writing: Cell | None = None  # whose text the cursor stands in
        self.told: set[Cell] = set()  # columns whose figures have been printed
        self.last = ""

    def __call__(self, event: Event) -> None:
        match event:
            case Queued():
                doing = f": {event.doing}" if event.doing else ""
                self.status(f"waiting for {words.plural(event.ahead, 'run')} to end", doing)
            case Loading():
                done = "" if event.fraction is None else f" {event.fraction:.0%}"
                self.status(f"{event.cell.label}: {event.message}", done)
            case Generating() | Generated() | Finished() if not self.answers:
                pass
            case Generating(round=0):
                self.text(event.cell, event.chunk.text)
            case Generating():
                self.status(f"{event.cell.label}: run {event.round + 1} of {self.repeats}")
            case Scoring():
                done = "" if event.fraction is None else f" {event.fraction:.0%}"
                self.status(f"{event.cell.label}: {event.message}", done)
            case Generated() | Finished():
                self.figures(event.cell, event.result)
            case Failed():
                self.line(f"{event.cell.label} failed: {event.problem} {event.advice}".rstrip())

    def status(self, what: str, done: str = "") -> None:
        """What is being done now. `done` changes often and so is left out of a log."""
        self._end_text()
        what = printable(what).replace("\n", " ")
        if self.live:
            width = shutil.get_terminal_size().columns - 1
            self._write(f"\r\x1b[K{(what + done)[:width]}")
            return
        what = _SECONDS.sub("", what)
        if what != self.last:
            self._write(f"{what}\n")
        self.last = what

    def text(self, cell: Cell, piece: str) -> None:
        if self.writing != cell:
            self._end_text()
            self._clear()
            self._write(f"── {printable(cell.label)}\n")
            self.writing = cell
        self._write(printable(piece))

    def figures(self, cell: Cell, result: CellResult) -> None:
        """A column's figures, once, below its text."""
        if cell in self.told or result.status == "failed":
            return
        self.told.add(cell)
        shown = [figures.BY_KEY[key] for key in ("decode_tok_s", "ttft_s", "resident_bytes")]
        said = [f"{f.title} {f.written(result)} {f.unit}" for f in shown if f.get(result) is not None]
        count = words.plural(len(result.token_ids), "token")
        self.line(
            f"   {', '.join([f'{cell.label}: {count}', *said])}{' (stopped)' * (result.status == 'stopped')}"
        )

    def line(self, text: str) -> None:
        self._end_text()
        self._clear()
        self._write(f"{printable(text)}\n")

    def end(self) -> None:
        """Leave the cursor at the beginning of an empty line."""
        self._end_text()
        self._clear()

    def _end_text(self) -> None:
        if self.writing is not None:
            self.writing = None
            self._write("\n")

    def _clear(self) -> None:
        self.last = ""
        if self.live:
            self._write("\r\x1b[K")

    def _write(self, text: str) -> None:
        with contextlib.suppress(BrokenPipeError):
            self.stream.write(text)
            self.stream.flush()


@contextlib.contextmanager
def stoppable() -> Iterator[threading.Event]:
    """An event that Ctrl-C sets. The first press stops cleanly, the second ends the program as usual."""
    cancel = threading.Event()

    def stop(*_):
        if cancel.is_set():
            raise KeyboardInterrupt
        cancel.set()
        print("\nStopping … (Ctrl-C again to end at once)", file=sys.__stderr__, flush=True)

    if threading.current_thread() is not threading.main_thread():  # signals belong to the main thread
        yield cancel
        return
    previous = signal.signal(signal.SIGINT, stop)
    try:
        yield cancel
    finally:
        signal.signal(signal.SIGINT, previous)


@contextlib.contextmanager
def quiet(verbose: bool) -> Iterator[TextIO]:
    """Keep the libraries' log lines, warnings and prints out of the terminal; yields the real stderr.

    What they print goes to nowhere, since stdout is for our result. `verbose` lets everything through, on stderr.
    """
    if verbose:
        logging.getLogger("comparator").setLevel(logging.DEBUG)  # comparator/gptq/quiet.py asks it
    else:
        os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    real = sys.stderr
    with contextlib.ExitStack() as stack:
        if verbose:
            stack.enter_context(contextlib.redirect_stdout(real))
        else:
            nowhere = stack.enter_context(open(os.devnull, "w", encoding="utf-8"))
            stack.enter_context(contextlib.redirect_stdout(nowhere))
            stack.enter_context(warnings.catch_warnings())
            warnings.simplefilter("ignore")
            stack.callback(logging.disable, logging.root.manager.disable)
            logging.disable(logging.WARNING)
        yield real
