"""`run`: one comparison, from options to a table on stdout and documents on disk."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from comparator.cli.ray import PANEL as CLUSTER
from comparator.cli.ray import Address, use
from comparator.types import Comparison, Done, Problem

EXAMPLES = """Examples:

  python -m comparator run --prompt "What is the capital of France?"

  python -m comparator run -v bf16 -v nf4:dq,compute=fp16 -p - < question.txt

  python -m comparator run -m user/repo@main -p "Hello" -o a.json -o a.html

Exit code: 0 if every column succeeded, 1 if one failed, 2 for a request that is wrong, 130 after Ctrl-C."""

PROMPT, MODEL, DECODING, FIDELITY, MEMORY = "Prompt", "Columns", "Decoding", "Fidelity", "Memory"


def run(
    prompt: Annotated[
        str,
        typer.Option(
            "--prompt", "-p", help="The prompt; - reads it from standard input.", rich_help_panel=PROMPT
        ),
    ],
    variant: Annotated[
        list[str] | None,
        typer.Option(
            "--variant",
            "-v",
            metavar="NOTATION",
            rich_help_panel=MODEL,
            help="A column: bf16, int8:threshold=0, nf4:dq … Give it once a column; `variants` lists what there is. "
            "(default: bf16 int8 nf4)",
        ),
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(
            "--model",
            "-m",
            rich_help_panel=MODEL,
            help="Built-in name, Hub repo (user/name@revision), folder or .gguf file. (default: COMPARATOR_MODEL, "
            "else smollm2-135m)",
        ),
    ] = None,
    adapter: Annotated[
        list[str] | None,
        typer.Option(
            "--adapter",
            "-a",
            metavar="SOURCE",
            rich_help_panel=MODEL,
            help="A LoRA adapter on every variant, beside the variant alone: pirate, user/repo@rev*0.5, folder:merged. "
            "Give it once an adapter.",
        ),
    ] = None,
    output: Annotated[
        list[Path] | None,
        typer.Option(
            "--output",
            "-o",
            metavar="FILE",
            help="Write the comparison: .json (the document), .csv (a row a column), .layers.csv, .md or .html. "
            "May be given several times.",
        ),
    ] = None,
    system: Annotated[str | None, typer.Option(help="System prompt.", rich_help_panel=PROMPT)] = None,
    chat: Annotated[
        bool | None,
        typer.Option(
            "--chat/--raw",
            rich_help_panel=PROMPT,
            help="Use the model's chat template, or send the text as it is. (default: chat where there is a template)",
        ),
    ] = None,
    max_new_tokens: Annotated[
        int,
        typer.Option(
            "--max-new-tokens", "-n", help="Length of the answer at most.", rich_help_panel=DECODING
        ),
    ] = 64,
    temperature: Annotated[float, typer.Option(help="0 is greedy.", rich_help_panel=DECODING)] = 0.0,
    top_p: Annotated[float, typer.Option(help="1 switches it off.", rich_help_panel=DECODING)] = 1.0,
    top_k: Annotated[int, typer.Option(help="0 switches it off.", rich_help_panel=DECODING)] = 0,
    repetition_penalty: Annotated[
        float, typer.Option(help="1 switches it off.", rich_help_panel=DECODING)
    ] = 1.0,
    seed: Annotated[int, typer.Option(help="Same seed, same tokens.", rich_help_panel=DECODING)] = 0,
    repeats: Annotated[
        int,
        typer.Option(
            help="Runs of each column, alternating; medians are reported.", rich_help_panel=DECODING
        ),
    ] = 1,
    decode: Annotated[
        str,
        typer.Option(
            help="auto (a CUDA graph on a GPU), both (auto, and eager too: what Python costs), eager (plain Python), "
            "graph, or compiled (slow to prepare).",
            rich_help_panel=DECODING,
        ),
    ] = "auto",
    fidelity: Annotated[
        str | None,
        typer.Option(
            help="none; prompt: divergence on the reference's own answer; text: on a longer text too. "
            "(default: prompt, with --eval-text text)",
            rich_help_panel=FIDELITY,
        ),
    ] = None,
    eval_text: Annotated[
        str | None,
        typer.Option(
            metavar="FILE",
            help="The longer text: a file, or wikitext2. (default: the text we ship)",
            rich_help_panel=FIDELITY,
        ),
    ] = None,
    context: Annotated[int, typer.Option(help="Tokens scored at once.", rich_help_panel=FIDELITY)] = 512,
    stride: Annotated[
        int | None,
        typer.Option(
            help="Tokens from one context to the next. (default: the context)", rich_help_panel=FIDELITY
        ),
    ] = None,
    reference: Annotated[
        str | None,
        typer.Option(
            help="The column to measure against. (default: the most precise)", rich_help_panel=FIDELITY
        ),
    ] = None,
    max_memory: Annotated[
        str | None,
        typer.Option(
            metavar="0=6GiB,cpu=20GiB", help="Spread the model within these limits.", rich_help_panel=MEMORY
        ),
    ] = None,
    calibration: Annotated[
        str | None,
        typer.Option(
            metavar="FILE",
            help="Calibration text of gptq columns: a text file, .json or .jsonl, c4, or wikitext2. "
            "(default: the text we ship)",
            rich_help_panel=MODEL,
        ),
    ] = None,
    evict: Annotated[
        bool, typer.Option(help="Unload what was used longest ago to make room.", rich_help_panel=MEMORY)
    ] = True,
    ray: Address = None,
    parallel: Annotated[
        bool,
        typer.Option(
            "--parallel",
            rich_help_panel=CLUSTER,
            help="Columns on different devices of the cluster at the same time; on one device never.",
        ),
    ] = False,
    verbose: Annotated[bool, typer.Option("--verbose", help="Show what the libraries log.")] = False,
) -> None:
    """Run one prompt through several variants of a model and print what each costs and gains."""
    from comparator import api, report
    from comparator.cli import tables

    for path in output or []:
        report.check_name(path)
    use(ray)
    request = api.request(
        _prompt(prompt),
        variant or api.DEFAULT_VARIANTS,
        model,
        adapter or (),
        system=system,
        chat=chat,
        reference=reference,
        fidelity=fidelity,
        eval_text=eval_text,
        context=context,
        stride=stride,
        evict=evict,
        max_memory=max_memory,
        parallel=parallel,
        calibration=calibration,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_p=top_p,
        top_k=top_k,
        repetition_penalty=repetition_penalty,
        seed=seed,
        repeats=repeats,
        decode=decode,
    )
    comparison, stopped = carry_out(request, verbose)
    print(tables.comparison_table(comparison), end="")
    for path in output or []:
        report.write(comparison, path)
        print(f"Wrote {path}", file=sys.stderr)
    raise typer.Exit(130 if stopped else 0 if comparison.ok else 1)


def _prompt(given: str) -> str:
    if given != "-":
        return given
    if sys.stdin is None or sys.stdin.isatty():
        print("Type the prompt, then Ctrl-D:", file=sys.stderr)
    try:
        return sys.stdin.buffer.read().decode("utf-8-sig").rstrip("\n") if sys.stdin else ""
    except UnicodeDecodeError:
        raise Problem("Standard input is not text in UTF-8.", "Save the prompt as UTF-8.") from None


def carry_out(request, verbose: bool, *, answers: bool = True) -> tuple[Comparison, bool]:
    """(the finished comparison, whether Ctrl-C stopped it), with progress on stderr. Raises `Problem`."""
    from comparator.cli.progress import Progress, quiet, stoppable

    with quiet(verbose) as stderr, stoppable() as cancel:
        from comparator.compare import compare

        progress = Progress(stderr, request.settings.repeats, answers)
        try:
            for event in compare(request, cancel=cancel):
                if isinstance(event, Done):
                    return event.comparison, cancel.is_set()
                progress(event)
        finally:
            progress.end()
    raise AssertionError("a comparison always ends with Done")
