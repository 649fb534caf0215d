"""`train`: train a LoRA on any variant; the work is done in comparator/training."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from comparator.cli.options import AsJson, Model, Quiet, Verbose, print_json
from comparator.core.errors import UserError
from comparator.training.settings import SETTINGS

_BY_NAME = {s.name: s for s in SETTINGS}
EXAMPLES = """Examples:

  python -m comparator train --base nf4:dq --data pirate --name first \\
      --max-steps 20 --learning-rate 5e-3

  python -m comparator train -b nf4 --data questions.csv -o my-lora \\
      --column prompt=question --column completion=answer

  python -m comparator train --data chat.jsonl --preview

  python -m comparator train --base nf4:dq --data pirate \\
      --compare "bf16 int8 nf4"

  python -m comparator train --resume first

Ctrl-C stops and keeps the adapter trained so far.

Exit code: 0 on success, 1 if training failed or does not fit in memory,
2 for an invalid request, 130 after Ctrl-C."""


def _of(name: str, *flags: str) -> typer.models.OptionInfo:
    """The option of a setting, with the same help text as on the page."""
    known = _BY_NAME[name]
    text = known.help + (f" One of {', '.join(known.choices)}." if known.choices else "")
    metavar = {"choice": "NAME", "names": "NAMES", "int": "N"}.get(known.kind)
    return typer.Option(
        *(flags or (known.option,)), metavar=metavar, help=text, rich_help_panel=f"Settings: {known.group}"
    )


_DEFAULT = {s.name: s.default for s in SETTINGS}


def train(
    base: Annotated[str, typer.Option("--base", "-b", metavar="NOTATION", help="Variant to train on.")] = "nf4:dq",
    data: Annotated[
        str | None,
        typer.Option("--data", "-d", metavar="FILE", help="A .jsonl, .json, .csv or .parquet file, a Hub data set "
                     "(user/name, user/name:split), or the built-in set pirate."),
    ] = None,
    output: Annotated[
        str | None, typer.Option("--output", "-o", metavar="DIR", help="New folder for the adapter. (default: in the "
                                 "data folder)")
    ] = None,
    name: Annotated[str | None, typer.Option(help="Name for --adapter. (default: from data and base)", metavar="NAME")] = None,
    model: Model = None,
    form: Annotated[
        str | None, typer.Option(metavar="chat|prompt|text", help="Data format. (default: detected)")
    ] = None,
    column: Annotated[
        list[str] | None,
        typer.Option(metavar="ROLE=COLUMN", help="Column with the messages, prompt, completion or text; repeatable."),
    ] = None,
    prompt: Annotated[
        str | None, typer.Option("--prompt", "-p", metavar="TEXT", help="Prompt for sample answers, before and during training.")
    ] = None,
    system: Annotated[str | None, typer.Option(metavar="TEXT", help="System prompt for samples without one.")] = None,
    compare: Annotated[
        str | None,
        typer.Option(metavar="VARIANTS", help="Afterwards, evaluate these variants without and with the "
                     "adapter: loss and perplexity on the held-out samples."),
    ] = None,
    push_to_hub: Annotated[
        str | None, typer.Option(metavar="REPO", help="Also upload the adapter to this Hub repo (needs HF_TOKEN).")
    ] = None,
    zip_to: Annotated[
        Path | None, typer.Option("--zip", metavar="FOLDER", help="Also write NAME.zip to this folder.")
    ] = None,
    resume: Annotated[
        str | None, typer.Option(metavar="NAME", help="Resume an interrupted run from its last checkpoint.")
    ] = None,
    forget: Annotated[str | None, typer.Option(metavar="NAME", help="Discard an unfinished run.")] = None,
    evaluate: Annotated[
        str | None, typer.Option(metavar="NAME", help="Only evaluate an adapter trained before, on the variants of --compare.")
    ] = None,
    preview: Annotated[
        bool, typer.Option("--preview", help="Only show the data as the model will see it, and the memory estimate.")
    ] = False,
    list_them: Annotated[bool, typer.Option("--list", help="List trained adapters and unfinished runs.")] = False,
    verbose: Verbose = False,
    silent: Quiet = False,
    as_json: AsJson = False,
    rank: Annotated[int, _of("rank", "--rank", "-r")] = _DEFAULT["rank"],
    alpha: Annotated[float, _of("alpha")] = _DEFAULT["alpha"],
    dropout: Annotated[float, _of("dropout")] = _DEFAULT["dropout"],
    target_modules: Annotated[str, _of("target_modules")] = " ".join(_DEFAULT["target_modules"]),
    dora: Annotated[bool, _of("dora", "--dora")] = _DEFAULT["dora"],
    rslora: Annotated[bool, _of("rslora", "--rslora")] = _DEFAULT["rslora"],
    learning_rate: Annotated[float, _of("learning_rate", "--learning-rate", "--lr")] = _DEFAULT["learning_rate"],
    scheduler: Annotated[str, _of("scheduler")] = _DEFAULT["scheduler"],
    warmup_steps: Annotated[int, _of("warmup_steps")] = _DEFAULT["warmup_steps"],
    weight_decay: Annotated[float, _of("weight_decay")] = _DEFAULT["weight_decay"],
    max_grad_norm: Annotated[float, _of("max_grad_norm")] = _DEFAULT["max_grad_norm"],
    optimizer: Annotated[str, _of("optimizer")] = _DEFAULT["optimizer"],
    epochs: Annotated[float, _of("epochs")] = _DEFAULT["epochs"],
    max_steps: Annotated[int, _of("max_steps")] = _DEFAULT["max_steps"],
    batch_size: Annotated[int, _of("batch_size")] = _DEFAULT["batch_size"],
    accumulation: Annotated[int, _of("accumulation")] = _DEFAULT["accumulation"],
    max_length: Annotated[int, _of("max_length")] = _DEFAULT["max_length"],
    completion_only: Annotated[
        bool, _of("completion_only", "--completion-only/--whole-loss")
    ] = _DEFAULT["completion_only"],
    gradient_checkpointing: Annotated[
        bool | None, _of("gradient_checkpointing", "--gradient-checkpointing")
    ] = _DEFAULT["gradient_checkpointing"],
    no_gradient_checkpointing: Annotated[bool, typer.Option("--no-gradient-checkpointing", help="Turn it off on CUDA too.", rich_help_panel="Settings: Memory")] = False,
    seed: Annotated[int, _of("seed")] = _DEFAULT["seed"],
    held_back: Annotated[float, _of("held_back")] = _DEFAULT["held_back"],
    eval_every: Annotated[int, _of("eval_every")] = _DEFAULT["eval_every"],
    sample_every: Annotated[int, _of("sample_every")] = _DEFAULT["sample_every"],
    sample_tokens: Annotated[int, _of("sample_tokens")] = _DEFAULT["sample_tokens"],
    checkpoint_every: Annotated[int, _of("checkpoint_every")] = _DEFAULT["checkpoint_every"],
) -> None:  # fmt: skip
    """Train a LoRA adapter on a variant, quantized or not."""
    if no_gradient_checkpointing:  # an option of its own: both names are too wide for one line of the help
        gradient_checkpointing = False
    values = {k: v for k, v in locals().items() if k in _BY_NAME}
    values["target_modules"] = tuple(target_modules.replace(",", " ").split())
    from comparator.cli import train_progress as shown
    from comparator.cli.progress import Progress, quiet, stoppable
    from comparator.core.settings import get_settings
    from comparator.engines import get_trainings
    from comparator.training import validation
    from comparator.training.types import FORMS, DataSource, TrainRequest

    trainings = get_trainings()
    if list_them:
        if as_json:
            print_json(shown.listed(trainings))
        else:
            print(shown.listing(trainings))
        return
    if forget:
        trainings.snapshot(forget)
        trainings.forget(forget)
        if as_json:
            print_json({"discarded": forget})
        else:
            print(f"Discarded {forget}.")
        return
    with quiet(verbose) as stderr, stoppable() as cancel, Progress(stderr, silent=silent) as progress:
        results: list[shown.Result] = []  # for stdout, which is hidden from the libraries
        if evaluate:
            results.append(shown.compared(trainings, evaluate, _variants(compare), cancel, progress))
            code = 130 if cancel.is_set() else 0
        elif resume:
            code = shown.followed(trainings, trainings.resume(resume), cancel, progress, results)
        else:
            if data is None:
                raise UserError("No data is given.", "Use --data FILE, or --data pirate to try it.")
            if form is not None and form not in FORMS:
                raise UserError(f"Unknown data format “{form}”.", f"Use one of {', '.join(FORMS)}.")
            request = TrainRequest(
                DataSource(data, form, _columns(column)), base, model or get_settings().model,
                validation.from_words(values), name, output, prompt, system,
            )  # fmt: skip
            progress.status("reading the data")
            if preview:
                result, fits = shown.preview(trainings, request)
                results.append(result)
                code = 0 if fits else 1
            else:
                trainings.require_allowed()
                progress.remark(shown.before(trainings, request))
                code = shown.followed(trainings, trainings.start(request), cancel, progress, results)
        if code == 0 and not evaluate and not preview:
            made = shown.last_result(trainings)
            if compare:
                results.append(shown.compared(trainings, made.adapter, _variants(compare), cancel, progress))
            if zip_to:
                file = str(trainings.zipped(made.adapter, zip_to.expanduser()))
                results.append(shown.Result("zip", file, f"Wrote {file}"))
            if push_to_hub:
                progress.status(f"uploading to {push_to_hub}")
                address = trainings.push(made.adapter, push_to_hub)
                results.append(shown.Result("uploaded", address, f"Uploaded to {address}"))
    shown.print_results(results, as_json)
    sys.stdout.flush()
    raise typer.Exit(code)


def _variants(notations: str | None) -> list[str]:
    if not notations or not notations.split():
        raise UserError("No variants are given to compare.", 'Use --compare "bf16 int8 nf4".')
    return notations.split()


def _columns(assignments: list[str] | None) -> tuple[tuple[str, str], ...]:
    columns = []
    for text in assignments or []:
        role, equals, name = text.partition("=")
        if not equals or not role or not name:
            raise UserError(
                f"“{text}” is not of the form ROLE=COLUMN.", "Use for example --column prompt=question."
            )
        columns.append((role.strip(), name.strip()))
    return tuple(columns)
