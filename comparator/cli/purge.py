"""`purge`: remove deleted comparisons permanently."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from comparator.cli.options import AsJson, print_json

EXAMPLES = (
    "Examples:\n\n  python -m comparator purge --dry-run\n\n  python -m comparator purge --older-than 30\n\n"
    "  python -m comparator purge --kept-too ID"
)
_HUB_WAIT_S = 60.0


def purge(
    ids: Annotated[
        list[str] | None, typer.Argument(metavar="[ID]...", help="Only these comparisons.")
    ] = None,
    older_than: Annotated[
        float, typer.Option(metavar="DAYS", min=0, help="Only those deleted at least this many days ago.")
    ] = 0,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only list what would be removed.")] = False,
    kept_too: Annotated[
        bool, typer.Option("--kept-too", help="Remove the named comparisons even if they were not deleted.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Remove deleted comparisons permanently: document, name and owner, row of the history, copy on the Hub."""
    from comparator.cli.tables import printable
    from comparator.core.errors import UserError
    from comparator.store import open_store
    from comparator.store import purge as purging

    if kept_too and not ids:
        raise UserError("--kept-too needs the ids of comparisons.", "List the ids to remove after it.")
    with open_store() as store:
        if ids:
            chosen = [id for id in dict.fromkeys(ids) if _check(store, id, older_than, kept_too)]
        else:
            chosen = purging.due(store, purge_days=older_than)

        def is_due(sidecar) -> bool:
            if sidecar.deleted_at is None:
                return kept_too
            return purging.is_due(sidecar.deleted_at, "", "", purge_days=older_than)

        if dry_run:
            if as_json:
                print_json({"dry_run": True, "ids": chosen})
                return
            for id in chosen:
                print(f"{id}  {printable(_about(store, id))}")
            print(f"{_count(len(chosen))} would be removed permanently.")
            return
        removed = purging.purge(store, chosen, is_due)
        on_hub = store.remote is not None and not store.remote.wait(_HUB_WAIT_S)
    if as_json:
        print_json({"dry_run": False, "ids": removed, "still_on_hub": on_hub})
    else:
        print(f"{_count(len(removed))} removed permanently.")
    if on_hub:
        print(
            "Copies on the Hub still exist: the Hub cannot be written to now. The app removes them as soon as it can, "
            "and so does the next purge.",
            file=sys.stderr,
        )


def _check(store, id: str, older_than: float, kept_too: bool) -> bool:
    """Whether a named comparison is to be removed. Raises `UserError` for one that was not deleted, or not long enough ago."""
    from comparator.core.errors import UserError
    from comparator.store.links import check_id
    from comparator.store.purge import is_due, unfinished

    if check_id(id) in unfinished(store):
        return True
    if kept_too and store.folder.document_path(id).exists():
        return True  # a damaged one too
    deleted_at = store.entry(id).deleted_at
    if deleted_at is None and not kept_too:
        raise UserError(
            f"{id} was not deleted, so nothing was removed.",
            "Delete it in the history first, or add --kept-too.",
        )
    if deleted_at is not None and not is_due(deleted_at, "", "", purge_days=older_than):
        raise UserError(
            f"{id} was deleted on {deleted_at[:10]}, less than {older_than:g} days ago; nothing was removed.",
            "Leave out --older-than.",
        )
    return True


def _about(store, id: str) -> str:
    from comparator.core.errors import UserError

    try:
        entry = store.entry(id)
    except UserError:
        return "a removal that was interrupted"
    when = f"deleted {entry.deleted_at[:10]}" if entry.deleted_at else "not deleted"
    return f"{when}  {entry.model}  {entry.name or entry.prompt[:60]}".replace("\n", " ")


def _count(number: int) -> str:
    return f"{number} comparison{'' if number == 1 else 's'}"
