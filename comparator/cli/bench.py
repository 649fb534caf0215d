"""`bench`: speed of each decode path compared with stock `generate`. Logic is in comparator/benchmark/runner.py."""

from __future__ import annotations

import json
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from comparator.cli.options import AsJson, Model, Quiet, notations, print_json
from comparator.core.errors import UserError

if TYPE_CHECKING:
    from comparator.benchmark.types import Report

EXAMPLES = """Examples:

  python -m comparator bench -v bf16 -v int8 -v nf4 --new-tokens 32

  python -m comparator bench --shapes llama-8b -v bf16 -v nf4 \\
      --decode eager,graph --ttft 2048 -o bench.json

Exit code: 0 on success, 1 if a measurement failed, 2 for an invalid request."""


def bench(
    variant: Annotated[
        list[str] | None,
        typer.Option("--variant", "-v", "--variants", metavar="NOTATION", autocompletion=notations, help="Variant; repeatable, or a "
                     "list separated by spaces. (default: bf16 int8 nf4)"),
    ] = None,
    model: Model = None,
    shapes: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="Random weights with the shapes of llama-8b, llama-1b or llama-tiny instead of a model."),
    ] = None,
    decode: Annotated[
        str | None,
        typer.Option(metavar="PATHS", help="Comma-separated: eager, graph, compiled. (default: eager; on CUDA eager,graph)"),
    ] = None,
    prompt_tokens: Annotated[int, typer.Option(min=1, metavar="N", help="Prompt length in tokens.")] = 128,
    new_tokens: Annotated[int, typer.Option(min=2, metavar="N", help="Tokens to generate.")] = 128,
    batch: Annotated[
        int, typer.Option(min=1, metavar="N", help="Batch size; rates are totals of the batch.")
    ] = 1,
    pairs: Annotated[int, typer.Option(min=1, metavar="N", help="Alternating runs of stock generate and each path.")] = 3,
    ttft: Annotated[
        int, typer.Option(min=0, metavar="N", help="Also measure the time to first token at this prompt length, and a bare forward pass.")
    ] = 0,
    profile: Annotated[
        bool, typer.Option("--profile", help="Also profile each path by kernel.")
    ] = False,
    keep: Annotated[
        Path | None, typer.Option(metavar="FOLDER", help="Write the random weights here and keep them.")
    ] = None,
    output: Annotated[Path | None, typer.Option("--output", "-o", metavar="FILE", help="Also write the results as JSON.")] = None,
    scoring: Annotated[
        bool,
        typer.Option("--scoring", help="Measure scoring a text instead, compared with bare forward passes of both models."),
    ] = False,
    silent: Quiet = False,
    as_json: AsJson = False,
) -> None:  # fmt: skip
    """Benchmark each decode path against stock generate, alternating in one process."""
    from comparator.backends import resolve
    from comparator.benchmark import runner as benches
    from comparator.benchmark import types as benchmark_types
    from comparator.cli.progress import Progress
    from comparator.core.settings import get_settings
    from comparator.core.variant import Cell
    from comparator.deploy.limits import limits_of

    names = [n for text in variant or ["bf16 int8 nf4"] for n in text.split()]
    variants = [resolve(n) for n in names]
    limits = limits_of(get_settings())
    for each in variants:
        limits.check_cell(Cell(each))
    if not shapes:
        limits.check_source(model or _default_model())
    if scoring:
        from comparator.benchmark import scoring as benchmark_scoring
        from comparator.engines import get_engine

        with Progress(silent=silent) as progress:
            results = benchmark_scoring.run(
                get_engine(), model, variants, rounds=max(pairs, 3), on_progress=progress.status
            )
        whole = [r.to_dict() for r in results]
        _write(output, whole)
        if as_json:
            print_json(whole)
        else:
            print(benchmark_scoring.table(results), end="")
        raise typer.Exit(0)
    made: list[Path] = []
    try:
        if shapes and model:
            raise UserError("Both --shapes and --model are given.", "Use only one of them.")
        options = benchmark_types.Options(
            _paths(decode), prompt_tokens, new_tokens, pairs, ttft, batch=batch, profile=profile
        )
        report = None
        with Progress(silent=silent) as progress:
            if shapes:
                model, variants = random_shapes(shapes, variants, keep, made, progress.status)
            for report in benches.run(model or _default_model(), variants, options, progress.status):
                _write(output, report.to_dict())  # after each variant, so that an interruption loses nothing
        if as_json:
            print_json(report.to_dict())
        else:
            print(_shown(report), end="")
    finally:
        for folder in made:
            shutil.rmtree(folder, ignore_errors=True)
    bad = any(row.error or any(t.error for t in row.paths) for row in report.rows)
    raise typer.Exit(1 if bad else 0)


def _shown(report: Report) -> str:
    """Markdown in a pipe or file; on a terminal tables that fit its width."""
    from rich.text import Text

    from comparator.benchmark import table
    from comparator.cli.tables import in_blocks, printable, prose_width, to_text

    if not sys.stdout.isatty():
        return table.table(report)
    head, rows = table.rows(report)
    names = [printable(f"{row[0]} {row[1]}".strip()) for row in rows]
    columns = [(title, [row[n] for row in rows]) for n, title in enumerate(head) if n > 1]
    remarks = (Text(printable(f"\n{line}")) for line in table.remarks(report))
    profiles = "".join(f"\n{part}" for part in table.profiles(report))
    return in_blocks(names, columns) + to_text(*remarks, width=prose_width()) + profiles


def _paths(text: str | None) -> tuple[str, ...]:
    if text:
        return tuple(dict.fromkeys(p.strip() for p in text.split(",") if p.strip()))
    import torch

    return ("eager", "graph") if torch.cuda.is_available() else ("eager",)


def _default_model() -> str:
    from comparator.core.settings import get_settings

    return get_settings().model


def random_shapes(
    name: str, variants: list, keep: Path | None, made: list[Path], on_progress
) -> tuple[str, list]:
    """Write the model folders; returns (the model's folder, the variants with the packed folder as source)."""
    from comparator.backends import backend_for
    from comparator.benchmark import random_models as known

    packed = {v.method: backend_for(v) for v in variants if backend_for(v).random_config and not v.source}
    folder = keep or known.folder_for(name, len(packed))
    if not keep:
        made.append(folder)
    for method, backend in {"": None, **packed}.items():
        place = folder / (f"{name}-{method}" if method else name)
        if not (place / "config.json").is_file():
            on_progress(f"writing random weights to {place}")
            known.write(place, name, backend=backend)
    sources = {v: str(folder / f"{name}-{v.method}") for v in variants if v.method in packed and not v.source}
    return str(folder / name), [replace(v, source=sources.get(v, v.source)) for v in variants]


def _write(path: Path | None, content: dict) -> None:
    if path:
        path.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
