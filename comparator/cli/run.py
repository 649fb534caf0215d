"""`run`: one comparison, from options to a table on stdout and documents on disk."""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path
from typing import Annotated, Literal

import typer

from comparator.cli.options import PANEL as CLUSTER
from comparator.cli.options import Address, AsJson, Quiet, Verbose, notations, use
from comparator.core.errors import UserError
from comparator.core.events import Event, Failed
from comparator.core.result import Comparison

EXAMPLES = """Examples:

  python -m comparator run --prompt "What is the capital of France?"

  python -m comparator run -v bf16 -v nf4:dq,compute=fp16 -p - < question.txt

  python -m comparator run -m user/repo@main -p "Hello" -o a.json -o a.html

  python -m comparator run -p "Hello" -q --json > a.json

Exit code: 0 if every variant succeeded, 1 if one failed,
2 for an invalid request, 130 after Ctrl-C."""

_prompt_option, _model_option, _decoding_option, _fidelity_option, _memory_option = (
    partial(typer.Option, rich_help_panel=panel)
    for panel in ("Prompt", "Model and variants", "Decoding", "Fidelity", "Memory")
)


def run(
    prompt: Annotated[
        str | None,
        _prompt_option("--prompt", "-p", metavar="TEXT", help="The prompt; - reads it from standard input."),
    ] = None,
    prompts: Annotated[
        str | None,
        _prompt_option(
            metavar="FILE|NAME",
            help="A prompt set instead of one prompt: .jsonl, .csv, one prompt per line, or a built-in set (everyday).",
        ),
    ] = None,
    task: Annotated[
        list[str] | None,
        _prompt_option(
            metavar="NAME|FOLDER",
            help="A task of lm-evaluation-harness, or a folder with a task's YAML and JSONL; repeatable. See docs/tasks.md.",
        ),
    ] = None,
    limit: Annotated[
        int | None, _prompt_option(min=1, metavar="N", help="Documents of each task. (default: all)")
    ] = None,
    fewshot: Annotated[
        int | None,
        _prompt_option(min=0, metavar="N", help="Examples before each document. (default: the task's own)"),
    ] = None,
    batch: Annotated[
        int,
        _prompt_option(
            min=1, max=64, metavar="N", help="Prompts of a set that are decoded at once, where a variant can."
        ),
    ] = 1,
    resume: Annotated[
        bool,
        _prompt_option(
            "--resume/--fresh",
            help="Resume an interrupted run of the same prompt set or task, or start over.",
        ),
    ] = True,
    variant: Annotated[
        list[str] | None,
        _model_option(
            "--variant",
            "-v",
            metavar="NOTATION",
            autocompletion=notations,
            help="Variant, for example bf16, int8:threshold=0 or nf4:dq; repeatable. See `variants`. "
            "(default: bf16 int8 nf4)",
        ),
    ] = None,
    model: Annotated[
        str | None,
        _model_option(
            "--model",
            "-m",
            metavar="NAME",
            help="Built-in name, Hub repo (user/name@revision), folder or .gguf file. (default: COMPARATOR_MODEL "
            "or smollm2-135m)",
        ),
    ] = None,
    adapter: Annotated[
        list[str] | None,
        _model_option(
            "--adapter",
            "-a",
            metavar="SOURCE",
            help="Also run every variant with this LoRA adapter: pirate, user/repo@rev*0.5, folder:merged; "
            "repeatable.",
        ),
    ] = None,
    output: Annotated[
        list[Path] | None,
        typer.Option(
            "--output",
            "-o",
            metavar="FILE",
            help="Write the comparison: .json (the document), .csv (one row per variant), .layers.csv, .prompts.csv, .md or .html; "
            "repeatable.",
        ),
    ] = None,
    system: Annotated[str | None, _prompt_option(metavar="TEXT", help="System prompt.")] = None,
    chat: Annotated[
        bool | None,
        _prompt_option(
            "--chat/--raw",
            help="Use the model's chat template, or the raw text. (default: chat if the model has a template)",
        ),
    ] = None,
    template_var: Annotated[
        list[str] | None,
        _prompt_option(
            metavar="NAME=VALUE",
            help="A variable of the chat template, for example enable_thinking=false; repeatable.",
        ),
    ] = None,
    template: Annotated[
        str | None, _prompt_option(metavar="NAME", help="One of several chat templates, by name.")
    ] = None,
    max_new_tokens: Annotated[
        int, _decoding_option("--max-new-tokens", "-n", metavar="N", help="Maximum length of the answer.")
    ] = 64,
    temperature: Annotated[float, _decoding_option(help="0 is greedy.")] = 0.0,
    top_p: Annotated[float, _decoding_option(help="1 disables it.")] = 1.0,
    top_k: Annotated[int, _decoding_option(help="0 disables it.")] = 0,
    repetition_penalty: Annotated[float, _decoding_option(help="1 disables it.")] = 1.0,
    seed: Annotated[int, _decoding_option(help="Same seed, same tokens.")] = 0,
    repeats: Annotated[
        str,
        _decoding_option(
            metavar="N|auto",
            help="Interleaved runs per variant; medians are reported. auto: 3 where a round takes under 10 s, else 1.",
        ),
    ] = "auto",
    decode: Annotated[
        Literal["auto", "both", "eager", "graph", "compiled"],
        _decoding_option(
            metavar="MODE",
            help="auto (CUDA graph on a GPU), both (auto and eager, shows the Python overhead), eager, graph, or "
            "compiled (slow to prepare).",
        ),
    ] = "auto",
    fidelity: Annotated[
        Literal["none", "prompt", "text"] | None,
        _fidelity_option(
            metavar="none|prompt|text",
            help="Measure on the reference's answer (prompt), on an evaluation text as well (text), or not at all. "
            "(default: prompt; with --eval-text: text)",
        ),
    ] = None,
    eval_text: Annotated[
        str | None,
        _fidelity_option(
            metavar="FILE", help="Evaluation text: a file, or wikitext2. (default: the bundled text)"
        ),
    ] = None,
    context: Annotated[int, _fidelity_option(metavar="N", help="Tokens per window.")] = 512,
    stride: Annotated[
        int | None,
        _fidelity_option(metavar="N", help="Tokens from one window to the next. (default: the context)"),
    ] = None,
    reference: Annotated[
        str | None,
        _fidelity_option(metavar="NOTATION", help="Variant to compare with. (default: the most precise)"),
    ] = None,
    max_memory: Annotated[
        str | None,
        _memory_option(
            metavar="LIMITS", help="Split the model across devices, for example 0=6GiB,cpu=20GiB."
        ),
    ] = None,
    calibration: Annotated[
        str | None,
        _model_option(
            metavar="FILE",
            help="Calibration text of gptq variants: a text file, .json or .jsonl, c4 or wikitext2. "
            "(default: the bundled text)",
        ),
    ] = None,
    evict: Annotated[
        bool, _memory_option(help="Unload the least recently used variants to free memory.")
    ] = True,
    ray: Address = None,
    parallel: Annotated[
        bool,
        typer.Option(
            "--parallel",
            rich_help_panel=CLUSTER,
            help="Run variants on different devices of the cluster at the same time.",
        ),
    ] = False,
    verbose: Verbose = False,
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> None:
    """Run one prompt on several variants of a model and compare them."""
    from comparator import api
    from comparator.cli import tables
    from comparator.core import document
    from comparator.reporting import export

    for path in output or []:
        export.check_name(path)
    use(ray)
    if prompt is None and prompts is None and not task:
        raise UserError("No prompt is given.", "Add --prompt TEXT, --prompts FILE or --task NAME.")
    request = api.request(
        None if prompt is None else _prompt(prompt),
        variant or None,
        model,
        adapter or (),
        prompts=prompts,
        task=task or None,
        limit=limit,
        fewshot=fewshot,
        batch=batch,
        resume=resume,
        system=system,
        chat=chat,
        template=template,
        template_vars=template_var or (),
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
    comparison, stopped = carry_out(request, verbose, silent=quiet)
    if as_json:
        print(document.dumps(comparison, indent=1))
    else:
        print(tables.comparison_table(comparison), end="")
        print(tables.length_table(comparison), end="")
        print(tables.prompt_set_table(comparison), end="")
        print(tables.answer(comparison), end="")
    for path in output or []:
        export.write(comparison, path)
        print(f"Wrote {path}", file=sys.stderr)
    raise typer.Exit(130 if stopped else 0 if comparison.ok else 1)


def _prompt(text: str) -> str:
    if text != "-":
        return text
    if sys.stdin is None or sys.stdin.isatty():
        print("Type the prompt, then Ctrl-D:", file=sys.stderr)
    try:
        return sys.stdin.buffer.read().decode("utf-8-sig").rstrip("\n") if sys.stdin else ""
    except UnicodeDecodeError:
        raise UserError("Standard input is not text in UTF-8.", "Save the prompt as UTF-8.") from None


def carry_out(
    request, verbose: bool, *, answers: bool = True, silent: bool = False
) -> tuple[Comparison, bool]:
    """(the finished comparison, whether Ctrl-C stopped it), with progress on stderr; silent: failures alone. Raises
    `UserError`."""
    from comparator.cli import error_details
    from comparator.cli.progress import Progress, quiet, stoppable

    with quiet(verbose) as stderr, stoppable() as cancel, Progress(stderr, answers, silent) as progress:
        from comparator.comparison import runner
        from comparator.engines import get_engine

        def show(event: Event) -> None:
            progress(event)
            if isinstance(event, Failed) and event.result.error:
                error_details.show(event.result.error.error_id, progress.line)

        comparison = runner.run(request, engine=get_engine(), emit=show, cancel=cancel)
        return comparison, cancel.is_set()
