"""The child process that is connected to Ray: serves a `ClusterScheduler` over a connection until that ends."""

from __future__ import annotations

import contextlib
import os
import sys
import threading
from multiprocessing.connection import Connection
from typing import Any

from comparator.cluster.rpc import Call, Host
from comparator.cluster.scheduler import ClusterScheduler

SHUTDOWN_S = 5.0


def main(descriptor: int) -> None:
    """`descriptor`: the file descriptor of the connection. The settings come first, then `Call`s, or tickets to stop."""
    connection, sending = Connection(descriptor), threading.Lock()

    def send(ticket: str | None, items: Any) -> None:
        with sending, contextlib.suppress(OSError):  # the app is gone: the reader below ends everything
            connection.send((ticket, items))

    scheduler = ClusterScheduler(connection.recv(), on_change=lambda state: send(None, state))
    host = Host(scheduler)

    def serve(call: Call) -> None:
        for batch in host.serve(call):
            send(call.ticket, batch)

    with contextlib.suppress(OSError, EOFError):
        while True:
            message = connection.recv()
            if isinstance(message, Call):
                threading.Thread(target=serve, args=(message,), daemon=True).start()
            else:
                host.stop(message)
    # The app is gone. Ray ends the actors of a driver that has ended; a shutdown is quicker.
    threading.Timer(SHUTDOWN_S, os._exit, (0,)).start()
    import ray

    ray.shutdown()
    os._exit(0)


if __name__ == "__main__":
    main(int(sys.argv[1]))
