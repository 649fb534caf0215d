"""Functions of the gguf package that are replaced; written for gguf 0.19."""

from __future__ import annotations

import functools

WRITTEN_FOR = "0.19"


def read_once() -> None:
    """Keep what gguf has parsed, for the rest of this process: transformers parses the same file and builds the same table
    of names hundreds of times. Halves the time of a conversion."""
    import gguf

    gguf.GGUFReader = functools.lru_cache(maxsize=1)(gguf.GGUFReader)
    gguf.get_tensor_name_map = functools.lru_cache(maxsize=4)(gguf.get_tensor_name_map)
