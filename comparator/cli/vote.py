"""`vote`: blind votes in the terminal, on a saved comparison or on a document in a file."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, redirect_stdout
from dataclasses import asdict, replace
from pathlib import Path
from typing import Annotated

import typer

from comparator.cli.options import AsJson, print_json
from comparator.core.errors import UserError
from comparator.core.result import Comparison
from comparator.core.votes import Choice, Votes, pseudonym

EXAMPLES = """Examples:

  python -m comparator run --prompts everyday -v bf16 -v int8 -v nf4 \\
      -o set.json

  python -m comparator vote set.json

  python -m comparator vote set.json --results

A saved comparison is named by its id: what follows ?c= in its link."""
KEYS: dict[str, Choice] = {"1": "left", "2": "right", "3": "tie", "4": "bad"}
HINT = "1 left is better, 2 right is better, 3 tie, 4 both bad, s skip, n show the names, q quit: "
Change = Callable[[Callable[[Comparison], Votes]], Comparison]


def vote(
    comparison: Annotated[
        str, typer.Argument(metavar="ID|FILE", help="A saved comparison's id, or a document (.json).")
    ],
    voter: Annotated[
        str,
        typer.Option(metavar="NAME", help="Name of the voter, if several people vote on one machine."),
    ] = "",
    results: Annotated[
        bool, typer.Option("--results", help="Print the win rates and do not ask for votes.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Vote on pairs of answers without knowing which variant gave them, then see win rates with confidence intervals."""
    with opened(comparison) as (shown, change):
        if not results:
            # stdout is for the document then, so the pairs are shown on stderr
            with redirect_stdout(sys.stderr) if as_json else nullcontext():
                shown = _ask(shown, change, pseudonym(shown.id, f"terminal {voter}"))
        _print_results(shown, as_json)


@contextmanager
def opened(named: str) -> Iterator[tuple[Comparison, Change]]:
    """(the comparison, what puts other votes into it and returns it again). Raises `UserError`."""
    from comparator.core import document
    from comparator.reporting import export
    from comparator.store import open_store
    from comparator.store.voting import change_votes

    if named.endswith(".json"):
        path = Path(named).expanduser()

        def in_file(change: Callable[[Comparison], Votes]) -> Comparison:
            before = document.read(path)
            after = replace(before, votes=change(before))
            export.write_text(path, export.to_json(after))
            return after

        yield document.read(path), in_file
        return
    with open_store() as store:
        yield store.load(named), lambda change: change_votes(store, named, change)


def _ask(comparison: Comparison, change: Change, visitor: str) -> Comparison:
    """Votes until there is no pair left, or until "q" or the end of the input."""
    from comparator.comparison import ballots

    skipped: list[ballots.Ballot] = []
    hidden: dict[int, str] = {}  # names that wait, by column
    while ballot := ballots.next_ballot(comparison, visitor, skipped):
        _print_ballot(comparison, ballot, len(ballots.left_for(comparison, visitor, skipped)))
        key = _key()
        if key == "q":
            break
        if key == "s":
            skipped.append(ballot)
            continue
        sides = {"left": ballot.left, "right": ballot.right}
        names = {number: comparison.cells[number].label for number in sides.values()}
        if key == "n":  # seen, so no vote on these answers would be blind
            _print_names(sides, hidden | names)
            skipped += ballots.of_prompt(comparison, visitor, ballot.prompt)
            continue
        choice = KEYS[key]
        comparison = change(lambda now, b=ballot, c=choice: ballots.cast(now, b, c, visitor))
        if ballots.names_wait(comparison, visitor, ballot.prompt, skipped):
            hidden |= names
            print("Vote recorded. The names are shown after the last pair of these answers.")
        else:
            _print_names(sides, hidden | names)
            hidden = {}
    else:
        print("No pair is left to vote on.")
    return comparison


def _key() -> str:
    while True:
        print(HINT, end="", file=sys.stderr, flush=True)
        line = sys.stdin.readline() if sys.stdin else ""
        key = line.strip().lower()[:1]
        if not line:
            print(file=sys.stderr)
        if not line or key in {*KEYS, "s", "n", "q"}:
            return key or "q"


def _print_ballot(comparison: Comparison, ballot, count: int) -> None:
    from rich import box
    from rich.table import Table
    from rich.text import Text

    from comparator.cli import tables
    from comparator.comparison import ballots

    texts = ballots.answers(comparison, ballot.prompt)
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, header_style="bold")
    for title in ("left", "right"):
        table.add_column(title, ratio=1, overflow="fold")
    table.add_row(
        *(Text(tables.printable(texts[n] or "") or "(empty answer)") for n in (ballot.left, ballot.right))
    )
    spoken = [
        f"{role}: {tables.printable(text)}" if role != "user" else tables.printable(text)
        for role, text in ballots.turns(comparison, ballot.prompt)
    ]
    left = "1 pair is left." if count == 1 else f"{count:,} pairs are left."
    print(
        tables.to_text("", *map(Text, spoken), Text(left, style="dim"), "", table, width=tables.prose_width())
    )


def _print_names(sides: dict[str, int], names: dict[int, str]) -> None:
    from comparator.cli.tables import printable

    shown = [f"{side} was {names[number]}" for side, number in sides.items()]
    others = [label for number, label in names.items() if number not in sides.values()]
    also = f"; the other{'s were' if others[1:] else ' was'} {', '.join(others)}" if others else ""
    print(printable(f"{', '.join(shown)}{also}."))


def _print_results(comparison: Comparison, as_json: bool) -> None:
    from comparator.cli import tables
    from comparator.comparison.standings import standings

    text = tables.votes_table(comparison) + tables.judges_table(comparison)
    if not text:
        raise UserError("There are no votes yet.", "Vote without --results.")
    if as_json:
        print_json(asdict(replace(comparison.votes, totals=standings(comparison))))
    else:
        print(text, end="")
