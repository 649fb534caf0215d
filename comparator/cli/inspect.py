"""`layers`, `variants`, `show`. Only `layers` loads a model."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from comparator.cli.options import Address, AsJson, Model, Quiet, Verbose, notations, print_json, use
from comparator.core.errors import UserError
from comparator.core.variant import Variant

LAYERS_EXAMPLES = """Examples:

  python -m comparator layers -v nf4:dq --search "q_proj weight"

  python -m comparator layers -v bf16 -v int8 -o layers.csv

Exit code: 0 if every variant succeeded, 1 if one failed,
2 for an invalid request, 130 after Ctrl-C."""
SHOW_EXAMPLES = """Examples:

  python -m comparator show result.json

  python -m comparator show result.json --output report.html

  python -m comparator show result.json --code nf4"""


def layers(
    variant: Annotated[
        list[str],
        typer.Option(
            "--variant", "-v", metavar="NOTATION", autocompletion=notations, help="Variant; repeatable."
        ),
    ],
    model: Model = None,
    search: Annotated[
        str, typer.Option(metavar="WORDS", help="Only rows with these words in name, class, dtype or device.")
    ] = "",
    output: Annotated[
        Path | None, typer.Option("--output", "-o", metavar="FILE", help="Write the rows: .csv or .json.")
    ] = None,
    max_memory: Annotated[
        str | None,
        typer.Option(metavar="LIMITS", help="Split the model across devices, for example 0=6GiB,cpu=20GiB."),
    ] = None,
    ray: Address = None,
    verbose: Verbose = False,
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> None:
    """List how every tensor of a variant is stored, one row per tensor, after the warm-up."""
    from comparator import api
    from comparator.cli import tables
    from comparator.cli.run import carry_out
    from comparator.reporting import csv_export, export, summary

    if output:
        export.check_name(output, (".csv", ".json"))
    use(ray)
    # One token is enough: libraries repack weights at the first forward pass.
    request = api.request(
        "Hello", variant, model, fidelity="none", max_new_tokens=1, repeats=1, max_memory=max_memory
    )
    comparison, stopped = carry_out(request, verbose, answers=False, silent=quiet)
    if as_json:
        print(csv_export.to_layers_json(comparison, search), end="")
    for cell in comparison.cells:
        if cell.error or as_json:
            continue  # errors are reported with the progress
        rows = summary.matching(cell.layers, search)
        print(tables.printable(cell.label))
        print("".join(f"  {tables.printable(line)}\n" for line in summary.stored_as(cell)))
        nothing = f"No row contains “{search}”." if cell.layers else "Nothing is known about its tensors."
        print(f"{tables.layers_table(rows)}\n" if rows else f"{nothing}\n")
    if output:
        json_wanted = output.suffix.lower() == ".json"
        text = (
            csv_export.to_layers_json(comparison, search)
            if json_wanted
            else csv_export.to_layers_csv(comparison, search)
        )
        export.write_text(output.expanduser(), text)
        print(f"Wrote {output}", file=sys.stderr)
    raise typer.Exit(130 if stopped else 0 if comparison.ok else 1)


def variants(
    as_json: AsJson = False,
) -> None:
    """List all methods with their options, and what is missing on this machine."""
    listed = described()
    if as_json:
        print_json(listed)
        return
    from comparator.cli.tables import pairs, prose_width, to_text

    for method in listed:
        reason = [f"Not possible here: {method['unavailable']}"] if method["unavailable"] else []
        if method["not_made_here"]:
            reason = [f"Ready-made only here: {method['not_made_here']}"]
        options = [
            (option["written"], f"{option['help']} {_details(option)}") for option in method["options"]
        ]
        print(to_text(
            pairs([(f"{method['method']:<7}", f"{method['title']}. {method['summary']}"), *(("", text) for text in reason)]),
            pairs([(f"{name:<16}", text) for name, text in options], 8),
            pairs([("", text) for text in method["here"]], 7),
            width=prose_width(),
        ))  # fmt: skip
    print("A variant is METHOD[@SOURCE][:option,option…], for example nf4:dq,compute=fp16.")


def _details(option: dict) -> str:
    parts = [f"default {option['default']}"] if option["default"] not in (None, "false") else []
    if option["default"] == "false":
        parts.append("off by default")
    if option["choices"]:
        parts.insert(0, f"one of {', '.join(option['choices'])}")
    low, high = option["minimum"], option["maximum"]
    if low is not None:
        parts.append(f"from {low:g}" + (f" to {high:g}" if high is not None else ""))
    if option["transformers_default"]:
        parts.append(f"transformers' default is {option['transformers_default']}")
    return f"({'; '.join(parts)})" if parts else ""


def described() -> list[dict]:
    """Every method and option as plain data, most precise first, from the backend classes."""
    from comparator.backends import methods

    return [
        {
            "method": method.name,
            "title": method.title,
            "summary": method.summary,
            "backend": backend.name,
            "unavailable": (missing := backend.unavailable()),
            "not_made_here": None if missing else backend.unavailable(Variant(method.name)),
            "here": backend.here(),
            "presets": list(method.ready_notations),
            "takes_source": method.takes_source,
            "options": [
                {
                    "name": option.name,
                    "written": option.example,
                    "help": option.help,
                    "kind": option.kind,
                    "default": option.default,
                    "choices": list(option.choices),
                    "minimum": option.minimum,
                    "maximum": option.maximum,
                    "transformers_default": option.transformers_default,
                }
                for option in method.options
            ],
        }
        for backend, method in methods().values()
    ]


def show(
    file: Annotated[Path, typer.Argument(help="A comparison document (.json).")],
    output: Annotated[
        list[Path] | None,
        typer.Option(
            "--output",
            "-o",
            metavar="FILE",
            help="Write as .json, .csv, .layers.csv, .md or .html; repeatable.",
        ),
    ] = None,
    code: Annotated[
        str | None,
        typer.Option(
            metavar="COLUMN",
            help="Print only the transformers code that reproduces this variant.",
        ),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Print a saved comparison, or convert it to another format."""
    from comparator.cli import tables
    from comparator.core import document
    from comparator.reporting import export, summary

    for path in output or []:
        export.check_name(path)
    comparison = document.read(file)
    if code is not None:
        from comparator.reporting.snippet import snippet

        column = next((c for c in comparison.cells if c.label == code), None)
        if column is None:
            labels = ", ".join(c.label for c in comparison.cells)
            raise UserError(f"{file.name} has no variant “{code}”.", f"Its variants are {labels}.")
        print(snippet(column, comparison), end="")
        return
    for path in output or []:
        export.write(comparison, path)
        print(f"Wrote {path}", file=sys.stderr)
    if as_json:
        print(document.dumps(comparison, indent=1))
        return
    facts = [(f"{name:<10}", value) for name, value in summary.headline(comparison)]
    print(tables.to_text(tables.pairs(facts)), end="")
    print(f"\n{tables.printable(comparison.prompt.text)}\n")
    for cell in comparison.cells:
        if cell.text:
            print(f"── {tables.printable(cell.label)}\n{tables.printable(cell.shown_text)}\n")
    print(tables.comparison_table(comparison), end="")
    print(tables.votes_table(comparison), end="")
    print(tables.judges_table(comparison), end="")
    print(tables.answer(comparison), end="")
