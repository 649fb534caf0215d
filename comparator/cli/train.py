"""`train`: a LoRA on any variant, from the terminal. Everything is done by comparator/training; this shows it."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from comparator.training.settings import SETTINGS
from comparator.types import Problem

_BY_NAME = {s.name: s for s in SETTINGS}
EXAMPLES = """Examples:

  python -m comparator train --base nf4:dq --data pirate --max-steps 20 --learning-rate 5e-3 --name first

  python -m comparator train -b nf4 --data questions.csv --column prompt=frage --column completion=antwort -o my-lora

  python -m comparator train --data chat.jsonl --preview

  python -m comparator train --base nf4:dq --data pirate --compare "bf16 int8 nf4"

  python -m comparator train --resume first

Ctrl-C stops and keeps what has been trained so far. Exit code: 0, 1 if training failed or does not fit, 2 for a
request that is wrong, 130 after Ctrl-C."""


def _of(name: str, *flags: str) -> typer.models.OptionInfo:
    """The option of a setting, with the explanation that the page shows too."""
    known = _BY_NAME[name]
    said = known.help + (f" One of {', '.join(known.choices)}." if known.choices else "")
    return typer.Option(*(flags or (known.option,)), help=said, rich_help_panel=f"Settings: {known.group}")


_DEFAULT = {s.name: s.default for s in SETTINGS}


def train(
    base: Annotated[str, typer.Option("--base", "-b", metavar="NOTATION", help="The variant to train on.")] = "nf4:dq",
    data: Annotated[
        str | None,
        typer.Option("--data", "-d", metavar="FILE", help="A .jsonl, .json, .csv or .parquet file, a data set of the "
                     "Hub (user/name, user/name:split), or pirate, which comes with us."),
    ] = None,
    output: Annotated[
        str | None, typer.Option("--output", "-o", metavar="DIR", help="A new folder for the adapter; without it, it is "
                                 "kept among the adapters trained here.")
    ] = None,
    name: Annotated[str | None, typer.Option(help="What --adapter calls it. (default: from data and base)")] = None,
    model: Annotated[
        str | None, typer.Option("--model", "-m", help="The model. (default: COMPARATOR_MODEL, else smollm2-135m)")
    ] = None,
    form: Annotated[
        str | None, typer.Option(help="What the data are: chat, prompt or text. (default: recognized)")
    ] = None,
    column: Annotated[
        list[str] | None,
        typer.Option(metavar="ROLE=COLUMN", help="Which column is messages, prompt, completion or text."),
    ] = None,
    prompt: Annotated[
        str | None, typer.Option("--prompt", "-p", help="A prompt to answer every so often: before, and now.")
    ] = None,
    system: Annotated[str | None, typer.Option(help="A system prompt for every sample that has none.")] = None,
    compare: Annotated[
        str | None,
        typer.Option(metavar="VARIANTS", help="Afterwards: loss and perplexity on the held-back samples for these "
                     "variants, with and without the adapter."),
    ] = None,
    push_to_hub: Annotated[
        str | None, typer.Option(metavar="REPO", help="Upload the adapter to this Hub repo too (HF_TOKEN).")
    ] = None,
    zip_to: Annotated[
        Path | None, typer.Option("--zip", metavar="FOLDER", help="Write NAME.zip there too.")
    ] = None,
    resume: Annotated[
        str | None, typer.Option(metavar="NAME", help="Go on from the last checkpoint of a run that was killed.")
    ] = None,
    forget: Annotated[str | None, typer.Option(metavar="NAME", help="Throw an unfinished run away.")] = None,
    evaluate: Annotated[
        str | None, typer.Option(metavar="NAME", help="Train nothing: only --compare, for an adapter trained before.")
    ] = None,
    preview: Annotated[
        bool, typer.Option("--preview", help="Train nothing: show the data as the model will see them, and the estimate.")
    ] = False,
    list_them: Annotated[bool, typer.Option("--list", help="List what was trained here, and unfinished runs.")] = False,
    verbose: Annotated[bool, typer.Option("--verbose", help="Show what the libraries log.")] = False,
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
        bool | None, _of("gradient_checkpointing", "--gradient-checkpointing/--no-gradient-checkpointing")
    ] = _DEFAULT["gradient_checkpointing"],
    seed: Annotated[int, _of("seed")] = _DEFAULT["seed"],
    held_back: Annotated[float, _of("held_back")] = _DEFAULT["held_back"],
    eval_every: Annotated[int, _of("eval_every")] = _DEFAULT["eval_every"],
    sample_every: Annotated[int, _of("sample_every")] = _DEFAULT["sample_every"],
    sample_tokens: Annotated[int, _of("sample_tokens")] = _DEFAULT["sample_tokens"],
    checkpoint_every: Annotated[int, _of("checkpoint_every")] = _DEFAULT["checkpoint_every"],
) -> None:  # fmt: skip
    """Train a LoRA adapter on a variant, quantized or not; it lands among the adapters."""
    values = {k: v for k, v in locals().items() if k in _BY_NAME}
    values["target_modules"] = tuple(target_modules.replace(",", " ").split())
    from comparator.cli import training_shown as shown
    from comparator.cli.progress import Progress, quiet, stoppable
    from comparator.settings import get_settings
    from comparator.training import check
    from comparator.training.jobs import get_trainings
    from comparator.training.types import FORMS, DataSource, TrainRequest

    trainings = get_trainings()
    if list_them:
        print(shown.listing(trainings))
        return
    if forget:
        trainings.snapshot(forget)
        trainings.forget(forget)
        print(f"Threw {forget} away.")
        return
    with quiet(verbose) as stderr, stoppable() as cancel:
        progress = Progress(stderr)
        said: list[str] = []  # for stdout, which the libraries do not get to see
        try:
            if evaluate:
                said.append(shown.compared(trainings, evaluate, _variants(compare), cancel, progress))
                code = 130 if cancel.is_set() else 0
            elif resume:
                code = shown.followed(trainings, trainings.resume(resume), cancel, progress, said)
            else:
                if data is None:
                    raise Problem("No data is given.", "Write --data FILE, or --data pirate to try it.")
                if form is not None and form not in FORMS:
                    raise Problem(f"There is no form “{form}”.", f"It is one of {', '.join(FORMS)}.")
                request = TrainRequest(
                    DataSource(data, form, _columns(column)), base, model or get_settings().model,
                    check.from_words(values), name, output, prompt, system,
                )  # fmt: skip
                progress.status("reading the data")
                if preview:
                    text, fits = shown.preview(trainings, request)
                    said.append(text)
                    code = 0 if fits else 1
                else:
                    progress.line(shown.before(trainings, request))
                    code = shown.followed(trainings, trainings.start(request), cancel, progress, said)
        finally:
            progress.end()
        if code == 0 and not evaluate and not preview:
            made = shown.last_result(trainings)
            if compare:
                said.append(shown.compared(trainings, made.adapter, _variants(compare), cancel, progress))
            if zip_to:
                said.append(f"Wrote {trainings.zipped(made.adapter, zip_to.expanduser())}")
            if push_to_hub:
                progress.status(f"uploading to {push_to_hub}")
                said.append(f"Uploaded to {trainings.push(made.adapter, push_to_hub)}")
            progress.end()
    for text in said:
        print(text)
    sys.stdout.flush()
    raise typer.Exit(code)


def _variants(given: str | None) -> list[str]:
    if not given or not given.split():
        raise Problem("No variants are given to compare.", 'Write --compare "bf16 int8 nf4".')
    return given.split()


def _columns(given: list[str] | None) -> tuple[tuple[str, str], ...]:
    found = []
    for text in given or []:
        role, equals, name = text.partition("=")
        if not equals or not role or not name:
            raise Problem(f"“{text}” does not say which column is which.", "Write --column prompt=question.")
        found.append((role.strip(), name.strip()))
    return tuple(found)
