"""A trained adapter on disk, whole or absent; and checkpoints that say themselves that they are whole.

    adapters/NAME/   adapter_model.safetensors, adapter_config.json, training.json, held_back.jsonl, README.md

`held_back.jsonl` stays here: it is a part of the person's data, and goes into no download and no upload.
"""

from __future__ import annotations

import json
import shutil
import zipfile
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from comparator.adapters.locate import CONFIG, WEIGHTS
from comparator.core.errors import UserError
from comparator.sources import hub_upload, naming
from comparator.training.tokenize import Encoded
from comparator.training.types import SCHEMA, Evaluation, TrainingResult, TrainRequest
from comparator.util import atomic_dir, disk
from comparator.util.records import record

RECORD = "training.json"
HELDOUT = "held_back.jsonl"
WHOLE = "whole.json"  # written last into a checkpoint: what it should hold
_SETTING = "COMPARATOR_DATA_DIR"
_PUBLIC = (WEIGHTS, CONFIG, RECORD, "README.md")
OWNER = "owner"  # on a public server: a digest of the key of whoever trained it; goes into no download
FILES = (*_PUBLIC, HELDOUT, OWNER)  # all of an adapter's


@dataclass(frozen=True)
class About:
    """What the result says beside what was measured."""

    name: str
    adapter: str
    request: TrainRequest
    data: str
    fingerprint: str
    train_rows: int
    eval_rows: int
    notes: tuple[str, ...] = ()
    owner: str | None = None  # a digest; None: the operator


# ---------------------------------------------------------------- writing


def write(
    target: Path,
    model: Any,
    result: TrainingResult,
    about: About,
    heldout: tuple[Encoded, ...],
    checkpoint: Any,
) -> TrainingResult:
    """The adapter as `target`. Raises `UserError` for a full disk; then there is nothing."""
    from peft import get_peft_model_state_dict
    from safetensors.torch import save_file

    from comparator.metrics.environment import read as read_environment

    weights = {
        name: tensor.detach().to("cpu").contiguous()
        for name, tensor in sorted(get_peft_model_state_dict(model, save_embedding_layers=False).items())
    }
    need = sum(t.numel() * t.element_size() for t in weights.values())
    config = model.peft_config["default"]
    config.base_model_name_or_path = naming.public_name(str(checkpoint.source))
    config.inference_mode = True
    try:
        disk.make_folder(target.parent)
        if target.is_dir() and not any(target.iterdir()):
            target.rmdir()
    except OSError as error:
        raise atomic_dir.disk_problem(error, target, "the adapter", _SETTING) or error from None
    with atomic_dir.building(
        target, need_bytes=need, what="the adapter", setting=_SETTING, mode=0o700
    ) as tmp:
        if tmp is None:
            raise UserError(f"{target} already exists.", "Choose another name: nothing is overwritten.")
        save_file(weights, tmp / WEIGHTS, metadata={"format": "pt"})
        config.save_pretrained(str(tmp))
        _write_json(tmp / CONFIG, _tidied(json.loads((tmp / CONFIG).read_text(encoding="utf-8"))))
        result = replace(result, path=str(target), file_bytes=(tmp / WEIGHTS).stat().st_size)
        with (tmp / HELDOUT).open("w", encoding="utf-8") as lines:
            for sample in heldout:
                lines.write(
                    json.dumps({"row": sample.row, "ids": sample.ids, "labels": sample.labels}) + "\n"
                )
        written = {
            "schema": SCHEMA,
            "result": _without_path(result),
            "request": _shareable(about.request),
            "held_back_rows": [e.row for e in heldout],
            "environment": asdict(read_environment(_device_of(model))),
        }
        _write_json(tmp / RECORD, written)
        if about.owner:
            (tmp / OWNER).write_text(about.owner, encoding="ascii")
        (tmp / "README.md").write_text(_readme(result, about, config), encoding="utf-8")
    return result


def _device_of(model: Any) -> str:
    return str(next(model.parameters()).device)


def _tidied(config: dict[str, Any]) -> dict[str, Any]:
    for name in ("target_modules", "exclude_modules", "modules_to_save"):
        if isinstance(config.get(name), list):
            config[name] = sorted(config[name])  # peft writes a set: its order is random
    return dict(sorted(config.items()))


def _without_path(result: TrainingResult) -> dict[str, Any]:
    return {k: v for k, v in asdict(result).items() if k not in ("path", "adapter")}


def _shareable(request: TrainRequest) -> dict[str, Any]:
    """The request without paths of this machine."""
    written = asdict(request)
    written.pop("output")
    written["data"]["source"] = (
        request.data.title if request.data.uploaded else Path(request.data.source).name
    )
    if request.data.source.count("/") == 1 and not Path(request.data.source).exists():
        written["data"]["source"] = request.data.source  # a data set of the Hub
    if Path(request.model).exists():
        written["model"] = Path(request.model).name
    return written


def _readme(result: TrainingResult, about: About, config: Any) -> str:
    loss = "–" if result.last_loss is None else f"{result.last_loss:.3f}"
    heldout = "–" if result.eval_loss is None else f"{result.eval_loss:.3f}"
    return (
        f"---\nlibrary_name: peft\nbase_model: {json.dumps(config.base_model_name_or_path)}\n"
        f"tags: [lora, sft, quant-comparator]\n---\n\n# {result.name}\n\n"
        f"A LoRA adapter (rank {about.request.settings.rank}) for {config.base_model_name_or_path}, trained on "
        f"`{result.base}` with Quant Comparator: {result.steps} steps, last loss {loss}, loss on held-out samples "
        f"{heldout}. All other details are in `{RECORD}`.\n"
    )


def _write_json(path: Path, content: Any) -> None:
    path.write_bytes(_json(content))


def _json(content: Any) -> bytes:
    return (json.dumps(content, indent=1, ensure_ascii=False, default=str) + "\n").encode()


# ---------------------------------------------------------------- reading


def read(path: Path, name: str | None = None, adapter: str | None = None) -> TrainingResult:
    """What is known of a trained adapter. Raises `UserError` where its record cannot be read."""
    try:
        saved = json.loads((path / RECORD).read_text(encoding="utf-8"))
        own = {"name": name or path.name, "path": str(path), "adapter": adapter or str(path)}
        return record(TrainingResult, {**saved["result"], **own})
    except (OSError, ValueError, KeyError, TypeError):
        raise UserError(
            f"{path.name} was not trained here: its {RECORD} is missing or damaged.", ""
        ) from None


def owner(path: Path) -> str | None:
    """The digest of the visitor who trained the adapter in this folder; None: the operator's."""
    try:
        return (path / OWNER).read_text(encoding="ascii").strip() or None
    except (OSError, ValueError):
        return None


def read_heldout(path: Path) -> tuple[Encoded, ...]:
    """The held-out samples of a trained adapter, as token ids."""
    try:
        lines = [json.loads(x) for x in (path / HELDOUT).read_text(encoding="utf-8").splitlines()]
        return tuple(Encoded(x["row"], tuple(x["ids"]), tuple(x["labels"]), len(x["ids"])) for x in lines)
    except (OSError, ValueError, KeyError, TypeError):
        return ()


def remember_evaluation(path: Path, evaluation: Evaluation) -> None:
    """Write an evaluation into training.json, which is replaced whole."""
    file = path / RECORD
    saved = json.loads(file.read_text(encoding="utf-8"))
    saved["result"]["evaluation"] = asdict(evaluation)
    try:
        disk.write(file, _json(saved))
    except OSError as error:
        raise atomic_dir.disk_problem(error, file, "the evaluation", _SETTING) or error from None


# ---------------------------------------------------------------- passing on


def zipped(path: Path, name: str, folder: Path) -> Path:
    """NAME.zip in `folder`, for a download; whole or absent."""
    file, new = folder / f"{name}.zip", folder / f".{name}.zip.new"
    try:
        with zipfile.ZipFile(new, "w", zipfile.ZIP_STORED) as archive:
            for part in _PUBLIC:
                if (path / part).is_file():
                    archive.write(path / part, f"{name}/{part}")
        new.replace(file)  # a download, which need not outlive the power
    except OSError as error:
        new.unlink(missing_ok=True)
        raise atomic_dir.disk_problem(error, file, "the zip file", _SETTING) or error from None
    return file


def push(path: Path, repo: str, private: bool, token: str | None = None) -> str:
    """Upload to the Hub, without the held-out samples. `token` is used for this upload alone and kept nowhere; None is
    this machine's own login. Raises `UserError` in words of ours, which quote no token."""
    return hub_upload.push(
        path,
        repo,
        "LoRA, trained with Quant Comparator",
        private=private,
        token=token,
        only=list(_PUBLIC),
        what="The adapter",
    )


# ---------------------------------------------------------------- checkpoints


def checkpointed(save: Callable[[], None], trainer: Any, watch: Any) -> None:
    """Let the trainer save, flush it to the disk, and only then mark it whole. A disk that is full costs the
    checkpoint and not the training."""
    step = trainer.state.global_step
    folder = Path(trainer.args.output_dir) / f"checkpoint-{step}"
    watch.saving(step)
    try:
        save()
        _write_json(folder / "watch.json", watch.state_dict())
        sizes = {}
        for file in sorted(p for p in folder.iterdir() if p.is_file() and p.name != WHOLE):
            disk.flush_file(file)
            sizes[file.name] = file.stat().st_size
        for parent in (folder.parent, folder.parent.parent):
            disk.flush_folder(parent)
        disk.write(folder / WHOLE, json.dumps({"step": step, "files": sizes}).encode())
    except Exception as error:
        problem = atomic_dir.disk_problem(error, folder, "a checkpoint", _SETTING)
        if problem is None:
            raise
        shutil.rmtree(folder, ignore_errors=True)
        note = f"No checkpoint could be written at step {step:,}: {problem.problem}"
        if not any(n.startswith("No checkpoint could be written") for n in watch.notes):
            watch.notes.append(note)


def restore(watch: Any, trainer: Any) -> None:
    """Restore `watch` as it was when the checkpoint that the trainer resumes from was written."""
    folder = Path(trainer.args.output_dir) / f"checkpoint-{trainer.state.global_step}"
    watch.load_state_dict(json.loads((folder / "watch.json").read_text(encoding="utf-8")))


def last_checkpoint(work: Path) -> tuple[Path, int] | None:
    """(folder, step) of a run's newest complete checkpoint, or None."""
    checkpoints = []
    for folder in (work / "checkpoints").glob("checkpoint-*"):
        try:
            marker = json.loads((folder / WHOLE).read_text(encoding="utf-8"))
            if all((folder / n).stat().st_size == size for n, size in marker["files"].items()):
                checkpoints.append((marker["step"], folder))
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            continue
    return (max(checkpoints)[1], max(checkpoints)[0]) if checkpoints else None


def tidy(work: Path) -> None:
    """Remove incomplete checkpoints of a killed process: the trainer must not count them."""
    for folder in (work / "checkpoints").glob("checkpoint-*"):
        if not (folder / WHOLE).is_file():
            shutil.rmtree(folder, ignore_errors=True)
