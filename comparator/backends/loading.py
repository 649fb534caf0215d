"""What every transformers-based backend needs to load: dtypes, progress, Stop, quiet libraries.

Knows nothing of a particular method. Not a backend itself. Imports torch and transformers only when called.
"""

from __future__ import annotations

import contextlib
import logging
import sys
import threading
import warnings
from collections.abc import Iterable, Iterator
from typing import Any

from comparator.backends.base import Placement, Progress
from comparator.types import Problem

_TORCH_NAMES = {"fp32": "torch.float32", "fp16": "torch.float16", "bf16": "torch.bfloat16"}
_SHORT_NAMES = {v.removeprefix("torch."): k for k, v in _TORCH_NAMES.items()}


def torch_name(short: str) -> str:
    """`bf16` → `torch.bfloat16`, as source text."""
    return _TORCH_NAMES.get(short, f"torch.{short}")


def torch_dtype(short: str) -> Any:
    """`bf16` → the torch dtype."""
    import torch

    return getattr(torch, torch_name(short).removeprefix("torch."))


def short_name(dtype: Any) -> str:
    """A torch dtype → `bf16`, `uint8` …"""
    name = str(dtype).removeprefix("torch.")
    return _SHORT_NAMES.get(name, name)


def supports_bf16(device: str) -> bool:
    if not device.startswith("cuda"):
        return True
    import torch

    # Emulated bf16 (Turing and older) would time the emulation, not the card.
    return torch.cuda.get_device_capability(device)[0] >= 8


def quiet_bitsandbytes() -> None:
    """bitsandbytes logs “inputs will be cast” once per layer and token."""
    logging.getLogger("bitsandbytes.autograd._functions").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", message=".*MatMul8bitLt: inputs will be cast.*")


def import_quietly(*names: str) -> None:
    """Import libraries before anything is timed, without the lines they print about what they lack."""
    import importlib

    for logger in (
        "torchao",
        "torch.utils._pytree",
        "torch.distributed",
        "bitsandbytes.backends.cpu.ops",
        "bitsandbytes.backends.utils",
        "bitsandbytes",
    ):
        logging.getLogger(logger).setLevel(logging.ERROR)
    missing = [name for name in names if name not in sys.modules]
    failed: list[BaseException] = []

    def run() -> None:
        try:
            for name in missing:
                importlib.import_module(name)
        except BaseException as error:  # carried over to the caller's thread
            failed.append(error)

    if missing:
        # In a thread of its own, so that no frame of ours is below: gptqmodel keeps a frame of its import for good,
        # and with it everything that the callers had in their hands, a whole model for one.
        thread = threading.Thread(target=run, name="import")
        thread.start()
        thread.join()
    if failed:
        raise failed[0]


class _Bar:
    """Stands in for tqdm while transformers loads, and passes each step on."""

    def __init__(self, progress: Progress, iterable=None, total=None, desc=None, **_):
        self.iterable, self.progress = iterable, progress
        self.total = total if total is not None else (len(iterable) if hasattr(iterable, "__len__") else None)
        self.desc, self.done = desc or "Loading", 0

    def __iter__(self):
        for item in self.iterable:
            yield item
            self.update()

    def update(self, n: int = 1) -> None:
        self.done += n
        self.progress(self.done / self.total if self.total else None, self.desc)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def __getattr__(self, _):  # set_postfix, close, refresh …
        return lambda *a, **k: None


@contextlib.contextmanager
def reporting(progress: Progress) -> Iterator[None]:
    """While open, transformers' progress bars call `progress`, which may raise `Stopped` to end the load."""
    from transformers.utils import logging as transformers_logging

    previous = transformers_logging.set_tqdm_hook(
        lambda factory, args, kwargs: _Bar(progress, *args, **kwargs)
    )
    try:
        yield
    finally:
        transformers_logging.set_tqdm_hook(previous)


def from_pretrained(checkpoint, placement: Placement, progress: Progress, *, dtype: str, **arguments) -> Any:
    """The checkpoint as a transformers model in eval mode on its device.

    Where a resident variant lends its tensors (`checkpoint.lent`), nothing is read: what stays in their dtype is
    their storage, everything else is made from them on the device. Raises `Problem` for a checkpoint that
    transformers cannot build or read.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    device_map: Any = {"": placement.device}
    if placement.max_memory:
        device_map, arguments["max_memory"] = "auto", placement.max_memory
    lent, path = checkpoint.lent, str(checkpoint.path)
    made_by, source = AutoModelForCausalLM, path
    try:
        if lent is not None:
            made_by, source = lent.model_class, None
            arguments["state_dict"] = dict(lent.tensors)
            arguments["config"] = AutoConfig.from_pretrained(
                path, local_files_only=True, trust_remote_code=False
            )
        with reporting(progress):
            model = made_by.from_pretrained(
                source,
                dtype=torch_dtype(dtype),
                device_map=device_map,
                trust_remote_code=False,
                use_safetensors=True,
                local_files_only=True,
                **arguments,
            )
    except (ValueError, KeyError, OSError) as error:
        if "safetensors" in type(error).__module__ or "safetensors" in str(error).lower():
            raise Problem(
                f"The weights of {checkpoint.source} cannot be read: {error}", "Download them again."
            ) from error
        raise Problem(
            f"transformers cannot load {checkpoint.source} ({checkpoint.architecture}): {first_line(error)}",
            "Check that it is a causal language model that this transformers version knows.",
        ) from error
    if lent is not None:
        _finish_lent(model, path)
    own_memory(model, lent.tensors.values() if lent else ())
    return model.eval().requires_grad_(False)


def lent_notes(checkpoint) -> list[str]:
    """For the column, where `from_pretrained` made it from a resident variant's tensors."""
    return [checkpoint.lent.note] if checkpoint.lent is not None else []


def _finish_lent(model: Any, path: str) -> None:
    """What transformers reads from the folder beside the weights."""
    from pathlib import Path

    from transformers import GenerationConfig

    model.config.name_or_path = model.name_or_path = path
    if (Path(path) / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(path, local_files_only=True)


@contextlib.contextmanager
def int8_on_device() -> Iterator[None]:
    """Inside, LLM.int8 weights are quantized where they are.

    transformers has each weight on the GPU, copies it to the CPU and back, because bitsandbytes quantizes on the way
    from one to the other: 18 s instead of 5 for 8 billion parameters. The arithmetic is the same call either way.
    """
    import bitsandbytes as bnb
    from transformers.integrations import bitsandbytes as integration
    from transformers.quantizers.quantizers_utils import get_module_from_name

    operation = integration.Bnb8bitQuantize
    before = operation.convert

    def convert(self, input_dict, full_layer_name=None, model=None, **kwargs):
        values = {k: v[0] if isinstance(v, list) else v for k, v in input_dict.items()}
        if any(v.device.type != "cuda" for v in values.values()):
            return before(self, input_dict, full_layer_name=full_layer_name, model=model, **kwargs)
        result = {}
        for name, value in values.items():
            module, _ = get_module_from_name(model, name)
            if module.source_cls.__name__ == "Conv1D":  # GPT-2's linear layer, stored the other way round
                value = value.T
            given = model.get_parameter_or_buffer(name).__dict__
            given.pop("SCB", None)
            result[name] = bnb.nn.Int8Params(value, requires_grad=False, **given)._quantize(value.device)
        return result

    operation.convert = convert
    try:
        yield
    finally:
        operation.convert = before


def own_memory(model: Any, lent: Iterable[Any] = ()) -> None:
    """Copy CPU weights out of the file they are mapped from; those in `lent` lie in memory already.

    A dtype that needs no conversion stays a view of the safetensors file: nothing has been read when loading
    "ends", the first run pays for it, and deleting the file pulls the weights away.
    """
    in_memory = {t.data_ptr() for t in lent}
    for tensor in [*model.parameters(), *model.buffers()]:
        if (
            tensor.device.type == "cpu"
            and tensor.data_ptr() not in in_memory
            and not hasattr(tensor, "quant_state")
            and type(tensor).__name__
            in (
                "Parameter",
                "Tensor",
            )
        ):
            tensor.data = tensor.data.clone()


def first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:300]


def leave_unsupported_layers(model) -> list[str]:
    """Keep bitsandbytes' packed CPU kernel away from shapes it refuses; returns notes for the column.

    The AVX-512 kernel wants output features in blocks of 32 and input features in blocks of 64; anything else
    fails at the first forward ("N must be divisible by block_n"). Such a layer stays quantized and takes
    bitsandbytes' general CPU path.
    """
    import bitsandbytes as bnb

    odd = [
        name
        for name, module in model.named_modules()
        if isinstance(module, bnb.nn.Linear4bit)
        and getattr(module, "support_avx512bf16_for_cpu", False)
        and module.weight.device.type == "cpu"
        and (module.out_features % 32 or module.in_features % 64)
    ]
    for name in odd:
        model.get_submodule(name).support_avx512bf16_for_cpu = False
    if not odd:
        return []
    return [
        f"{len(odd)} layer(s) whose shape the packed AVX-512 kernel refuses ({odd[0]}"
        f"{' …' if len(odd) > 1 else ''}) run on bitsandbytes' general CPU path; they are 4-bit all the same."
    ]


def unquantized_experts(model) -> list[str]:
    """A note where fused mixture-of-experts weights were left in full precision, which hides in a summary."""
    fused = [(n, p) for n, p in model.named_parameters() if p.dim() == 3 and p.is_floating_point()]
    if not fused:
        return []
    total = sum(p.numel() for p in model.parameters())
    share = sum(p.numel() for _, p in fused) / max(total, 1)
    return [
        f"The fused expert weights ({fused[0][0]} …, about {share:.0%} of what is stored) are not linear layers and "
        f"stay {short_name(fused[0][1].dtype)}."
    ]
