"""Calls of Ray: connect, list nodes, start an actor, call it.

Runs in the driver's process. There are two kinds of connection: as a driver of the cluster (`auto`, HOST:PORT), and
through Ray Client (`ray://…`), which has no generators, so batches are pulled.
"""

from __future__ import annotations

import contextlib
import ipaddress
import os
import pickle
import threading
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from comparator.cluster import errors
from comparator.cluster.node_info import look, skew, versions
from comparator.cluster.placement import Node
from comparator.cluster.rpc import Call, receive
from comparator.core.errors import UserError
from comparator.engine.protocol import ignore
from comparator.util.compat.ray import available_resources

SURVEY_S = 30.0  # how long nodes have to say what they have; a first answer imports libraries


def connect(address: str, without_token: bool = False) -> None:
    """Connect this process. Raises `UserError` if there is no cluster, one with other versions, or no token for it.

    `without_token`: COMPARATOR_RAY_WITHOUT_TOKEN, where the network itself keeps strangers away.
    """
    if not (without_token or _is_loopback(address) or has_token(os.environ)):
        raise UserError(
            f"There is no token for the Ray cluster at {address}. Anyone who can reach a cluster without a token can run "
            "any code on all of its machines, so it is not used.",
            "Make one with `ray get-auth-token --generate`, copy it to every machine and start Ray there again "
            "(docs/cluster.md); or set COMPARATOR_RAY_WITHOUT_TOKEN=1 if nobody else can reach that network.",
        )
    os.environ.setdefault("RAY_DEDUP_LOGS", "0")
    # After so long without the head Ray ends this process, which the app takes for the cluster's end.
    os.environ.setdefault("RAY_gcs_rpc_server_reconnect_timeout_s", "20")
    if has_token(os.environ):
        # `ray start` asks everybody for a token as soon as the machine has one; `ray.init` sends it only in this mode.
        os.environ.setdefault("RAY_AUTH_MODE", "token")
    try:
        import ray
    except ImportError:
        raise UserError(
            "Ray is not installed, and COMPARATOR_RAY_ADDRESS is set.",
            "pip install -r requirements-ray.txt, or unset it.",
        ) from None
    try:
        ray.init(address=address, log_to_driver=False, configure_logging=False, namespace="quant-comparator")
    except Exception as error:  # ConnectionError, RuntimeError, ValueError: Ray has no type of its own for it
        raise errors.unreachable(address, str(error)) from None


def _is_loopback(address: str) -> bool:
    """Whether only this machine can be meant. `auto` may be a node that listens on the network."""
    host = address.removeprefix("ray://").rpartition(":")[0].strip("[]") or address
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def has_token(environ: Mapping[str, str]) -> bool:
    """Whether Ray would find a token here. A cluster that needs none ignores it."""
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
    """The machines that are alive, with Ray's resources and their own `NodeInfo`."""
    import ray

    alive = sorted((n for n in ray.nodes() if n["Alive"]), key=lambda n: n["NodeID"])
    free = available()
    answers = {n["NodeID"]: _look_at(n["NodeID"]) for n in alive}
    names = names_of(alive)
    ready, _ = ray.wait(list(answers.values()), num_returns=len(answers), timeout=SURVEY_S, fetch_local=True)
    return tuple(
        _node(
            n,
            names[n["NodeID"]],
            free.get(n["NodeID"], {}),
            answers[n["NodeID"]] if answers[n["NodeID"]] in ready else None,
        )
        for n in alive
    )


def names_of(alive: list[dict]) -> dict[str, str]:
    """Names from `ray start --node-name`, by node id. A node whose name is missing, its network address or not unique is
    numbered."""
    names = [n["NodeName"] for n in alive]
    return {
        n["NodeID"]: n["NodeName"]
        if n["NodeName"] and n["NodeName"] != n["NodeManagerAddress"] and names.count(n["NodeName"]) == 1
        else f"node {number}"
        for number, n in enumerate(alive, 1)
    }


def _node(entry: dict, name: str, free: dict[str, float], answer: Any | None) -> Node:
    import ray

    info, refused = None, None
    try:
        if answer is None:
            refused = f"it did not report its resources within {SURVEY_S:g} s"
        else:
            info = ray.get(answer)
            if differing := skew(versions(), info.versions):
                refused = f"other versions ({differing})"
    except Exception as error:  # whatever that machine lacks: its own traceback's last line says it
        last = str(error).strip().splitlines()[-1:] or [type(error).__name__]
        refused = f"Quant Comparator cannot be imported there ({last[0].strip()[:200]})"
    return Node(entry["NodeID"], name, dict(entry["Resources"]), dict(free), info, refused)


def _look_at(node: str) -> Any:
    import ray

    return (
        ray.remote(look).options(num_cpus=0, max_retries=0, label_selector={"ray.io/node-id": node}).remote()
    )


def available() -> dict[str, dict[str, float]]:
    """Ray's free resources by node id."""
    import ray

    if not through_client():
        return available_resources()
    return ray.get(ray.remote(available_resources).options(num_cpus=0).remote(), timeout=SURVEY_S)


def actor(kind: type, options: dict[str, Any], *arguments: Any) -> Any:
    """Request an actor, which belongs to this driver and ends with it. Returns at once."""
    import ray

    return ray.remote(kind).options(max_restarts=0, max_concurrency=16, **options).remote(*arguments)


def end(handle: Any) -> None:
    """End an actor now, also one that has not started."""
    import ray

    with contextlib.suppress(Exception):  # it may have ended already
        ray.kill(handle, no_restart=True)


def ask(handle: Any, name: str, *arguments: Any, timeout_s: float | None = None) -> Any:
    """Call an actor's method and return its result. Raises Ray's errors, among them `TimeoutError`."""
    import ray

    return ray.get(getattr(handle, name).remote(*arguments), timeout=timeout_s)


def call_engine(
    handle: Any, call: Call, cancel: threading.Event | None, callback: Callable[..., None] = ignore
) -> Any:
    """Call a method of the actor's engine (comparator/cluster/rpc.py) and return its result; setting `cancel` stops it.
    Raises the method's errors and Ray's."""
    ended = threading.Event()

    def pass_on_stop() -> None:
        while not ended.is_set():
            if cancel.wait(0.1):
                handle.stop.remote(call.ticket)
                return

    if cancel is not None:
        threading.Thread(target=pass_on_stop, name="stop", daemon=True).start()
    try:
        return receive(_items(handle, call), callback, cancel)
    finally:
        ended.set()


def _items(handle: Any, call: Call) -> Iterator[Any]:
    import ray

    if through_client():
        references = iter(lambda: handle.pull.remote(call), None)
    else:
        references = handle.stream.options(num_returns="streaming").remote(call)
    for reference in references:
        batch = ray.get(reference)
        if batch is None:
            return
        yield from pickle.loads(batch)
