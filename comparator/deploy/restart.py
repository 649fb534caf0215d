"""Start this program again after its GPU context was damaged: a new process is the only thing that mends one.

Saved comparisons, links and trained adapters are on the disk; what is lost is what was resident, and the runs that
were queued, none of which could have used the GPU any more.
"""

from __future__ import annotations

import logging
import os
import sys
import threading
import time
from typing import TYPE_CHECKING

from comparator.util.cuda_errors import DAMAGED

if TYPE_CHECKING:
    from comparator.engine.queue import FairQueue

_COUNT = "_COMPARATOR_RESTARTS"
_TOLD_S, _ENDED_S = 5.0, 30.0  # for pages to show why, and for the runs to end
_LONGEST_S = 300.0

log = logging.getLogger(__name__)


def when_damaged(queue: FairQueue) -> None:
    """Wait in the background, and replace this process by a new one of the same command line."""
    threading.Thread(target=_wait, args=(queue,), name="restart", daemon=True).start()


def _wait(queue: FairQueue) -> None:
    DAMAGED.wait()
    count = int(os.environ.get(_COUNT, "0"))
    pause_s = min(
        _LONGEST_S, _TOLD_S * 2**count
    )  # one that is damaged over and over is not started over and over
    log.error("The GPU's context is damaged. The app starts again in %.0f s.", pause_s)
    time.sleep(pause_s)
    end_s = time.monotonic() + _ENDED_S
    while queue.busy and time.monotonic() < end_s:
        time.sleep(0.2)
    os.environ[_COUNT] = str(count + 1)
    sys.stdout.flush()
    sys.stderr.flush()
    os.execv(
        sys.executable, [sys.executable, *sys.orig_argv[1:]]
    )  # its sockets and the GPU's memory are freed
