"""Load a GGUF file into a llama.cpp process of its own, and measure what that took."""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from comparator.backends import backend_for
from comparator.backends.base import Placement, Progress
from comparator.backends.gguf import write
from comparator.backends.options import KV_CACHE
from comparator.core.result import Memory
from comparator.core.variant import Variant
from comparator.metrics import layers
from comparator.runtimes.base import ResidentModel, Runtime
from comparator.sources import Checkpoint
from comparator.util import formatting

if TYPE_CHECKING:
    from comparator.adapters import Plan
    from comparator.runtimes.llama_cpp.resident import LlamaCppModel

WARM_UP = (1, 2, 3, 4, 5, 6, 7, 8)


class LlamaCpp(Runtime):
    name = "llama.cpp"
    absent = {k: v for k, v in Runtime.absent.items() if k not in ("noise floor", "weight errors")}

    def load(
        self,
        checkpoint: Checkpoint,
        variant: Variant,
        placement: Placement,
        progress: Progress,
        residents: Sequence[ResidentModel] = (),
        plan: Plan | None = None,
    ) -> LlamaCppModel:
        import torch

        from comparator.runtimes.llama_cpp.child import Child
        from comparator.runtimes.llama_cpp.chooser import Rules
        from comparator.runtimes.llama_cpp.resident import LlamaCppModel
        from comparator.runtimes.llama_cpp.rows import rows
        from comparator.sources.gguf_header import read_gguf

        backend: Any = backend_for(variant)
        file: Path = backend.file(variant, checkpoint, progress)
        header = read_gguf(file)
        rules = Rules(checkpoint)
        threads, cache = torch.get_num_threads(), backend.values(variant)[KV_CACHE.name]
        progress(0.0, "starting llama.cpp")
        child = Child(variant.notation)
        try:
            gpu = _gpu(placement.device) if child.ask("offloads") else None
            device = placement.device if gpu is not None else "cpu"
            start = time.perf_counter()
            facts = child.open(file, gpu, threads, lambda: progress(None, "loading"), cache)
            load_s = time.perf_counter() - start
            start = time.perf_counter()
            buffers = child.ask("use", len(WARM_UP) + 1, 1)
            child.feed(WARM_UP, threading.Event())
            child.feed(WARM_UP[:1], threading.Event())
            prepare_s = time.perf_counter() - start
            grown = child.ask("grown_bytes")
        except BaseException:
            child.close()
            raise
        table = rows(header, checkpoint, device)
        weight_bytes, _ = layers.totals(table)
        return LlamaCppModel(
            runtime=self,
            checkpoint=checkpoint,
            variant=variant,
            device=device,
            kernel=f"llama.cpp {header.quantization or header.dtype}",
            vocabulary=min(facts["vocabulary"], checkpoint.vocab_size or facts["vocabulary"]),
            memory=Memory(
                loaded_weight_bytes=weight_bytes,
                loaded_quant_state_bytes=0,
                weight_bytes=weight_bytes,
                quant_state_bytes=0,
                resident_bytes=facts["buffers"].get("model", 0) + sum(buffers.values()),
                load_peak_bytes=facts["risen_bytes"],
                peak_source="process (resident set)",
            ),
            load_s=load_s,
            prepare_s=prepare_s,
            rows=table,
            notes=[
                _features(facts["system"], threads, device),
                _memory_note(facts["buffers"].get("model", 0), buffers, grown),
                *([f"KV cache in {cache}, with flash attention."] if cache else []),
                *_mixed_note(header.weight_types),
                *_weights_note(header.architecture),
                *backend.notes(variant, checkpoint, header),
            ],
            file=file,
            gpu=gpu,
            threads=threads,
            cache=cache,
            child=child,
            rules=rules,
            header=header,
            elsewhere=device != placement.device,
        )


def _gpu(device: str) -> int | None:
    return int(device.partition(":")[2] or 0) if device.startswith("cuda") else None


def _features(system: str, threads: int, device: str) -> str:
    """llama_print_system_info ("CPU : AVX2 = 1 | …") as a note."""
    found = re.findall(r"(\w+) = 1\b", system)
    where = f"{threads} thread{'s' if threads > 1 else ''}" if device == "cpu" else f"all layers on {device}"
    return f"Executed by llama.cpp in a process of its own, {where}; built with {', '.join(found)}."


def _memory_note(model: int, buffers: dict[str, int], grown: int | None) -> str:
    kinds = {"KV": "keys and values", "compute": "compute buffers", "output": "logits"}
    parts = [f"{formatting.megabytes(model)} of weights, mapped from the file"]
    parts += [
        f"{formatting.megabytes(buffers[kind])} of {words}"
        for kind, words in kinds.items()
        if kind in buffers
    ]
    rest = f"; its process grew by {formatting.megabytes(grown)}" if grown else ""
    return f"Resident, as llama.cpp reports it after a short run: {formatting.join(parts)}{rest}."


def _weights_note(architecture: str) -> list[str]:
    if architecture in write.TURNED:
        return []
    return [f"Weight errors are –: the order of tensors of {architecture} is not known here."]


def _mixed_note(weight_types: Any) -> list[str]:
    total = weight_types.total()
    large = [(name, count) for name, count in weight_types.most_common(4) if count > 0.001 * total]
    shares = [f"{formatting.percent(count / total)} {name}" for name, count in large]
    return [f"Weights by type: {', '.join(shares)}."] if len(shares) > 1 else []
