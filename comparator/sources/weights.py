"""Which files of a folder are the weights, and what their headers say. Refuses pickles by name.

Understands one safetensors file, several with an index, and AutoGPTQ's older `gptq_model-4bit-128g.safetensors`.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from comparator.core.errors import UserError
from comparator.sources.checkpoint import TensorInfo
from comparator.sources.safetensors_header import read_header

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl", "*.h5", "*.msgpack")
_NOT_WEIGHTS = ("training_args.bin", "optimizer.pt", "scheduler.pt", "optimizer.bin", "scheduler.bin")


@dataclass(frozen=True)
class Stored:
    """A tensor and the file it lies in; `start` is the offset of its data in that file, in bytes."""

    info: TensorInfo
    file: Path
    start: int


def choose(names: list[str]) -> list[str]:
    """Of the file names of a repo or folder, those of the weights' safetensors: an index alone, or one file.

    Knows names only, so it serves a Hub listing as well. [] when there is none that transformers would load.
    """
    top = [n for n in names if "/" not in n]
    for name in (INDEX, SINGLE):
        if name in top:
            return [name]
    if "quantize_config.json" in top or "quantization_config.json" in top:  # AutoGPTQ's older layout
        legacy = sorted(
            n for n in top if n.startswith("gptq_model") and n.endswith(".safetensors.index.json")
        )
        legacy = legacy or sorted(n for n in top if n.endswith(".safetensors") and not _is_shard(n))
        return legacy[:1]
    return []


def pickles(names: list[str]) -> list[str]:
    """Those that hold weights in a format that can run code."""
    return sorted(
        n for n in names if "/" not in n and n not in _NOT_WEIGHTS and any(Path(n).match(p) for p in _PICKLES)
    )


def no_weights(source: str, names: list[str]) -> UserError:
    """Why a repo or folder with these files has no weights that can be loaded."""
    if found := pickles(names):
        return UserError(
            f"{source} has its weights as {found[0]} only. Pickles are not opened, because they can run code.",
            "Use a checkpoint in safetensors, or convert this one where you trust it: "
            'AutoModelForCausalLM.from_pretrained(…).save_pretrained("folder").',
        )
    if ggufs := sorted(n for n in names if n.lower().endswith(".gguf")):
        more = f" ({len(ggufs)} of them)" if len(ggufs) > 1 else ""
        return UserError(
            f"{source} has its weights as GGUF only{more}.",
            f"Download {ggufs[0]} and name the file: /path/to/file.gguf",
        )
    if others := sorted(n for n in names if n.endswith(".safetensors")):
        return UserError(
            f"{source} has {others[0]}, but neither {SINGLE} nor {INDEX}.",
            "transformers looks for these two names; rename the file or write the index.",
        )
    return UserError(
        f"{source} has no weights: no {SINGLE} and no {INDEX}.", "Name a folder with a whole model."
    )


def read_folder(folder: Path, source: str) -> list[Stored]:
    """Every tensor of the checkpoint, in the files' order. Raises `UserError` naming what is missing or damaged."""
    names = [p.name for p in folder.iterdir() if p.is_file()]
    chosen = choose(names)
    if not chosen:
        raise no_weights(source, names)
    if not chosen[0].endswith(".json"):
        return _read(folder / chosen[0], folder)
    tensor_files = index_of(folder / chosen[0])
    files = sorted(set(tensor_files.values()))
    if missing := [f for f in files if not (folder / f).is_file()]:
        raise UserError(
            f"{source} is missing {len(missing)} of its {len(files)} weight files: {', '.join(missing[:3])}"
            + (" …" if len(missing) > 3 else "")
            + ".",
            f"Download or copy the missing {'file' if len(missing) == 1 else 'files'} into the folder.",
        )
    stored = [s for f in files for s in _read(folder / f, folder)]
    held = {s.info.name: s.file.name for s in stored}
    if lost := [n for n, f in tensor_files.items() if held.get(n) is None]:
        raise UserError(
            f"{tensor_files[lost[0]]} of {source} does not contain {lost[0]}, although {chosen[0]} lists it there.",
            "The files do not belong together: download the whole checkpoint again.",
        )
    return [s for s in stored if s.info.name in tensor_files]


def index_of(file: Path) -> dict[str, str]:
    """Tensor name → file name of an index. Its file names are untrusted: nothing outside the folder."""
    try:
        weight_map = json.loads(file.read_text(encoding="utf-8"))["weight_map"]
        pairs = {str(k): str(v) for k, v in weight_map.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise UserError(
            f"{file.name} in {file.parent} is not a valid index.", "Download or copy it again."
        ) from None
    for name in pairs.values():
        if not name.endswith(".safetensors") or Path(name).name != name or "\\" in name:
            raise UserError(
                f"{file.name} names “{name[:100]}” as a weight file, which is not a safetensors file in the same folder.",
                "Only safetensors files in the same folder are read.",
            )
    if not pairs:
        raise UserError(f"{file.name} in {file.parent} lists no tensors.", "Download or copy it again.")
    return pairs


def equal(one: Stored, other: Stored) -> bool:
    """Whether two tensors hold the same bytes, judged by their ends and 14 places between (64 kB each)."""
    if (one.info.dtype, one.info.shape) != (other.info.dtype, other.info.shape):
        return False
    size, piece = one.info.bytes, 2**16
    places = {0, max(0, size - piece), *(size * i // 15 for i in range(1, 15))}
    with open(one.file, "rb") as a, open(other.file, "rb") as b:
        for place in sorted(places):
            a.seek(one.start + place)
            b.seek(other.start + place)
            length = min(piece, size - place)
            if a.read(length) != b.read(length):
                return False
    return True


def _read(file: Path, folder: Path) -> list[Stored]:
    infos, data_start = read_header(file)
    stored, place = [], data_start
    for info in infos:
        stored.append(Stored(info, file, place))
        place += info.bytes
    return stored


def _is_shard(name: str) -> bool:
    return "-of-" in name
