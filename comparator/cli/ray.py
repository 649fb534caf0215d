"""`--ray`: the option that moves a command's work to a Ray cluster. Imports no Ray."""

from __future__ import annotations

import os
from typing import Annotated

import typer

PANEL = "Cluster"
Address = Annotated[
    str | None,
    typer.Option(
        "--ray",
        metavar="ADDRESS",
        rich_help_panel=PANEL,
        help="Run on a Ray cluster: auto, HOST:PORT or ray://HOST:PORT. (default: COMPARATOR_RAY_ADDRESS, else this "
        "machine)",
    ),
]


def use(address: str | None) -> None:
    """What the variable says, for this process and whatever it starts."""
    if address is None:
        return
    from comparator.engine import get_engine
    from comparator.settings import get_settings

    os.environ["COMPARATOR_RAY_ADDRESS"] = address
    get_settings.cache_clear()
    get_engine.cache_clear()
