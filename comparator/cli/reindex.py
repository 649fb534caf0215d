"""`reindex`: rebuild the index of saved comparisons from their documents."""

from __future__ import annotations


def reindex() -> None:
    """Rebuild the index of saved comparisons. No data is lost."""
    from comparator.core.settings import get_settings
    from comparator.store import open_store

    with open_store() as store:
        count = store.reindex()
    print(
        f"The index holds {count} saved comparison{'' if count == 1 else 's'} of {get_settings().data_dir}."
    )
