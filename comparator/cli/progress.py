"""Events → stderr: states, live text and figures.

On a terminal one status line changes in place, drawn with rich; in a log each new state is a line of its own.
"""

from __future__ import annotations

import contextlib
import logging
import os
import re
import signal
import sys
import threading
import warnings
from collections.abc import Iterator
from typing import TextIO

from comparator.cli.tables import printable
from comparator.core.events import (
    Answering,
    Event,
    Failed,
    Finished,
    Generated,
    Generating,
    Loading,
    Queued,
    Scoring,
)
from comparator.core.result import CellResult
from comparator.core.variant import Cell
from comparator.metrics.definitions import shown
from comparator.util import formatting

_SECONDS = re.compile(r" \(\d+ s\)$")  # a message with a counter is one state


class Progress:
    """Call it with each event, inside a `with` block.

    answers: False prints states only, no text and no figures.
    silent: prints what failed, and nothing else.
    """

    def __init__(self, stream: TextIO | None = None, answers: bool = True, silent: bool = False):
        from rich.console import Console
        from rich.progress import Progress as StatusLine
        from rich.progress import TaskProgressColumn, TextColumn

        self.stream = stream or sys.stderr
        console = Console(file=self.stream)
        self.live = console.is_interactive
        # Drawn when it changes: a thread that redraws it would run beside what is measured.
        self.status_line = StatusLine(
            TextColumn("{task.description}", markup=False), TaskProgressColumn(), console=console, transient=True,
            auto_refresh=False, redirect_stdout=False, redirect_stderr=False,
        )  # fmt: skip
        self.answers, self.silent = answers, silent
        self.writing: Cell | None = None  # the cell whose text is being printed
        self.reported: set[Cell] = set()  # columns whose figures have been printed
        self.last = ""

    def __call__(self, event: Event) -> None:
        if self.silent and not isinstance(event, Failed):
            return
        match event:
            case Queued():
                doing = f": {event.doing}" if event.doing else ""
                self.status(f"queued, {formatting.plural(event.ahead, 'run')} ahead", detail=doing)
            case Loading() | Scoring():
                self.status(f"{event.cell.label}: {event.message}", event.fraction)
            case Answering():
                words = formatting.prompt_of(event.number, event.total, event.left_s if self.live else None)
                self.status(f"{words} ({event.cell.label})", (event.number - 1) / event.total)
            case Generating() | Generated() | Finished() if not self.answers:
                pass
            case Generating(round=0):
                self.text(event.cell, event.chunk.text)
            case Generating():
                self.status(f"{event.cell.label}: run {event.round + 1} of {event.rounds}")
            case Generated() | Finished():
                self.figures(event.cell, event.result)
            case Failed():
                self.line(f"{event.cell.label} failed: {event.problem} {event.advice}".rstrip())

    def status(self, what: str, fraction: float | None = None, *, detail: str = "") -> None:
        """The current state. `fraction` (of it done) and `detail` change often and are left out of a log."""
        if self.silent:
            return
        self._end_text()
        what = printable(what + detail if self.live else _SECONDS.sub("", what)).replace("\n", " ")
        now = f"{what} {fraction:.0%}" if self.live and fraction is not None else what
        if now == self.last:
            return
        self.last = now
        if not self.live:
            self._write(f"{what}\n")
            return
        for task in self.status_line.task_ids:
            self.status_line.remove_task(task)
        self.status_line.add_task(what, total=None if fraction is None else 1.0, completed=fraction or 0.0)
        self.status_line.start()

    def text(self, cell: Cell, piece: str) -> None:
        if self.writing != cell:
            self._end_text()
            self._clear()
            self._write(f"── {printable(cell.label)}\n")
            self.writing = cell
        self._write(printable(piece))

    def figures(self, cell: Cell, result: CellResult) -> None:
        """A column's figures, once, below its text."""
        if cell in self.reported or result.status == "failed":
            return
        self.reported.add(cell)
        figures = [
            f"{m.title} {m.format(result)} {m.unit}" for m in shown("progress") if m.get(result) is not None
        ]
        count = formatting.plural(len(result.token_ids), "token")
        self.line(
            f"   {', '.join([f'{cell.label}: {count}', *figures])}{' (stopped)' * (result.status == 'stopped')}"
        )

    def line(self, text: str) -> None:
        self._end_text()
        self._clear()
        self._write(f"{printable(text)}\n")

    def remark(self, text: str) -> None:
        """A line about what is done, which is no failure."""
        if not self.silent:
            self.line(text)

    def report(self, fraction: float | None, message: str) -> None:
        """`status` with the arguments of a progress callback."""
        self.status(message, fraction)

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *_) -> None:
        self.end()

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
            self.status_line.stop()

    def _write(self, text: str) -> None:
        with contextlib.suppress(BrokenPipeError):
            self.stream.write(text)
            self.stream.flush()


@contextlib.contextmanager
def stoppable() -> Iterator[threading.Event]:
    """An event that Ctrl-C sets. The first press stops cleanly, the second interrupts the program."""
    cancel = threading.Event()

    def stop(*_):
        if cancel.is_set():
            raise KeyboardInterrupt
        cancel.set()
        print("\nStopping … (press Ctrl-C again to quit immediately)", file=sys.__stderr__, flush=True)

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
    """Hide log messages, warnings and prints of the libraries; yields the real stderr.

    stdout is for the result, so their prints are dropped. `verbose` shows everything, on stderr.
    """
    if verbose:
        logging.getLogger("comparator").setLevel(
            logging.DEBUG
        )  # comparator/backends/gptqmodel_layers/quiet.py asks it
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
