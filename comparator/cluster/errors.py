"""Ray's exceptions, identified by name → a `UserError` with what was lost and what to do."""

from __future__ import annotations

from comparator.core.errors import UserError

AGAIN = "Run again: it gets a fresh actor. The other variants are not affected."


def lost(error: BaseException, doing: str, place: str) -> UserError:
    """The error for an actor lost while `doing` (“loading nf4”) on `place` (“node gpu-2”)."""
    text, kind = str(error), type(error).__name__
    low = text.lower()
    if kind == "OutOfMemoryError" or "node memory" in low or "memory monitor" in low:
        return UserError(
            f"Ray ended the actor on {place} while {doing}: the machine ran out of memory.",
            "Unload other variants there, choose a smaller one, or let Ray offer less memory (ray start --memory).",
        )
    if "node" in kind.lower() or "node has died" in low or "node was terminated" in low or "node_died" in low:
        return UserError(f"{place[:1].upper()}{place[1:]} was lost while {doing}.", AGAIN)
    if kind == "ActorUnavailableError":
        return UserError(f"{place[:1].upper()}{place[1:]} no longer responds; it was {doing}.", AGAIN)
    if "creation task" in low or "failed during creation" in low or "__init__" in low:
        return UserError(
            f"An actor could not start on {place}: {_last_line(text)}", "See that machine's Ray logs."
        )
    if kind in ("ActorDiedError", "RayActorError", "WorkerCrashedError"):
        return UserError(
            f"The actor on {place} died while {doing}: {_cause(text)}",
            AGAIN
            + " If it dies each time, see that machine's system log: its kernel may have run out of memory.",
        )
    return UserError(f"Ray failed on {place} while {doing}: {kind}: {_last_line(text)}", AGAIN)


def unreachable(address: str, reason: str) -> UserError:
    """The error for a cluster that cannot be connected to, from Ray's message `reason`."""
    low = reason.lower()
    if "ray[client]" in low:
        return UserError(
            "Addresses that begin with ray:// need Ray's client.", "pip install -r requirements-ray.txt"
        )
    if "version mismatch" in low or "python version" in low:
        return UserError(
            f"The Ray cluster at {address} runs other versions than this machine: {_one_line(reason)}",
            "Install the same Python and the same ray on both; requirements-ray.txt names the release.",
        )
    if "authentication token" in low or "unauthenticated" in low:
        return UserError(
            f"The Ray cluster at {address} requires a token, and this machine has none or a different one.",
            "Copy ~/.ray/auth_token from the machine where the cluster was started to the same place here.",
        )
    return UserError(
        f"No Ray cluster can be reached at {address}: {_one_line(reason)}",
        "Start one (ray start --head), check the address and the firewall, copy ~/.ray/auth_token here if ray start said "
        "that it requires one, or unset COMPARATOR_RAY_ADDRESS to run on this machine alone.",
    )


def driver_gone(address: str, doing: str) -> UserError:
    """The error for a lost driver, which Ray ends when the cluster's head is lost."""
    return UserError(
        f"The connection to the Ray cluster at {address} was lost while {doing}: its head no longer responds.",
        "Check the head (ray status there). Run again when it is back: the app reconnects.",
    )


def _cause(text: str) -> str:
    """The cause in Ray's message, without its list of common causes."""
    for mark in ("Worker exit detail:", "The actor is dead because", "Error Type:"):
        if mark in text:
            detail = text.partition(mark)[2].strip() if mark.endswith(":") else text[text.index(mark) :]
            return _one_line(detail.partition("Some common causes")[0].partition("\n")[0])
    return _one_line(text)


def _last_line(text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return (lines[-1] if lines else "no reason was given")[:300]


def _one_line(text: str) -> str:
    return " ".join(text.split())[:300].rstrip(". ") + "."
