"""Several iterators at once, as one: each on a thread of its own. Knows nothing of columns or engines."""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterator, Sequence
from typing import Any


def merged(iterators: Sequence[Iterator[Any]], cancel: threading.Event) -> Iterator[Any]:
    """What they yield, as it comes. Ends when all have; closing it, or an error in one, sets `cancel` and waits for
    the others. Raises the first error."""
    items: queue.SimpleQueue = queue.SimpleQueue()

    def drain(iterator: Iterator[Any]) -> None:
        error = None
        try:
            for item in iterator:
                items.put((item, None))
        except BaseException as raised:  # carried over to the caller's thread
            error = raised
        items.put((None, (error,)))

    threads = [threading.Thread(target=drain, args=(i,), name="column", daemon=True) for i in iterators]
    for thread in threads:
        thread.start()
    going, error = len(threads), None
    try:
        while going:
            item, ended = items.get()
            if ended is None:
                if error is None:
                    yield item
                continue
            going -= 1
            if ended[0] is not None and error is None:
                error = ended[0]
                cancel.set()
    finally:
        if going:
            cancel.set()
        for thread in threads:
            thread.join()
    if error is not None:
        raise error
