"""What every transformers-based backend needs to load: dtypes, progress, Stop, quiet libraries.

Not a backend itself. Imports torch and transformers only when called.
"""

from __future__ import annotations

import contextlib
import importlib
import logging
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from comparator.backends.base import Placement, Progress
from comparator.backends.dtypes import torch_dtype
from comparator.core.errors import UserError
from comparator.sources.examine import check_loaded, require_complete
from comparator.util import formatting, streams
from comparator.util.compat import transformers as compat
from comparator.util.compat.torch import rewrap, wrapped_tensors


def import_quietly(*names: str) -> None:
    """Import libraries before anything is timed, without the lines they log about what they lack."""
    from comparator.backends import all_backends

    of_backends = (name for backend in all_backends() for name in backend.loggers)
    for logger in ("torchao", "torch.utils._pytree", "torch.distributed", *of_backends):
        logging.getLogger(logger).setLevel(logging.ERROR)
    missing = [name for name in names if name not in sys.modules]
    if missing:
        # In a thread of its own, so that none of our frames is below: gptqmodel keeps a frame of its import permanently,
        # and with it every local variable of the callers, a whole model for one.
        streams.in_thread(lambda: [importlib.import_module(name) for name in missing], "import").result()


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
    their storage, everything else is made from them on the device. Raises `UserError` for a checkpoint that
    transformers cannot build or read.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    require_complete(checkpoint)
    device_map: Any = {"": placement.device}
    if placement.max_memory:
        device_map, arguments["max_memory"] = "auto", placement.max_memory
    lent, path = checkpoint.lent, str(checkpoint.path)
    model_class, source = AutoModelForCausalLM, path
    try:
        if lent is not None:
            model_class, source = lent.model_class, None
            arguments["state_dict"] = dict(lent.tensors)
            arguments["config"] = AutoConfig.from_pretrained(
                path, local_files_only=True, trust_remote_code=False
            )
        # On a GPU the pages go straight to the device.
        on_cpu = placement.device == "cpu" and lent is None
        reading = compat.read_into_memory() if on_cpu else contextlib.nullcontext(False)
        with reporting(progress), reading as is_own:
            model, info = model_class.from_pretrained(
                source,
                dtype=torch_dtype(dtype),
                device_map=device_map,
                trust_remote_code=False,
                use_safetensors=True,
                local_files_only=True,
                output_loading_info=True,
                **arguments,
            )
    except (ValueError, KeyError, OSError) as error:
        if "safetensors" in type(error).__module__ or "safetensors" in str(error).lower():
            raise UserError(
                f"The weights of {checkpoint.source} cannot be read: {error}", "Download them again."
            ) from error
        raise UserError(
            f"transformers cannot load {checkpoint.source} ({checkpoint.architecture}): {formatting.first_line(error)}",
            "Check that it is a causal language model that this transformers version knows.",
        ) from error
    check_loaded(checkpoint.source, info)  # whatever was missing is random now
    if lent is not None:
        _finish_lent(model, path)
    if not is_own:
        own_memory(model, lent.tensors.values() if lent else (), packed=checkpoint.quantization is not None)
    return model.eval().requires_grad_(False)


def refuse_main_memory(placement: Placement, title: str) -> None:
    """Raises `UserError` where a part of the model would lie in main memory beside a GPU. title: of a method whose packed weights
    accelerate cannot move to the GPU at each use."""
    if placement.device.startswith("cuda") and "cpu" in (placement.max_memory or {}):
        raise UserError(
            f"The weights of {title} cannot be kept in main memory next to a GPU: accelerate does not move them back for "
            "each layer.",
            "Remove the CPU from the memory limits, unload other variants, or use gptq or bf16.",
        )


def lent_notes(checkpoint) -> list[str]:
    """For the column, where `from_pretrained` made it from a resident variant's tensors."""
    return [checkpoint.lent.note] if checkpoint.lent is not None else []


def _finish_lent(model: Any, path: str) -> None:
    """What transformers reads from the folder beside the weights."""
    model.config.name_or_path = model.name_or_path = path
    set_generation_config(model, Path(path))


def set_generation_config(model: Any, path: Path) -> None:
    """Give the model the checkpoint's generation_config.json, where there is one."""
    from transformers import GenerationConfig

    if (path / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(path, local_files_only=True)


def own_memory(model: Any, lent: Iterable[Any] = (), *, packed: bool = False) -> None:
    """Copy CPU weights out of the file they are mapped from; those in `lent` lie in memory already, and so does what
    tensor subclasses wrap unless the checkpoint was `packed` when it was read.

    A dtype that needs no conversion stays a view of the safetensors file: nothing has been read when loading
    "ends", the first run pays for it, and deleting the file pulls the weights away.
    """
    in_memory = {t.data_ptr() for t in lent}
    for tensor in [*model.parameters(), *model.buffers()]:
        if wrapped_tensors(tensor) is not None:
            if packed and tensor.device.type == "cpu":
                rewrap(tensor, lambda inner: inner.clone())
        elif (
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
