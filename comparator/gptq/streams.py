"""ExLlamaV2, compiled so that its launches follow torch's stream.

gptqmodel's source launches every kernel on CUDA's default stream (`kernel<<<grid, block>>>`). A graph being captured
does not see that stream: the kernels run once, outside, and the graph that comes out multiplies nothing. (That is
fast. It is also how a figure above the bandwidth floor comes about.) Here the library's own source is copied to the
cache with the stream written into each launch, before it is compiled; nothing else of it changes. Knows nothing of
models.
"""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any

_LAUNCH = re.compile(r"<<<\s*(\w+)\s*,\s*(\w+)\s*>>>")
_STREAM = "c10::cuda::getCurrentCUDAStream().stream()"
_HEADER = "#include <c10/cuda/CUDAStream.h>\n"


def with_stream(source: str) -> str:
    """The text of a .cu file with torch's current stream in every launch that names none."""
    text, count = _LAUNCH.subn(rf"<<<\1, \2, 0, {_STREAM}>>>", source)
    return _HEADER + text if count else source


def patch(cache: Path) -> bool:
    """Have gptqmodel compile ExLlamaV2 from the changed copy. False where this release is built another way, which
    leaves the library as it is. Call before the extension is looked for or compiled."""
    try:
        from gptqmodel.utils import exllamav2

        extension = exllamav2._EXLLAMAV2_GPTQ_TORCH_OPS_EXTENSION
        root = exllamav2._exllamav2_root()
        given = [Path(s) for s in _resolved(extension.sources)]
    except (ImportError, AttributeError):
        return False
    target = cache / "kernels" / "exllamav2-on-stream"
    if any(target in s.parents for s in given):
        return True
    if not root.is_dir() or not all(root in s.parents and s.is_file() for s in given):
        return False
    try:
        shutil.copytree(root, target, dirs_exist_ok=True)
        for file in target.rglob("*.cu"):
            file.write_text(with_stream(file.read_text(encoding="utf-8")), encoding="utf-8")
    except OSError:  # a read-only cache: the library stays as it is, and such a column decodes eagerly
        return False
    sources = [str(target / s.relative_to(root)) for s in given]
    extension.sources = lambda: sources
    return True


def _resolved(sources: Any) -> list[str]:
    return list(sources() if callable(sources) else sources)


def follows(kernel_class: str) -> bool:
    """Whether the launches of this gptqmodel class follow torch's stream, so that a graph can hold them."""
    if kernel_class != "ExllamaV2Linear":
        return True
    try:
        from gptqmodel.utils import exllamav2

        given = _resolved(exllamav2._EXLLAMAV2_GPTQ_TORCH_OPS_EXTENSION.sources)
    except (ImportError, AttributeError):
        return False
    return all("exllamav2-on-stream" in s for s in given)
