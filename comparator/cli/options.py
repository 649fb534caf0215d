"""Options that several commands have. `--ray` moves a command's work to a Ray cluster; imports no Ray."""

from __future__ import annotations

import json
import os
from typing import Annotated, Any

import typer

PANEL = "Cluster"


def notations(incomplete: str) -> list[str]:
    """For a shell: the variants that begin like this, each method's usual options included."""
    from comparator.backends import methods

    known = [name for _, method in methods().values() for name in (method.name, *method.ready_notations)]
    return [name for name in dict.fromkeys(known) if name.startswith(incomplete)]


Model = Annotated[
    str | None,
    typer.Option("--model", "-m", metavar="NAME", help="Model. (default: COMPARATOR_MODEL or smollm2-135m)"),
]
Verbose = Annotated[bool, typer.Option("--verbose", help="Show log messages of the libraries.")]
Quiet = Annotated[
    bool, typer.Option("--quiet", "-q", help="Print no progress, only the result and failures.")
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON on stdout instead of text and tables.")]
Address = Annotated[
    str | None,
    typer.Option(
        "--ray",
        metavar="ADDRESS",
        rich_help_panel=PANEL,
        help="Run on a Ray cluster: auto, HOST:PORT or ray://HOST:PORT. (default: COMPARATOR_RAY_ADDRESS or this "
        "machine)",
    ),
]


def print_json(value: Any) -> None:
    """Print what `--json` promises: one document on stdout; a number that JSON has no word for (NaN) is null."""
    plain = json.loads(json.dumps(value), parse_constant=lambda _: None)
    print(json.dumps(plain, indent=1, ensure_ascii=False))


def use(address: str | None) -> None:
    """Set the address for this process and its child processes."""
    if address is None:
        return
    from comparator.core.settings import get_settings
    from comparator.engines import get_engine

    os.environ["COMPARATOR_RAY_ADDRESS"] = address
    get_settings.cache_clear()
    get_engine.cache_clear()
