"""`bench`: how fast each decode path is beside stock `generate`. Logic is in comparator/bench.py."""

from __future__ import annotations

import json
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from comparator.types import Problem

EXAMPLES = """Examples:

  python -m comparator bench -v bf16 -v int8 -v nf4 --new-tokens 32

  python -m comparator bench --shapes llama-8b -v bf16 -v nf4 --decode eager,graph --ttft 2048 -o bench.json

Exit code: 0 if everything could be measured, 1 if something could not, 2 for a request that is wrong."""


def bench(
    variant: Annotated[
        list[str] | None,
        typer.Option("--variant", "-v", "--variants", metavar="NOTATION", help="May be given several times, or with "
                     "blanks between. (default: bf16 int8 nf4)"),
    ] = None,
    model: Annotated[str | None, typer.Option("--model", "-m", help="(default: COMPARATOR_MODEL, else smollm2-135m)")] = None,
    shapes: Annotated[
        str | None,
        typer.Option(help="Random weights of these shapes instead of a model: llama-8b, llama-1b, llama-tiny."),
    ] = None,
    decode: Annotated[
        str | None,
        typer.Option(help="Paths, with commas between: eager, graph, compiled. (default: eager, and graph on CUDA)"),
    ] = None,
    prompt_tokens: Annotated[int, typer.Option(min=1)] = 128,
    new_tokens: Annotated[int, typer.Option(min=2)] = 128,
    batch: Annotated[
        int, typer.Option(min=1, help="Sequences at once; rates are of all of them together.")
    ] = 1,
    pairs: Annotated[int, typer.Option(min=1, help="Alternating runs of stock generate and each path.")] = 3,
    ttft: Annotated[
        int, typer.Option(min=0, help="Also the time to first token at this prompt length, beside a bare forward.")
    ] = 0,
    profile: Annotated[
        bool, typer.Option("--profile", help="Also what each path's step spends its time on, kernel by kernel.")
    ] = False,
    keep: Annotated[
        Path | None, typer.Option(metavar="FOLDER", help="Write the shapes here and leave them there.")
    ] = None,
    output: Annotated[Path | None, typer.Option("--output", "-o", metavar="FILE", help="Write JSON too.")] = None,
    scoring: Annotated[
        bool,
        typer.Option(help="Measure instead what scoring a text costs beside the bare forward passes of both models."),
    ] = False,
) -> None:  # fmt: skip
    """Time decoding on each path beside stock generate, in one process, alternating."""
    from comparator import bench as benches
    from comparator import bench_table
    from comparator.backends import resolve

    last = [""]

    def told(message: str) -> None:
        if message != last[0]:
            last[0] = message
            print(message, file=sys.stderr, flush=True)

    names = [n for given in variant or ["bf16 int8 nf4"] for n in given.split()]
    variants = [resolve(n) for n in names]
    if scoring:
        from comparator import scoring_bench

        results = scoring_bench.run(model, variants, rounds=max(pairs, 3), told=told)
        print(scoring_bench.table(results), end="")
        _write(output, [r.to_dict() for r in results])
        raise typer.Exit(0)
    made: list[Path] = []
    try:
        if shapes:
            if model:
                raise Problem("--shapes and --model are both given.", "Give one of them.")
            model, variants = _shapes(shapes, variants, keep, made, told)
        options = benches.Options(
            _paths(decode), prompt_tokens, new_tokens, pairs, ttft, batch=batch, profile=profile
        )
        report = None
        for report in benches.run(model or _default_model(), variants, options, told):
            _write(output, report.to_dict())  # after each variant: what is measured is kept whatever comes
        print(bench_table.table(report), end="")
    finally:
        for folder in made:
            shutil.rmtree(folder, ignore_errors=True)
    bad = any(row.error or any(t.error for t in row.paths) for row in report.rows)
    raise typer.Exit(1 if bad else 0)


def _paths(given: str | None) -> tuple[str, ...]:
    if given:
        return tuple(dict.fromkeys(p.strip() for p in given.split(",") if p.strip()))
    import torch

    return ("eager", "graph") if torch.cuda.is_available() else ("eager",)


def _default_model() -> str:
    from comparator.settings import get_settings

    return get_settings().model


def _shapes(name: str, variants: list, keep: Path | None, made: list[Path], told) -> tuple[str, list]:
    """Write the folders that the variants need; (the model's folder, variants that point to the packed one)."""
    from comparator import shapes as known

    packed = any(v.method == "gptq" and not v.source for v in variants)
    folder = keep or known.folder_for(name, packed)
    if not keep:
        made.append(folder)
    for gptq in (False, True) if packed else (False,):
        place = folder / (f"{name}-gptq" if gptq else name)
        if not (place / "config.json").is_file():
            told(f"writing random weights to {place}")
            known.write(place, name, gptq=gptq)
    source = str(folder / f"{name}-gptq")
    variants = [replace(v, source=source) if v.method == "gptq" and not v.source else v for v in variants]
    return str(folder / name), variants


def _write(path: Path | None, content: dict) -> None:
    if path:
        path.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
