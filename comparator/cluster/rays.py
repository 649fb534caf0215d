"""The few things that are asked of Ray itself: connect, who is there, an actor, its stream.

Runs in the driver's process. Two ways to be connected: as a driver of the cluster (`auto`, HOST:PORT), and
through Ray Client (`ray://…`), which has no generators, so batches are pulled there.
"""

from __future__ import annotations

import contextlib
import os
import pickle
import secrets
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from comparator.cluster import failures
from comparator.cluster.placing import Node
from comparator.cluster.survey import look, skew, versions
from comparator.types import Problem

SURVEY_S = 30.0  # how long nodes have to say what they have; a first answer imports libraries


def connect(address: str) -> None:
    """Raises `Problem` where there is no cluster, or one of other versions."""
    os.environ.setdefault("RAY_DEDUP_LOGS", "0")
    # After so long without the head Ray ends this process, which the app takes for the cluster's end.
    os.environ.setdefault("RAY_gcs_rpc_server_reconnect_timeout_s", "20")
    if has_token(os.environ):
        # `ray start` asks everybody for a token as soon as the machine has one; `ray.init` gives it only when told to.
        os.environ.setdefault("RAY_AUTH_MODE", "token")
    try:
        import ray
    except ImportError:
        raise Problem(
            "Ray is not installed, and COMPARATOR_RAY_ADDRESS is set.",
            "pip install -r requirements-ray.txt, or unset it.",
        ) from None
    try:
        ray.init(address=address, log_to_driver=False, configure_logging=False, namespace="quant-comparator")
    except Exception as error:  # ConnectionError, RuntimeError, ValueError: Ray has no type of its own for it
        raise failures.unreachable(address, str(error)) from None


def has_token(environ: Mapping[str, str]) -> bool:
    """Whether Ray would find a token here. One that the cluster does not ask for does no harm."""
    if environ.get("RAY_AUTH_TOKEN"):
        return True
    place = (
        environ.get("RAY_AUTH_TOKEN_PATH")
        or Path(environ.get("HOME", "~")).expanduser() / ".ray" / "auth_token"
    )
    try:
        return bool(Path(place).read_text(encoding="utf-8").strip())
    except (OSError, ValueError):
        return False


def through_client() -> bool:
    from ray.util.client import ray as client

    return bool(client.is_connected())


def nodes() -> tuple[Node, ...]:
    """The machines that are alive, with what Ray lends there and what they say of themselves."""
    import ray

    alive = sorted((n for n in ray.nodes() if n["Alive"]), key=lambda n: n["NodeID"])
    free = available()
    asked = {n["NodeID"]: _asked(n["NodeID"]) for n in alive}
    names = names_of(alive)
    ready, _ = ray.wait(list(asked.values()), num_returns=len(asked), timeout=SURVEY_S, fetch_local=True)
    return tuple(
        _node(
            n,
            names[n["NodeID"]],
            free.get(n["NodeID"], {}),
            asked[n["NodeID"]] if asked[n["NodeID"]] in ready else None,
        )
        for n in alive
    )


def names_of(alive: list[dict]) -> dict[str, str]:
    """Names as `ray start --node-name` gave them. Addresses inside a network are nobody's business: where a name is
    one, or is there twice, the node is numbered."""
    given = [n["NodeName"] for n in alive]
    return {
        n["NodeID"]: n["NodeName"]
        if n["NodeName"] and n["NodeName"] != n["NodeManagerAddress"] and given.count(n["NodeName"]) == 1
        else f"node {number}"
        for number, n in enumerate(alive, 1)
    }


def _node(said: dict, name: str, free: dict[str, float], answer: Any | None) -> Node:
    import ray

    found, refused = None, None
    try:
        if answer is None:
            refused = f"it did not say within {SURVEY_S:g} s what it has"
        else:
            found = ray.get(answer)
            if differing := skew(versions(), found.versions):
                refused = f"other versions ({differing})"
    except Exception as error:  # whatever that machine lacks: its own traceback's last line says it
        last = str(error).strip().splitlines()[-1:] or [type(error).__name__]
        refused = f"Quant Comparator cannot be imported there ({last[0].strip()[:200]})"
    return Node(said["NodeID"], name, dict(said["Resources"]), dict(free), found, refused)


def _asked(node: str) -> Any:
    import ray

    return (
        ray.remote(look).options(num_cpus=0, max_retries=0, label_selector={"ray.io/node-id": node}).remote()
    )


def available() -> dict[str, dict[str, float]]:
    """What Ray has left to lend, by node."""
    import ray

    if not through_client():
        return _available_here()
    return ray.get(ray.remote(_available_here).options(num_cpus=0).remote(), timeout=SURVEY_S)


def _available_here() -> dict[str, dict[str, float]]:
    from ray._private.state import (
        available_resources_per_node,
    )  # `ray status` shows it; no public call gives it

    return available_resources_per_node()


def actor(kind: type, options: dict[str, Any], *arguments: Any) -> Any:
    """Ask for an actor; it belongs to this driver and ends with it. Returns at once."""
    import ray

    return ray.remote(kind).options(max_restarts=0, max_concurrency=16, **options).remote(*arguments)


def end(handle: Any) -> None:
    """End an actor now, also one that is not there yet."""
    import ray

    with contextlib.suppress(Exception):  # it may be gone already, which is what is wanted
        ray.kill(handle, no_restart=True)


def ask(handle: Any, name: str, *arguments: Any, timeout_s: float | None = None) -> Any:
    """A plain call of an actor's method. Raises Ray's errors, `TimeoutError` among them."""
    import ray

    return ray.get(getattr(handle, name).remote(*arguments), timeout=timeout_s)


def batches(
    handle: Any, cancel: threading.Event, name: str, arguments: tuple, named: dict, stoppable: bool = True
) -> Iterator[list]:
    """The batches of `handle.stream(…)` (comparator/hosting.py). Stop is passed on; closing waits until the work has
    ended. Raises Ray's errors."""
    import ray

    ticket, over = secrets.token_hex(8), threading.Event()

    def pass_on() -> None:
        while not over.is_set():
            if cancel.wait(0.1):
                handle.stop.remote(ticket)
                return

    given = (ticket, name, arguments, named, stoppable)
    if through_client():
        references = iter(lambda: handle.pull.remote(*given), None)
    else:
        references = handle.stream.options(num_returns="streaming").remote(*given)
    threading.Thread(target=pass_on, name="stop", daemon=True).start()
    try:
        for reference in references:
            batch = ray.get(reference)
            if batch is None:
                return
            try:
                yield pickle.loads(batch)
            except GeneratorExit:
                cancel.set()
                handle.stop.remote(ticket)
                with contextlib.suppress(ray.exceptions.RayError):  # nobody waits for what it would have said
                    for rest in references:
                        if ray.get(rest) is None:
                            break
                raise
    finally:
        over.set()
