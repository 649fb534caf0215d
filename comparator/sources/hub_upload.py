"""A folder → a repo on the Hub. No token reaches a message."""

from __future__ import annotations

import re
from pathlib import Path

from comparator.core.errors import UserError
from comparator.core.settings import get_settings
from comparator.sources import hub_problems


def check(repo: str, token: str | None = None) -> None:
    """Before anything is made: raises `UserError` for what is no repo's name, and where there is no token.

    token: of this upload alone; None is this machine's own login.
    """
    from huggingface_hub import get_token

    if not re.fullmatch(r"[\w.-]+/[\w.-]+", repo):
        raise UserError(f"“{repo}” is not the name of a Hub repo.", "Use the form user/name.")
    if not (token or get_token()):
        raise UserError("Uploading needs a token.", "Set HF_TOKEN to a token with write access.")


def push(
    folder: Path,
    repo: str,
    message: str,
    *,
    private: bool | None = None,
    token: str | None = None,
    only: list[str] | None = None,
    what: str = "The checkpoint",
) -> str:
    """Upload the folder, or the files that match `only`; returns the address. `what`: the content, in a message.

    Raises `UserError` without the library's message, which contains the request and thus the token.
    """
    from huggingface_hub import HfApi

    check(repo, token)
    try:
        api = HfApi(token=token)
        api.create_repo(repo, exist_ok=True, private=private)
        api.upload_folder(repo_id=repo, folder_path=folder, allow_patterns=only, commit_message=message)
    except Exception as error:
        problem = hub_problems.explain(error, repo, None)
        where = "" if get_settings().public else f" {what} is in {folder}."  # a path of the server
        raise UserError(f"{problem.problem}{where}", problem.advice) from None
    return f"https://huggingface.co/{repo}"
