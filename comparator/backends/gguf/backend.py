"""GGUF files, executed as they are by llama.cpp."""

from __future__ import annotations

import math
import shutil
from dataclasses import replace
from functools import cache
from pathlib import Path

from comparator.backends import ready_made, saving
from comparator.backends.base import AdapterKind, Backend, Method, Option, Progress, QuantizedType, Training
from comparator.backends.gguf import write
from comparator.backends.options import KV_CACHE
from comparator.backends.sizes import TensorSize
from comparator.core.errors import UserError
from comparator.core.variant import Variant
from comparator.sources import Checkpoint, gguf_files
from comparator.sources.gguf import gguf_facts
from comparator.sources.gguf_header import GgufHeader, read_gguf
from comparator.util import formatting

# One name in GGUF for families that differ in little.
_SAME = {"llama": ("LlamaForCausalLM", "MistralForCausalLM", "MixtralForCausalLM")}
_SIZES = {  # of config.json → of the file
    "hidden_size": "embedding_length",
    "num_hidden_layers": "block_count",
    "num_attention_heads": "attention.head_count",
    "num_key_value_heads": "attention.head_count_kv",
    "intermediate_size": "feed_forward_length",
}
_WORDS = {
    "_0": "{} bits in blocks of 32, one scale per block",
    "_1": "{} bits in blocks of 32, a scale and a minimum per block",
    "_K": "{} bits in blocks of 256, whose scales are quantized too",
}
_BITS = {"MXFP4": 4, "NVFP4": 4, "IQ1_S": 1, "IQ1_M": 1, "TQ1_0": 2, "TQ2_0": 2}
_REPACKED = ("q4_0", "q4_k", "iq4_nl")
_NAMES = (
    "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ2_XXS", "IQ2_XS", "IQ2_S",
    "IQ3_XXS", "IQ3_S", "IQ4_NL", "IQ4_XS", "MXFP4", "NVFP4", "IQ1_S", "IQ1_M", "TQ1_0", "TQ2_0",
)  # fmt: skip


@cache
def quantized_types() -> dict[str, QuantizedType]:
    """By ggml's name of the type."""
    found = {}
    for name in _NAMES:
        bits = _BITS.get(name) or int("".join(filter(str.isdigit, name.partition("_")[0])))
        words = next(
            (w.format(bits) for end, w in _WORDS.items() if name.startswith("Q") and name.endswith(end)), None
        )
        found[name] = QuantizedType(name.lower(), bits, words or f"{bits} bits in ggml's blocks {name}")
    return found


class Gguf(Backend):
    name = "gguf"
    runtime = "llama.cpp"
    requires = ("xllamacpp", "gguf")
    install = "-r requirements-llamacpp.txt"
    loaded_by = ("llama.cpp",)
    cpu_only = "xllamacpp's wheel on PyPI has no CUDA kernels"
    cache_options = (
        replace(KV_CACHE, help="type of llama.cpp's keys and values. Default: f16", choices=("q8_0", "q4_0")),
    )
    types = tuple(quantized_types().values())
    methods = (
        Method("gguf", "GGUF by llama.cpp", "Executed by llama.cpp: a file as it is (gguf@/path/model.gguf, gguf@user/repo), or one made here.",
               (Option("type", "type of the weights of a file that is made here", "q8_0", choices=tuple(write.TYPES), form="{value}"),
                Option("file", "which file of a folder or repo, by its name or a part that only it has", None, "text")),
               takes_source=True, precision=38, bits=8, decode=("faster", "")),
    )  # fmt: skip

    def __init__(self):
        self._files: dict[str, Path] = {}

    # ------------------------------------------------------------ in lists

    def describe(self, variant: Variant) -> str:
        values = self.values(variant)
        cached = f", KV cache {values['kv']}" if values["kv"] else ""
        if variant.source:
            return f"a GGUF file as it is, by llama.cpp{cached}"
        return f"{values['type'].upper()} made here, by llama.cpp{cached}"

    def bits(self, variant: Variant) -> float:
        """By what most of a file holds, where it lies here."""
        if not variant.source:
            return write.TYPES[self.values(variant)["type"]]
        file = gguf_files.here(variant.source)
        kind = _kind(file, file.stat().st_mtime_ns) if file else ""
        known = quantized_types().get(kind)
        return known.bits if known else {"F32": 32, "F16": 16, "BF16": 16}.get(kind, 4)

    def offers(self, model: str) -> list[str]:
        """The file that a model is unpacked from for transformers."""
        return [Variant("gguf", model).notation] if gguf_files.here(model) else []

    # ------------------------------------------------------------ the file

    def check(self, variant: Variant, values: dict[str, str]) -> None:
        asked = self.requested(variant)
        if variant.source and "type" in asked:
            raise UserError(
                f"{variant.source} is a file with its own types, so not {asked['type']}.",
                f"Write gguf@{variant.source}, or gguf:{asked['type']} for a file made here.",
            )
        if not variant.source and "file" in asked:
            raise UserError(
                "The option file= selects one of the files of a folder or repo, but none is named.",
                f"Write gguf@user/repo:file={asked['file']}",
            )

    def complete(self, variant: Variant, checkpoint: Checkpoint, progress: Progress | None = None) -> Variant:
        if variant.source:
            self._check_same_model(self.file(variant, checkpoint, progress), variant, checkpoint)
        else:
            write.check(checkpoint)
        return variant

    def file(self, variant: Variant, checkpoint: Checkpoint, progress: Progress | None = None) -> Path:
        """The variant's file, downloaded where it is on the Hub, or made here. Raises `UserError`."""
        values, progress = self.values(variant), progress or _silent
        if not variant.source:
            return write.make(checkpoint, values["type"], progress)
        if variant.notation not in self._files or not self._files[variant.notation].is_file():
            self._files[variant.notation] = gguf_files.find(
                variant.source, variant.revision, values["file"] or None, progress
            )
        return self._files[variant.notation]

    def save(self, checkpoint, variant, placement, target, progress, change=None):
        if change is not None:
            raise saving.refuse_change(variant)
        file = self.file(variant, checkpoint, progress)
        progress(None, f"copying {file.name}")
        shutil.copy(file, target)

    def _check_same_model(self, file: Path, variant: Variant, checkpoint: Checkpoint) -> None:
        """Raises `UserError` for a file that is damaged, or of another model than the comparison's."""
        header, source = read_gguf(file), variant.source or ""
        architecture = gguf_facts(file, source).architecture
        if checkpoint.architecture not in _SAME.get(header.architecture, (architecture,)):
            raise ready_made.other_architecture(source, str(architecture), checkpoint)
        sizes = {ours: header.of_model(theirs) for ours, theirs in _SIZES.items()}
        ready_made.check_sizes(source, sizes, checkpoint)

    def tensor_sizes(self, variant: Variant, checkpoint: Checkpoint, device: str = ""):
        if variant.source:
            header = read_gguf(self.file(variant, checkpoint))
            stored = [(t.name, t.type.lower(), t.shape, t.bytes) for t in header.tensors]
        else:
            made = write.stored(checkpoint, self.values(variant)["type"])
            stored = [(t.name, kind, t.shape, size) for t, kind, size in made]
        return [
            TensorSize(name, size, copy_bytes=size if device == "cpu" and _repacked(name, kind, shape) else 0)
            for name, kind, shape, size in stored
        ]

    def notes(self, variant: Variant, checkpoint: Checkpoint, header: GgufHeader) -> list[str]:
        """For the reader of the column."""
        return self._vocabulary_note(checkpoint, header) + self._smaller_note(variant, header)

    def _smaller_note(self, variant: Variant, header: GgufHeader) -> list[str]:
        """Where rows are too short for a K-quant."""
        kind = self.values(variant)["type"]
        if variant.source or "_k" not in kind:
            return []
        small = [t for t in header.tensors if len(t.shape) > 1 and t.shape[-1] % 256]
        types = ", ".join(sorted({t.type for t in small}))
        share = sum(math.prod(t.shape) for t in small) / header.parameters
        return (
            [
                f"{formatting.percent(share)} of the weights are in rows whose length is not a multiple of 256 values, "
                f"which a K-quant requires: they are stored as {types}, as llama-quantize does."
            ]
            if small
            else []
        )

    def _vocabulary_note(self, checkpoint: Checkpoint, header: GgufHeader) -> list[str]:
        width = next(
            (t.shape[0] for t in header.tensors if t.name == "token_embd.weight"), checkpoint.vocab_size
        )
        if not checkpoint.vocab_size or width == checkpoint.vocab_size:
            return []
        return [
            f"Its vocabulary has {width:,} entries, the model's {checkpoint.vocab_size:,}: "
            + (
                "the entries beyond it are ignored."
                if width > checkpoint.vocab_size
                else "divergence is not defined."
            )
        ]

    # ------------------------------------------------------------ what llama.cpp is not asked for

    def check_adapter(self, variant: Variant, adapter: AdapterKind) -> None:
        raise UserError(
            f"{adapter.source} cannot be put on {variant.notation}: llama.cpp reads adapters in GGUF only.",
            "Compare it on bf16 or nf4.",
        )

    def training(self, variant: Variant, device: str) -> Training:
        raise UserError(
            f"No adapter can be trained on {variant.notation}: llama.cpp executes it, without gradients.",
            "Train it on bf16 or nf4, of the same model.",
        )


def _repacked(name: str, kind: str, shape: tuple[int, ...]) -> bool:
    """Whether llama.cpp makes a copy of a matrix in the layout of its CPU kernels, beside the mapped file: those of 4 bits,
    in blocks of eight rows; the embedding is looked up as it is."""
    return kind in _REPACKED and len(shape) == 2 and shape[0] % 8 == 0 and "emb" not in name


@cache
def _kind(file: Path, changed_ns: int) -> str:
    """ggml's name of the type of most of a file's weights; "" where it cannot be read."""
    try:
        return read_gguf(file).weight_types.most_common(1)[0][0]
    except UserError:
        return ""


def _silent(fraction: float | None, message: str) -> None:
    pass
