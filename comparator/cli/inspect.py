"""`layers`, `variants`, `show`: looking at what there is. Only `layers` loads a model."""

from __future__ import annotations

import json
import shutil
import sys
import textwrap
from pathlib import Path
from typing import Annotated

import typer

from comparator.cli.ray import Address, use
from comparator.types import Problem

LAYERS_EXAMPLES = """Examples:

  python -m comparator layers -v nf4:dq --search "q_proj weight"

  python -m comparator layers -v bf16 -v int8 -o layers.csv"""
SHOW_EXAMPLES = """Examples:

  python -m comparator show result.json

  python -m comparator show result.json --output report.html

  python -m comparator show result.json --code nf4"""


def layers(
    variant: Annotated[
        list[str],
        typer.Option(
            "--variant", "-v", metavar="NOTATION", help="Which variant; may be given several times."
        ),
    ],
    model: Annotated[
        str | None,
        typer.Option("--model", "-m", help="The model. (default: COMPARATOR_MODEL, else smollm2-135m)"),
    ] = None,
    search: Annotated[
        str, typer.Option(help="Only rows with these words in name, class, dtype or device.")
    ] = "",
    output: Annotated[
        Path | None, typer.Option("--output", "-o", metavar="FILE", help="Write the rows: .csv or .json.")
    ] = None,
    max_memory: Annotated[
        str | None, typer.Option(metavar="0=6GiB,cpu=20GiB", help="Spread the model.")
    ] = None,
    ray: Address = None,
    verbose: Annotated[bool, typer.Option("--verbose", help="Show what the libraries log.")] = False,
) -> None:
    """Say how every tensor of a variant is really stored: a row a tensor, after the first use."""
    from comparator import api, figures, report
    from comparator.cli import tables
    from comparator.cli.run import carry_out

    if output:
        report.check_name(output, (".csv", ".json"))
    use(ray)
    # One token is the first use: what a library repacks has been repacked after it.
    request = api.request("Hello", variant, model, fidelity="none", max_new_tokens=1, max_memory=max_memory)
    comparison, stopped = carry_out(request, verbose, answers=False)
    for cell in comparison.cells:
        if cell.error:
            continue  # the progress has said it
        rows = report.matching(cell.layers, search)
        print(tables.printable(cell.label))
        print("".join(f"  {tables.printable(line)}\n" for line in figures.stored_as(cell)))
        print(f"{tables.layers_table(rows)}\n" if rows else f"No row contains “{search}”.\n")
    if output:
        json_wanted = output.suffix.lower() == ".json"
        text = (
            report.to_layers_json(comparison, search)
            if json_wanted
            else report.to_layers_csv(comparison, search)
        )
        report.write_text(output.expanduser(), text)
        print(f"Wrote {output}", file=sys.stderr)
    raise typer.Exit(130 if stopped else 0 if comparison.ok else 1)


def variants(
    as_json: Annotated[bool, typer.Option("--json", help="As JSON, for programs.")] = False,
) -> None:
    """List every method with its options, and say which are missing something here."""
    listed = described()
    if as_json:
        print(json.dumps(listed, indent=1, ensure_ascii=False))
        return
    for method in listed:
        print(_wrapped(f"{method['method']:<8}{method['title']}. {method['summary']}", 8))
        if method["unavailable"]:
            print(_wrapped(f"        Not possible here: {method['unavailable']}", 8))
        for option in method["options"]:
            print(_wrapped(f"        {option['written']:<16} {option['help']} {_details(option)}", 25))
        for line in method["here"]:
            print(_wrapped(f"        {line}", 10))
        print()
    print("A variant is METHOD[@SOURCE][:option,option…], for example nf4:dq,compute=fp16.")


def _wrapped(text: str, indent: int) -> str:
    width = max(60, min(shutil.get_terminal_size().columns, 110))
    return textwrap.fill(text, width, subsequent_indent=" " * indent, break_on_hyphens=False)


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
        parts.append(f"transformers' own default is {option['transformers_default']}")
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
            "unavailable": backend.unavailable(),
            "here": backend.here(),
            "presets": list(method.presets or (method.name,)),
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
            "--output", "-o", metavar="FILE", help="Write it as .json, .csv, .layers.csv, .md or .html."
        ),
    ] = None,
    code: Annotated[
        str | None,
        typer.Option(
            metavar="COLUMN",
            help="Print the transformers code that reproduces this column, and nothing else.",
        ),
    ] = None,
) -> None:
    """Print a saved comparison, or write it in another form."""
    from comparator import document, report
    from comparator.cli import tables

    for path in output or []:
        report.check_name(path)
    comparison = document.read(file)
    if code is not None:
        from comparator.code import snippet

        column = next((c for c in comparison.cells if c.label == code), None)
        if column is None:
            labels = ", ".join(c.label for c in comparison.cells)
            raise Problem(f"There is no column “{code}” in {file.name}.", f"Its columns are {labels}.")
        print(snippet(column, comparison), end="")
        return
    for name, value in report.headline(comparison):
        print(f"{name:<10} {tables.printable(value)}")
    print(f"\n{tables.printable(comparison.prompt.text)}\n")
    for cell in comparison.cells:
        if cell.text:
            print(f"── {tables.printable(cell.label)}\n{tables.printable(cell.text)}\n")
    print(tables.comparison_table(comparison), end="")
    for path in output or []:
        report.write(comparison, path)
        print(f"Wrote {path}", file=sys.stderr)
