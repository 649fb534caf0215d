"""`backup` and `restore`: what cannot be made again, as one file."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from comparator.cli.options import AsJson, print_json

BACKUP_EXAMPLES = "Example:\n\n  python -m comparator backup comparisons.tar.gz"
RESTORE_EXAMPLES = (
    "Examples:\n\n  python -m comparator restore comparisons.tar.gz\n\n"
    "  python -m comparator restore comparisons.tar.gz --into /tmp/inspect"
)


def backup(
    file: Annotated[Path, typer.Argument(metavar="FILE.tar.gz", help="A new file.")],
    as_json: AsJson = False,
) -> None:
    """Write saved comparisons, trained adapters and the records of unfinished trainings into one file."""
    from comparator.store import backup as backups
    from comparator.store import open_store

    with open_store() as store:
        file = file.expanduser().absolute()
        report = backups.write(store, _kinds(), file)
    size = file.stat().st_size
    if as_json:
        print_json({"file": str(file), "bytes": size, **_plain(report)})
    else:
        print(f"{_counts(report)} are in {file} ({size / 1e6:,.1f} MB).")


def restore(
    file: Annotated[Path, typer.Argument(metavar="FILE.tar.gz", help="A file written by `backup`.")],
    into: Annotated[
        Path | None, typer.Option(metavar="FOLDER", help="Another data folder; created if it is missing.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Restore what a backup contains and the data folder does not. Nothing is overwritten."""
    import sys

    from comparator.cli.tables import printable
    from comparator.core.settings import get_settings
    from comparator.store import backup as backups
    from comparator.store import open_store

    settings = get_settings()
    if into is not None:
        other = {"data_dir": into.expanduser().absolute(), "index_dir": None, "hub_storage": None}
        settings = settings.model_copy(update=other)
    with open_store(settings) as store:
        report = backups.restore(store, _kinds(), file.expanduser().absolute())
        store.count()  # makes the index
    if as_json:
        refused = [{"name": name, "reason": reason} for name, reason in report.refused]
        more = {"skipped": report.there, "refused": refused}
        print_json({"folder": str(settings.data_dir), **_plain(report), **more})
    else:
        print(f"{_counts(report)} were restored into {settings.data_dir}.")
        if report.there:
            print(f"Left unchanged, because they already exist: {len(report.there)}.")
    for name, reason in report.refused:
        print(f"Not restored: {printable(name)}: {printable(reason)}", file=sys.stderr)
    if report.refused:
        raise typer.Exit(1)


def _kinds() -> dict[str, tuple[str, ...]]:
    """The folders of the data folder that are kept, and which of their files.

    Checkpoints of a training are left out: they hold pickled optimizer states, and a pickle in a file that may come
    from anybody can run code.
    """
    from comparator.training import artifact, run_store

    return {"adapters": artifact.FILES, "trainings": run_store.RECORDS}


def _plain(report) -> dict[str, int]:
    return {"comparisons": report.comparisons, **report.folders}


def _counts(report) -> str:
    words = [(report.comparisons, "comparison"), (report.folders["adapters"], "adapter")]
    words += [(report.folders["trainings"], "training record")]
    parts = [f"{count} {word}{'' if count == 1 else 's'}" for count, word in words]
    return f"{', '.join(parts[:-1])} and {parts[-1]}"
