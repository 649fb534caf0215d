"""gptqmodel's compiled extensions, and its ExLlamaV2 changed in three places; written for gptqmodel 7.6.

The weights and the sums stay the same.

Stream: gptqmodel's source launches every kernel on CUDA's default stream (`kernel<<<grid, block>>>`). A graph being
captured does not see that stream: the kernels run once, outside, and the captured graph multiplies nothing. So the
library's own source is copied to the cache with the stream written into each launch, before it is compiled.

Row table: with act-order the rows of a packed weight are sorted by group, and the kernel reads each input element through
a table. Without it the rows lie in order and the table is the identity; gptqmodel passes `g_idx` all the same, and each
block of threads looks up a table that maps n to n. It is left out where that is so.

Scratch: sized for what is read of it, see `unpacking_scratch_only`.

Where another release is built differently, the library stays as it is.
"""

from __future__ import annotations

import re
import shutil
from functools import partial
from pathlib import Path
from typing import Any

WRITTEN_FOR = "7.6"
SCRATCH_ALIGNMENT = 128  # bytes, to which ExLlamaV2 rounds its slice up
_LAUNCH = re.compile(r"<<<\s*(\w+)\s*,\s*(\w+)\s*>>>")
_STREAM = "c10::cuda::getCurrentCUDAStream().stream()"
_HEADER = "#include <c10/cuda/CUDAStream.h>\n"


def with_stream(source: str) -> str:
    """The text of a .cu file with torch's current stream in every launch that names none."""
    text, count = _LAUNCH.subn(rf"<<<\1, \2, 0, {_STREAM}>>>", source)
    return _HEADER + text if count else source


def launch_on_stream(cache: Path) -> bool:
    """Have gptqmodel compile ExLlamaV2, for GPTQ and for AWQ, from the changed copy. False where this release is built another
    way, which leaves the library as it is. Call before the extensions are looked for or compiled."""
    try:
        extensions = _extensions()
        root = _root()
        files = {name: [Path(s) for s in _listed(e.sources)] for name, e in extensions.items()}
    except (ImportError, AttributeError):
        return False
    target = cache / "kernels" / "exllamav2-on-stream"
    every = [s for each in files.values() for s in each]
    if all(target in s.parents for s in every):
        return True
    if not root.is_dir() or not all(root in s.parents and s.is_file() for s in every):
        return False
    try:
        shutil.copytree(root, target, dirs_exist_ok=True)
        for file in target.rglob("*.cu"):
            file.write_text(with_stream(file.read_text(encoding="utf-8")), encoding="utf-8")
    except OSError:  # a read-only cache: the library stays as it is, and such a column decodes eagerly
        return False
    for name, extension in extensions.items():
        sources = [str(target / s.relative_to(root)) for s in files[name]]
        extension.sources = partial(list, sources)
    return True


def _extensions() -> dict[str, Any]:
    """ExLlamaV2's two extensions by the names of their variables."""
    from gptqmodel.utils import exllamav2

    names = ("_EXLLAMAV2_GPTQ_TORCH_OPS_EXTENSION", "_EXLLAMAV2_AWQ_TORCH_OPS_EXTENSION")
    return {name: getattr(exllamav2, name) for name in names}


def _root() -> Path:
    from gptqmodel.utils import exllamav2

    return exllamav2._exllamav2_root()


def _listed(sources: Any) -> list[str]:
    return list(sources() if callable(sources) else sources)


def follows_stream() -> bool:
    """Whether ExLlamaV2's launches follow torch's stream, so that a CUDA graph can hold them."""
    try:
        files = [s for extension in _extensions().values() for s in _listed(extension.sources)]
    except (ImportError, AttributeError):
        return False
    return all("exllamav2-on-stream" in s for s in files)


def in_order(g_idx: Any, group_size: int) -> bool:
    """Whether row r belongs to group r // group_size: `g_idx` (rows,) int."""
    import torch

    rows = torch.arange(g_idx.numel(), device=g_idx.device, dtype=g_idx.dtype)
    return bool(torch.equal(g_idx, rows // group_size))


def without_table(tensors: dict[str, Any], group_size: int) -> dict[str, Any]:
    """What ExLlamaV2 is made from, without `g_idx` where that says nothing."""
    g_idx = tensors.get("g_idx")
    if g_idx is None or group_size < 1 or not in_order(g_idx, group_size):
        return tensors
    return {name: tensor for name, tensor in tensors.items() if name != "g_idx"}


def skip_row_table() -> bool:
    """Have gptqmodel's ExLlamaV2 layers made so. False where this release makes them another way, which leaves the
    library as it is. Once is enough; again does nothing."""
    try:
        from gptqmodel.nn_modules.qlinear.exllamav2 import ExllamaV2Linear

        own = ExllamaV2Linear.ext_make_q_matrix
    except (ImportError, AttributeError):
        return False
    if getattr(own, "comparator_order", False):
        return True

    def ext_make_q_matrix(self, w: dict, temp_dq, key: str | None = None):
        return own(self, without_table(w, self.group_size), temp_dq, key)

    ext_make_q_matrix.comparator_order = True
    ExllamaV2Linear.ext_make_q_matrix = ext_make_q_matrix
    return True


def unpacking_scratch_only() -> None:
    """Have ExLlamaV2's scratch hold the largest unpacked weight, which is all that its kernels read of it.

    gptqmodel 7.6 adds room for activations of 2,048 × 8 tokens that nothing uses: 940 MB beside the 117 MB of a model of 8B
    shapes. Again does nothing; where this release sizes it another way the library stays as it is.
    """
    from importlib import import_module

    for name, kind in (("exllamav2", "ExllamaV2Linear"), ("exllamav2_awq", "AwqExllamaV2Linear")):
        try:
            layer = getattr(import_module(f"gptqmodel.nn_modules.qlinear.{name}"), kind)
            layer.temp_fwd_size, layer.temp_dq_size  # noqa: B018 - both have to be there
        except (ImportError, AttributeError):
            continue
        layer.temp_fwd_size = lambda self, *_, **__: SCRATCH_ALIGNMENT


def extension_built(name: str) -> bool:
    """Whether gptqmodel has compiled this extension before, for this torch and this GPU."""
    try:
        from gptqmodel import extension

        jit = extension._EXTENSION_SPECS_BY_NAME[name].resolve()
        return jit._ops_available() or any(p.is_file() for p in jit._candidate_binary_paths(jit.build_root()))
    except Exception:  # what cannot be looked up is not ready
        return False
