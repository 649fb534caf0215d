"""`reindex`: rebuild the index of saved comparisons from their documents."""

from __future__ import annotations

from comparator.cli.options import AsJson, print_json


def reindex(as_json: AsJson = False) -> None:
    """Rebuild the index of saved comparisons. No data is lost."""
    from comparator.core.settings import get_settings
    from comparator.store import open_store

    with open_store() as store:
        count = store.reindex()
    folder = get_settings().data_dir
    if as_json:
        print_json({"folder": str(folder), "comparisons": count})
    else:
        print(f"The index has {count} saved comparison{'' if count == 1 else 's'} of {folder}.")
