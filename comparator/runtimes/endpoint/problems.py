"""What goes wrong with a server → a `UserError` with a way out. A key is in none of them, nor is a listed server's address."""

from __future__ import annotations

import ssl

from comparator.core.endpoints import Endpoint
from comparator.core.errors import UserError

CONNECT_S, READ_S, TOTAL_S = (
    5.0,
    120.0,
    1800.0,
)  # to connect; between two pieces of an answer; for one request
MAX_LINE, MAX_BYTES = 1_000_000, 64_000_000  # bytes of one line, and of one answer
QUOTED = 200  # characters of what a server says that are repeated

# HTTP statuses that mean: not in this form. Another form of the request may be understood.
NOT_UNDERSTOOD = (400, 404, 405, 415, 422, 500, 501)


class Refused(UserError):
    """The server does not take this form of a request."""


def named(endpoint: Endpoint) -> str:
    return f"endpoint@{endpoint.name or endpoint.url}"


def line_too_long(endpoint: Endpoint) -> UserError:
    return UserError(
        f"{named(endpoint)} sent a line of more than {MAX_LINE / 1e6:.0f} MB, and the rest was not read.",
        "This is not a response of OpenAI's API: check the address, which usually ends in /v1.",
    )


def too_much(endpoint: Endpoint) -> UserError:
    return UserError(
        f"{named(endpoint)} sent more than {MAX_BYTES / 1e6:.0f} MB, and the rest was not read.",
        "Request a shorter answer.",
    )


def too_long(endpoint: Endpoint) -> UserError:
    return UserError(
        f"{named(endpoint)} did not finish within {TOTAL_S / 60:.0f} minutes.", "Request a shorter answer."
    )


def redirected(endpoint: Endpoint, status: int) -> UserError:
    return UserError(
        f"{named(endpoint)} redirects to another address (HTTP {status}), which is not followed.",
        "Give the final address of the server, often https:// in place of http://.",
    )


def cut(endpoint: Endpoint) -> UserError:
    return UserError(
        f"{named(endpoint)} ended the connection in the middle of its answer.",
        "Check the server's own log: it may have run out of memory or been restarted. Then run again.",
    )


def not_the_api(endpoint: Endpoint) -> UserError:
    return UserError(
        f"{named(endpoint)} answered in a form that is not OpenAI's API.",
        "Check the address, which usually ends in /v1, and that nothing else listens there.",
    )


def explain(error: BaseException, endpoint: Endpoint) -> UserError:
    """What the client, or something below it, raised."""
    import httpx2
    import openai

    chain = list(_chain(error))
    if own := next((e for e in chain if isinstance(e, UserError)), None):
        return own
    if isinstance(error, openai.APIStatusError):
        return _of_status(error, endpoint)
    if any(isinstance(e, ssl.SSLError) or "SSL" in str(e) or "CERTIFICATE" in str(e) for e in chain):
        return UserError(
            f"The TLS connection to {named(endpoint)} failed: {_reason(chain)}.",
            "Check that it speaks https and that its certificate is valid; SSL_CERT_FILE names the file of a private authority.",
        )
    if any(isinstance(e, (httpx2.ConnectTimeout, httpx2.ConnectError)) for e in chain):
        return UserError(
            f"{named(endpoint)} cannot be reached: {_reason(chain)}.",
            "Start the server, and check host and port of its address.",
        )
    if any(isinstance(e, httpx2.TimeoutException) for e in chain) or isinstance(
        error, openai.APITimeoutError
    ):
        return UserError(
            f"{named(endpoint)} sent nothing for {READ_S:.0f} s.",
            "It may be loading the model or be busy with others: try again when it is ready.",
        )
    if any(isinstance(e, (httpx2.ProtocolError, httpx2.NetworkError)) for e in chain):
        return cut(endpoint)
    if isinstance(error, openai.APIError) and not isinstance(error, openai.APIConnectionError):
        return UserError(
            f"{named(endpoint)} reported an error{_quoted(error.message, endpoint)}.",
            "Check the server's own log.",
        )
    return not_the_api(endpoint)


def _of_status(error: object, endpoint: Endpoint) -> UserError:
    status, name, words = error.status_code, named(endpoint), _quoted(_message(error), endpoint)
    if status in (401, 403):
        where = endpoint.key_variable
        how = (
            f"Set {where} to a valid key, then restart."
            if where
            else (
                "List the server in COMPARATOR_ENDPOINTS, and its key in COMPARATOR_ENDPOINT_KEY_NAME: an address typed "
                "by hand is sent no key."
            )
        )
        return UserError(f"{name} refused access (HTTP {status}){words}.", how)
    if status == 429:
        return UserError(
            f"{name} accepts no more requests now (HTTP 429){words}.",
            "Wait, or raise its limit; then run again.",
        )
    kind = Refused if status in NOT_UNDERSTOOD else UserError
    if status == 404:
        return kind(
            f"{name} has no such model or path (HTTP 404){words}.",
            "Check that the address ends in /v1, and name one of its models after a #: http://host:8000/v1#model.",
        )
    if status >= 500:
        return kind(f"{name} failed (HTTP {status}){words}.", "Check the server's own log, then run again.")
    return kind(
        f"{name} refused the request (HTTP {status}){words}.",
        "Check the settings against what the server accepts.",
    )


def _message(error: object) -> str:
    body = getattr(error, "body", None)
    for _ in range(2):
        if isinstance(body, dict):
            body = body.get("message") or body.get("error") or body.get("detail")
    return body if isinstance(body, str) else ""


def _quoted(text: str, endpoint: Endpoint) -> str:
    """What the server says, as far as it can be shown: one line, shortened, without the key."""
    text = " ".join(str(text or "").split())
    if endpoint.key:
        text = text.replace(endpoint.key, "…")
    text = text[:QUOTED].rstrip(". ")
    return f": “{text}”" if text else ""


def _reason(chain: list[BaseException]) -> str:
    reason = next((str(e) for e in reversed(chain) if str(e)), "no reason was given")
    return " ".join(reason.split())[:QUOTED].rstrip(".")


def _chain(error: BaseException | None):
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__
