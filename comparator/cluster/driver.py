"""The child process that is connected to Ray: serves a `Conductor` over the line of pipe.py until the line ends."""

from __future__ import annotations

import contextlib
import os
import sys
import threading
from multiprocessing.connection import Connection
from typing import Any

from comparator.cluster.conductor import Conductor
from comparator.hosting import Host

LEAVE_S = 5.0


def main(number: int) -> None:
    """`number`: the file descriptor of the line. First comes the settings, then requests."""
    line, sending = Connection(number), threading.Lock()

    def send(ticket: str | None, items: Any) -> None:
        with sending, contextlib.suppress(OSError):  # the app is gone: the reader below ends everything
            line.send((ticket, items))

    conductor = Conductor(line.recv(), on_change=lambda state: send(None, state))
    host = Host(conductor)

    def serve(ticket: str, name: str, arguments: tuple, named: dict, stoppable: bool) -> None:
        for batch in host.serve(ticket, name, arguments, named, stoppable):
            send(ticket, batch)
        send(ticket, [])

    with contextlib.suppress(OSError, EOFError):
        while True:
            ticket, name, *rest = line.recv()
            if name is None:
                host.stop(ticket)
            else:
                threading.Thread(target=serve, args=(ticket, name, *rest), daemon=True).start()
    # The app is gone. Ray ends the actors of a driver that has ended; saying goodbye is quicker.
    threading.Timer(LEAVE_S, os._exit, (0,)).start()
    import ray

    ray.shutdown()
    os._exit(0)


if __name__ == "__main__":
    main(int(sys.argv[1]))
