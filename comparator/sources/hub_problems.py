"""What huggingface_hub raises → a `UserError`. No token, header or URL of a request reaches a message."""

from __future__ import annotations

import os
import re

from comparator.core.errors import UserError
from comparator.core.settings import get_settings
from comparator.sources.hub_login import logins_are_possible
from comparator.util import formatting


class Unreachable(UserError):
    """The Hub does not answer: what was downloaded earlier may still serve."""


def explain(error: BaseException, repo: str, revision: str | None) -> UserError:
    from huggingface_hub import errors

    if isinstance(error, UserError):
        return error
    if isinstance(error, errors.LocalEntryNotFoundError) and isinstance(
        error.__cause__, errors.HfHubHTTPError
    ):
        error = error.__cause__  # the Hub answered, and this is what it said
    status = getattr(getattr(error, "response", None), "status_code", None)
    if isinstance(error, errors.OfflineModeIsEnabled):
        return Unreachable(
            f"Hub access is turned off here (HF_HUB_OFFLINE), and {repo} is not on this machine.",
            "Unset HF_HUB_OFFLINE, or use the built-in model or a local folder.",
        )
    if status == 401 and "invalid" in str(error).lower():
        return UserError(
            "The Hub does not accept the token that is set here.",
            "Set HF_TOKEN to a valid token, or unset it: public models need none.",
        )
    if isinstance(error, errors.EntryNotFoundError) and status == 404:
        return UserError(
            f"The Hub lists a file of {repo} that it does not serve.", "Try again, or name another revision."
        )
    if isinstance(error, errors.GatedRepoError) or (
        status == 403 and not isinstance(error, errors.RepositoryNotFoundError)
    ):
        return UserError(
            f"{repo} is gated: its author must grant access first.",
            f"Ask for access at https://huggingface.co/{repo}, then {_then()}",
        )
    if isinstance(error, errors.RevisionNotFoundError):
        return UserError(
            f"{repo} has no revision “{revision}”.",
            "Remove everything after the @, or name a branch, tag or commit.",
        )
    if isinstance(error, errors.RepositoryNotFoundError) or status in (401, 404):
        return UserError(
            f"The Hub has no model {repo} that you can access.",
            f"Check the spelling (user/name). If it is private or gated, {_then()}",
        )
    if isinstance(error, errors.HFValidationError):
        return UserError(f"“{repo}” is not a valid name of a Hub repo.", "It looks like user/name.")
    if status == 429:
        return Unreachable("The Hub's rate limit is reached.", "Wait a few minutes, or set HF_TOKEN.")
    if status is not None and status >= 500:
        return Unreachable(f"The Hub reported a server error (HTTP {status}).", "Try again in a while.")
    if isinstance(error, errors.LocalEntryNotFoundError | TimeoutError | ConnectionError) or _is_connection(
        error
    ):
        return Unreachable(
            f"The Hub cannot be reached, and {repo} is not on this machine.",
            "Check the network, or use the built-in model or a local folder.",
        )
    text = re.sub(r"hf_\w+", "hf_…", formatting.first_line(error, 200))
    return UserError(
        f"{repo} cannot be downloaded: {text}",
        "Try again; if it keeps failing, download it manually into a folder.",
    )


def _is_connection(error: BaseException) -> bool:
    """httpx's and requests' own errors, whichever huggingface_hub uses: by name, as neither is ours to import."""
    names = {c.__name__ for c in type(error).__mro__}
    return bool(
        names
        & {"TransportError", "RequestError", "ConnectError", "TimeoutException", "NetworkError", "Timeout"}
    )


def _then() -> str:
    """What to do about a repo that wants a login, and whether a token is set; never the token."""
    if logins_are_possible():
        return "log in with that account: the button is at the top of the page."
    if get_settings().public:
        return "use it on your own machine: this server asks the Hub without a login."
    return "set HF_TOKEN to a token of an account that can read it, and restart. " + _token_state()


def _token_state() -> str:
    """Whether a token is set; never the token."""
    return "A token is set already." if os.environ.get("HF_TOKEN") else "No token is set now."
