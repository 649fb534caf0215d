"""Votes on saved comparisons: kept beside the document, part of it when it leaves, lost by nothing that happens to it."""

from __future__ import annotations

import threading

import pytest
from store_helpers import asked

from comparator.comparison import ballots
from comparator.core import document
from comparator.core.errors import UserError
from comparator.core.result import CellResult
from comparator.core.votes import Vote, Votes
from comparator.reporting import export
from comparator.store import Deleted, open_store
from comparator.store.voting import change_votes


def cells(*texts: str) -> tuple[CellResult, ...]:
    return tuple(CellResult(f"v{n}", text=text) for n, text in enumerate(texts))


def vote(store, id: str, visitor: str, choice="left"):
    ballot = ballots.next_ballot(store.load(id), visitor)
    return change_votes(store, id, lambda now: ballots.cast(now, ballot, choice, visitor))


def saved(store, *texts: str, owner: str | None = None) -> str:
    from tests.sample import comparison

    return store.save(comparison(cells=cells(*texts), reference=None), owner)


def test_votes_outlast_the_process_and_leave_the_document_as_it_was(settings):
    with open_store(settings) as store:
        id = saved(store, "one", "two", "three")
        path = settings.data_dir / "comparisons" / f"{id}.json"
        before = path.read_bytes()
        after = vote(store, id, "a", "tie")
        assert after.votes and len(after.votes.votes) == 1 and after == store.load(id)
    with open_store(settings) as store:
        assert store.load(id) == after and path.read_bytes() == before
        store.rename(id, "A name")
        store.reindex()
        assert store.load(id).votes == after.votes, "a rename or a new index loses votes"


def test_whoever_has_the_link_may_vote_but_not_on_what_was_deleted(public):
    with open_store(public) as store:
        id = saved(store, "one", "two", owner="o" * 22)
        assert len(vote(store, id, "stranger").votes.votes) == 1
        store.delete(id, "o" * 22)
        with pytest.raises(Deleted):
            change_votes(store, id, lambda now: Votes())


def test_votes_of_many_at_once_are_all_counted(settings):
    with open_store(settings) as store:
        id = saved(store, "one", "two")
        threads = [threading.Thread(target=vote, args=(store, id, f"v{n}")) for n in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        votes = store.load(id).votes
    assert sorted(v.visitor for v in votes.votes) == sorted(f"v{n}" for n in range(8))
    assert sum(s.votes for s in votes.totals) == 16


def test_a_document_takes_its_votes_along(settings, tmp_path):
    with open_store(settings) as store:
        id = saved(store, "one", "two")
        vote(store, id, "a")
        file = export.write(store.load(id), tmp_path / "result.json")
        again = store.import_file(file)
        assert store.load(again).votes == store.load(id).votes
        assert len(vote(store, again, "b").votes.votes) == 2 and len(store.load(id).votes.votes) == 1
        assert document.loads(store.folder.read_document(again, 10**6)).votes is None


def test_totals_of_a_strangers_document_are_computed_here(settings, tmp_path):
    from dataclasses import replace

    forged = Votes((Vote(0, 0, 1, "left", "a"),), ())
    whole = replace(asked("Hello"), cells=cells("one", "two"), votes=forged)
    (tmp_path / "forged.json").write_text(document.dumps(whole))
    with open_store(settings) as store:
        loaded = store.load(store.import_file(tmp_path / "forged.json"))
    assert [(s.label, s.won) for s in loaded.votes.totals] == [("v0", 1), ("v1", 0)]


@pytest.mark.parametrize(
    "vote",
    [Vote(0, 0, 2, "left", "a"), Vote(1, 0, 1, "left", "a"), Vote(0, 1, 1, "left", "a"), Vote(0, -1, 0, "left", "a"),
     Vote(0, 0, 1, "left", "a" * 65), Vote(0, 0, 1, "both", "a")],
)  # fmt: skip
def test_votes_that_are_not_on_the_document_are_refused_and_a_damaged_sidecars_are_left_out(settings, vote):
    from dataclasses import replace

    bad = replace(asked("Hello"), cells=cells("one", "two"), votes=Votes((vote,)))
    with pytest.raises(UserError, match="damaged"):
        document.loads(document.dumps(bad))
    with open_store(settings) as store:
        id = saved(store, "one", "two")
        store.update(id, lambda sidecar: replace(sidecar, votes=Votes((vote,))))
        assert store.load(id).votes is None


def test_the_most_votes_and_reasons_fit_into_a_sidecar(settings):
    from comparator.core import votes as core
    from comparator.store.files import MAX_SIDECAR_BYTES, Sidecar, format_sidecar, summarize

    why = "\U0001f600" * core.LONGEST_REASON  # twelve bytes each, escaped
    all_votes = tuple(Vote(1999, 30, 31, "right", "f" * 12) for _ in range(core.MOST_VOTES))
    judged = tuple(
        core.Judgement(1999, 30, 31, "right", "right", (why, why)) for _ in range(core.MOST_JUDGEMENTS)
    )
    full = Votes(all_votes, judges=(core.Judge("m" * 200, "c" * 200, "i" * 3000, judged),))
    size = len(
        format_sidecar(Sidecar("o" * 32, "now", "n" * 200, summary=summarize(asked("€" * 9000)), votes=full))
    )
    assert size < MAX_SIDECAR_BYTES, f"{size:,} bytes: it would be written and never read again"
