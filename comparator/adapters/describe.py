"""What an adapter is, read from its config and the header of its weights. Needs neither torch nor peft."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from comparator.adapters.locate import CONFIG, MOST_CONFIG_BYTES, WEIGHTS, AdapterFiles
from comparator.adapters.targets import Patterns, listed, lora_ranks
from comparator.core.errors import UserError
from comparator.core.result import AdapterInfo
from comparator.sources.checkpoint import TensorInfo
from comparator.sources.safetensors_header import read_header

PROMPT_TYPES = {"PROMPT_TUNING", "MULTITASK_PROMPT_TUNING", "P_TUNING", "PREFIX_TUNING", "CPT", "CARTRIDGE"}
_TITLES = {
    "LORA": "LoRA", "ADALORA": "AdaLoRA", "IA3": "IA³", "LOHA": "LoHa", "LOKR": "LoKr", "OFT": "OFT", "BOFT": "BOFT",
    "VERA": "VeRA", "FOURIERFT": "FourierFT", "LN_TUNING": "LayerNorm tuning", "PROMPT_TUNING": "prompt tuning",
    "PREFIX_TUNING": "prefix tuning", "P_TUNING": "p-tuning", "TRAINABLE_TOKENS": "trainable tokens",
}  # fmt: skip
_TASKS = {
    "SEQ_CLS": "classifying texts",
    "TOKEN_CLS": "classifying tokens",
    "QUESTION_ANS": "extractive question answering",
    "SEQ_2_SEQ_LM": "an encoder-decoder model",
    "FEATURE_EXTRACTION": "an encoder (it computes embeddings)",
}
# Tuners whose parts are stored under the module they change: everything from here on is theirs.
_OWN = re.compile(
    r"\.(?:lora_\w+|ia3_\w+|hada_\w+|lokr_\w+|oft_\w+|boft_\w+|vera_\w+|fourierft_\w+|hra_\w+|c3a_\w+|road_\w+|"
    r"randlora_\w+|delora_\w+|miss_\w+|bone_\w+|shira_\w+|waveft_\w+|hira_\w+|gralora_\w+|vblora_\w+|ln_tuning\w*|"
    r"token_adapter|trainable_tokens_\w+|base_layer|modules_to_save)(?:\.|$)"
)
PREFIX = "base_model.model."


@dataclass(frozen=True)
class AdapterFacts:
    """What is known of an adapter before it is put anywhere."""

    source: str
    revision: str | None
    kind: str  # "LoRA", "DoRA", "rsLoRA", "IA³" …
    peft_type: str
    base_model: str | None
    task: str | None
    ranks: tuple[int, ...]  # every rank that occurs, ascending; () where the kind has none
    alpha: float | None
    scaling: float | None  # alpha / r, for rsLoRA alpha / √r; None where it differs between modules
    targets: tuple[str, ...]  # module names without their path
    modules: int  # how many modules carry it
    saved_whole: tuple[str, ...]  # modules_to_save: trained as whole copies
    parameters: int
    bytes: int  # of the tensors in the file
    dtype: str
    scalable: bool  # whether a strength other than 1 means something
    alters_base: str | None  # why it cannot share a base with other columns
    brought: tuple[
        str, ...
    ]  # tensors that would overwrite the model's own (an embedding saved beside the adapter)
    files: AdapterFiles
    config: dict[str, Any]
    tensors: tuple[TensorInfo, ...]

    def share(self, base_parameters: int | None) -> float | None:
        """What `print_trainable_parameters` calls “trainable%”, as a fraction: of base and adapter together."""
        return self.parameters / (base_parameters + self.parameters) if base_parameters else None

    @property
    def rank_text(self) -> str:
        if not self.ranks:
            return "–"
        return str(self.ranks[0]) if len(self.ranks) == 1 else f"{self.ranks[0]}–{self.ranks[-1]}"

    def info(self) -> AdapterInfo:
        """What goes into the document."""
        return AdapterInfo(
            source=self.source,
            revision=self.revision,
            kind=self.kind,
            base_model=self.base_model,
            rank=self.ranks[-1] if self.ranks else None,
            alpha=self.alpha,
            scaling=self.scaling,
            targets=self.targets,
            parameters=self.parameters,
            file_bytes=self.bytes,
            dtype=self.dtype,
        )


def describe(files: AdapterFiles) -> AdapterFacts:
    """Read an adapter's config and header. Raises `UserError` for what cannot be an adapter of a causal LM."""
    config = _config(files)
    peft_type = _checked_type(config, files.source)
    tensors, _ = read_header(files.path / WEIGHTS)
    if not tensors:
        raise UserError(f"{WEIGHTS} of {files.source} contains no tensors.", "Save the adapter again.")
    modules = dict.fromkeys(m for t in tensors if (m := module_of(t.name)) and is_own(t.name))
    ranks = _ranks(config, tensors, peft_type, files.source)
    alpha, scaling = _scaling(config, ranks)
    saved = tuple(str(m) for m in listed(config.get("modules_to_save")))
    dtypes = {t.dtype: t.bytes for t in sorted(tensors, key=lambda t: t.bytes)}
    return AdapterFacts(
        source=files.source,
        revision=files.revision,
        kind=_kind(config, peft_type),
        peft_type=peft_type,
        base_model=_text(config.get("base_model_name_or_path")),
        task=_text(config.get("task_type")),
        ranks=ranks,
        alpha=alpha,
        scaling=scaling,
        targets=_targets(config, list(modules)),
        modules=len(modules),
        saved_whole=saved,
        parameters=sum(t.parameters for t in tensors),
        bytes=sum(t.bytes for t in tensors),
        dtype=list(dtypes)[-1],
        scalable=peft_type in ("LORA", "ADALORA", "LOHA", "LOKR"),
        alters_base=_alters_base(config),
        brought=_brought(config, tensors, saved),
        files=files,
        config=config,
        tensors=tuple(tensors),
    )


def open_in_child(path: Path, source: str) -> None:
    """What `sources.isolated` calls in its process: raises whatever `describe` raises, `UserError` among it."""
    describe(AdapterFiles(source, path))


def module_of(tensor: str) -> str:
    """`base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight` → `model.layers.0.self_attn.q_proj`."""
    name = tensor.removeprefix(PREFIX)
    own = _OWN.search(name)
    if own:
        return name[: own.start()]
    return name.rpartition(".")[0]


def is_own(tensor: str) -> bool:
    """Whether a tensor is a part of the tuner, not a copy of one of the model's."""
    own = _OWN.search(tensor)
    return bool(own) and own[0].strip(".") not in ("base_layer", "modules_to_save")


def _config(files: AdapterFiles) -> dict[str, Any]:
    try:
        if (files.path / CONFIG).stat().st_size > MOST_CONFIG_BYTES:
            raise ValueError
        config = json.loads((files.path / CONFIG).read_text(encoding="utf-8"))
        if not isinstance(config, dict):
            raise ValueError
        return config
    except (OSError, ValueError, RecursionError):
        raise UserError(
            f"{CONFIG} of {files.source} cannot be read.", "Download or copy the adapter again."
        ) from None


def _checked_type(config: dict[str, Any], source: str) -> str:
    peft_type = config.get("peft_type")
    if not isinstance(peft_type, str):
        raise UserError(
            f"{CONFIG} of {source} names no peft_type.", "Save the adapter again with a current peft."
        )
    task = config.get("task_type")
    if isinstance(task, str) and task in _TASKS:
        raise UserError(
            f"{source} was trained for {_TASKS[task]} (task_type {task}), not for a causal language model.",
            "Choose an adapter whose task_type is CAUSAL_LM.",
        )
    refused = {
        "megatron_config": "is made for Megatron",
        "alora_invocation_tokens": "is an activated LoRA, which switches itself on in the middle of a prompt",
        "arrow_config": "is a router over other adapters (Arrow)",
    }
    for key, why in refused.items():
        if config.get(key):
            raise UserError(
                f"{source} {why} ({key}). That is not supported here.", "Use a plain LoRA or DoRA."
            )
    if peft_type in ("XLORA", "POLY"):
        raise UserError(
            f"{source} is {peft_type}: a mixture over several adapters or tasks. That is not supported here.",
            "Use the adapters that it mixes, one column each.",
        )
    return peft_type.upper()


def _kind(config: dict[str, Any], peft_type: str) -> str:
    if peft_type == "LORA":
        name = "DoRA" if config.get("use_dora") else "LoRA"
        return f"rs{name}" if config.get("use_rslora") else name
    return _TITLES.get(peft_type, peft_type)


def lora_rows(tensors: Iterable[TensorInfo]) -> dict[str, list[int]]:
    """Per module with a LoRA, the rows of each lora_A: two where two parameters of a module carry one."""
    rows: dict[str, list[int]] = {}
    for t in tensors:
        if re.search(r"\.lora_A(?:\.weight)?$|\.lora_embedding_A$", t.name) and len(t.shape) > 1:
            rows.setdefault(module_of(t.name), []).append(t.shape[0])
    return rows


def _ranks(config: dict[str, Any], tensors: list[TensorInfo], peft_type: str, source: str) -> tuple[int, ...]:
    rows, patterns = lora_rows(tensors), Patterns(config, source)
    if peft_type == "LORA":
        found = set(lora_ranks(patterns, rows).values())
    else:
        found = {n for sizes in rows.values() for n in sizes}
        largest = max((n for t in tensors for n in t.shape), default=0)
        for key in ("r", "init_r", "num_virtual_tokens", "num_vectors", "vector_length"):
            if isinstance(size := config.get(key), int) and size > largest:
                raise UserError(
                    f"{source} contradicts itself: its config says {key} = {size:,}, and no dimension of its tensors is "
                    f"larger than {largest:,}.",
                    "Save or download the adapter again.",
                )
    if not found and isinstance(config.get("r"), int) and peft_type not in PROMPT_TYPES:
        found = {config["r"]}
    return tuple(sorted(found))


def _scaling(config: dict[str, Any], ranks: tuple[int, ...]) -> tuple[float | None, float | None]:
    alpha = config.get("lora_alpha", config.get("alpha"))
    if not isinstance(alpha, (int, float)) or isinstance(alpha, bool):
        return None, None
    if not -1e30 < alpha < 1e30:  # infinite, no number, or an integer that no float holds
        raise UserError(
            f"{CONFIG} says lora_alpha = {str(alpha)[:40]}.", "Save or download the adapter again."
        )
    if len(ranks) != 1 or not ranks[0] or config.get("alpha_pattern"):
        return float(alpha), None
    return float(alpha), alpha / (math.sqrt(ranks[0]) if config.get("use_rslora") else ranks[0])


def _targets(config: dict[str, Any], modules: list[str]) -> tuple[str, ...]:
    """The names that the tensors show; a config may hold a regular expression or “all-linear”."""
    seen = sorted({m.rpartition(".")[2] for m in modules})
    named = config.get("target_modules")
    return tuple(seen) or tuple(sorted(str(n) for n in named) if isinstance(named, list) else ())


def _alters_base(config: dict[str, Any]) -> str | None:
    """Whether loading it writes into the base model's own weights, which every other column shares."""
    start = config.get("init_lora_weights")
    if isinstance(start, str) and start.lower() not in ("gaussian", "eva", "orthogonal", "true", "false"):
        return f"its {start} initialization takes a part out of the base weights"
    if config.get("bias") not in (None, "none"):
        return f"it replaces the model's biases (bias={config['bias']})"
    if config.get("peft_type") in ("OSF", "ADAPTION_PROMPT"):
        return f"{config['peft_type']} rebuilds layers of the base"
    if config.get("layer_replication"):
        return "it replicates layers of the base"
    return None


def _brought(config: dict[str, Any], tensors: list[TensorInfo], saved: tuple[str, ...]) -> tuple[str, ...]:
    if (
        config.get("peft_type") == "LN_TUNING"
    ):  # trains copies of the norms, and stores them under their own names
        return ()
    found = []
    for tensor in tensors:
        module = module_of(tensor.name)
        whole = not is_own(tensor.name) and tensor.name.startswith(PREFIX)
        if whole and not any(module == s or module.endswith("." + s) for s in saved):
            found.append(tensor.name)
    return tuple(found)


def _text(value: Any) -> str | None:
    return value if isinstance(value, str) and value else None
