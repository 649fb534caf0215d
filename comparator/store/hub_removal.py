"""Removes the copies on the Hub of comparisons that were purged here, from the repo's history too.

A repo is a git repository: a file that a commit deletes can still be read in the commits before it. So the history is
squashed into one commit afterwards. Until both are done the comparison's mark in the data folder stays, and it is tried
again.
"""

from __future__ import annotations

from collections.abc import Callable

from comparator.store.files import Folder

BATCH = 100  # comparisons in one commit


def remove_copies(
    repo: str,
    folder: Folder,
    retrying: Callable[[Callable[[], None]], None],
    path_of: Callable[[str, str], str],
) -> int:
    """One commit that removes the copies of what is being purged; returns how many comparisons that were.

    Args:
        repo: The dataset repo, user/name.
        folder: The data folder, which has the marks.
        retrying: Calls a function, again after a passing failure.
        path_of: (id, ending) → path in the repo.

    Raises what the Hub's client raises; the marks of this batch then stay.
    """
    ids = [id for id in folder.purging() if not folder.document_path(id).exists()][:BATCH]
    if not ids:
        return 0
    from huggingface_hub import CommitOperationDelete, HfApi
    from huggingface_hub.errors import RepositoryNotFoundError

    api = HfApi()
    paths = [path_of(id, end) for id in ids for end in (".json", ".meta.json")]

    def work() -> None:
        try:
            # Deleting a file that is not there would fail the whole commit.
            there = [info.path for info in api.get_paths_info(repo, paths, repo_type="dataset")]
        except RepositoryNotFoundError:
            return  # there are no copies
        if there:
            message = f"{len(ids)} comparison{'s' if len(ids) > 1 else ''} removed"
            operations = [CommitOperationDelete(path) for path in there]
            api.create_commit(repo, operations, commit_message=message, repo_type="dataset")
        api.super_squash_history(
            repo, repo_type="dataset"
        )  # also where an earlier attempt failed before this

    retrying(work)
    for id in ids:
        folder.end_purge(id)
    return len(ids)
