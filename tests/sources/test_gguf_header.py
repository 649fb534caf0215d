"""What a GGUF file's header says of it, and that a hostile header costs neither time nor memory."""

from __future__ import annotations

import struct
import time
import tracemalloc
from pathlib import Path

import pytest
from gguf import GGMLQuantizationType, GGUFWriter

from comparator.core.errors import UserError
from comparator.sources.gguf_header import read_gguf

_HUGE = 2**64 - 1


def string(text: bytes, length: int | None = None) -> bytes:
    return struct.pack("<Q", len(text) if length is None else length) + text


def pair(key: bytes, kind: int, value: bytes) -> bytes:
    return string(key) + struct.pack("<I", kind) + value


def array(kind: int, count: int, values: bytes = b"") -> bytes:
    return struct.pack("<IQ", kind, count) + values


def header(pairs: list[bytes], tensors: list[bytes] = (), tensor_count: int | None = None, pair_count: int | None = None) -> bytes:  # fmt: skip
    counts = [len(x) if n is None else n for x, n in ((tensors, tensor_count), (pairs, pair_count))]
    return b"GGUF" + struct.pack("<IQQ", 3, *counts) + b"".join([*pairs, *tensors])


def tensor(shape: list[int], kind: int = 0, offset: int = 0, dimensions: int | None = None) -> bytes:
    count = len(shape) if dimensions is None else dimensions
    return string(b"blk.0.attn_q.weight") + struct.pack(f"<I{len(shape)}QIQ", count, *shape, kind, offset)


ARCHITECTURE = pair(b"general.architecture", 8, string(b"llama"))
HOSTILE = {
    "tensors": header([ARCHITECTURE], tensor_count=_HUGE),
    "keys": header([], pair_count=_HUGE),
    "keys in zeros": header([bytes(4_000_000)], pair_count=300_000),
    "key length": header([string(b"x", _HUGE)]),
    "string length": header([pair(b"a", 8, string(b"x", _HUGE))]),
    "numbers": header([pair(b"a", 9, array(10, _HUGE))]),
    "strings": header([pair(b"a", 9, array(8, _HUGE))]),
    "strings in zeros": header([pair(b"a", 9, array(8, 10**9, bytes(4_000_000)))]),
    "lengths of strings": header([pair(b"a", 9, array(8, 3, struct.pack("<QQ", _HUGE, _HUGE)))]),
    "nested arrays": header([pair(b"a", 9, array(9, 500_000, array(9, 1) * 300_000))]),
    "value type": header([pair(b"a", 99, b"")]),
    "dimensions": header([ARCHITECTURE], [tensor([1] * 8, dimensions=2**32 - 1)]),
    "shape": header([ARCHITECTURE], [tensor([_HUGE] * 4)]),
    "offset": header([ARCHITECTURE], [tensor([1], offset=_HUGE)]),
    "alignment of nothing": header([pair(b"general.alignment", 4, bytes(4)), ARCHITECTURE], [tensor([1])]),
    "alignment in words": header([pair(b"general.alignment", 8, string(b"x")), ARCHITECTURE], [tensor([1])]),
    "architecture as a number": header([pair(b"general.architecture", 4, bytes(4))], [tensor([1])]),
}


@pytest.mark.parametrize("content", HOSTILE.values(), ids=HOSTILE)
def test_a_hostile_header_is_refused_in_bounded_time_and_memory(tmp_path: Path, content: bytes) -> None:
    file = tmp_path / "hostile.gguf"
    file.write_bytes(content + bytes(64))
    tracemalloc.start()
    started_s = time.process_time()
    try:
        with pytest.raises(UserError) as caught:
            read_gguf(file)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert time.process_time() - started_s < 10, "something was counted or calculated before it was bounded"
    assert peak < 50e6, f"{peak / 1e6:.0f} MB for a header: a count was trusted"
    assert "hostile.gguf" in caught.value.problem and caught.value.advice


def write(file: Path, architecture: str = "llama", **fields: str) -> None:
    import numpy as np

    writer = GGUFWriter(str(file), architecture)
    for key, value in fields.items():
        writer.add_string(f"general.{key}", value)
    if "-of-" in file.name:
        writer.add_uint16("split.no", 1)
        writer.add_uint16("split.count", 2)
    writer.add_tensor("blk.1.attn_q.weight", np.ones((8, 8), dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.mark.parametrize(
    ("name", "architecture", "kind", "words"),
    [
        ("tiny-00002-of-00002.gguf", "llama", None, ["part 2 of 2", "--merge tiny-00001-of-00002.gguf"]),
        ("mmproj-tiny.gguf", "clip", None, ["vision projector"]),
        ("mmproj.gguf", "qwen2vl", "mmproj", ["vision projector"]),
        ("lora.gguf", "llama", "adapter", ["LoRA adapter in GGUF", "as the model"]),
        ("vocab.gguf", "llama", "vocab", ["no model", "vocab"]),
        ("imatrix.gguf", "llama", "imatrix", ["no model", "imatrix"]),
    ],
)
def test_what_is_no_whole_model_is_named(tmp_path: Path, name: str, architecture: str, kind: str | None, words: list[str]) -> None:  # fmt: skip
    write(tmp_path / name, architecture, **({"type": kind} if kind else {}))
    with pytest.raises(UserError) as caught:
        read_gguf(tmp_path / name)
    for word in words:
        assert word in str(caught.value), f"“{word}” is missing from: {caught.value}"


@pytest.mark.parametrize("kind", [GGMLQuantizationType.Q8_K, GGMLQuantizationType.I8, 31, 9999])
def test_a_type_that_cannot_be_unpacked_is_named(tmp_path: Path, kind: int) -> None:
    file = tmp_path / "odd.gguf"
    file.write_bytes(header([ARCHITECTURE], [tensor([256], int(kind))]) + bytes(4096))
    with pytest.raises(UserError) as caught:
        read_gguf(file)
    assert getattr(kind, "name", f"number {kind}") in caught.value.problem and "Q8_0" in caught.value.advice


def test_every_type_that_the_library_unpacks_is_accepted(tmp_path: Path) -> None:
    file = tmp_path / "known.gguf"
    for kind in ("F32", "F16", "BF16", "Q4_0", "Q5_K", "Q6_K", "IQ4_XS", "IQ2_XXS", "MXFP4", "TQ1_0"):
        file.write_bytes(header([ARCHITECTURE], [tensor([256], GGMLQuantizationType[kind])]) + bytes(4096))
        assert read_gguf(file).types == {"blk.0.attn_q.weight": kind}


def test_long_values_are_kept_as_their_length(tmp_path: Path) -> None:
    file = tmp_path / "long.gguf"
    pairs = [
        ARCHITECTURE,
        pair(b"tokenizer.huggingface.json", 8, string(b"x" * 2**21)),
        pair(b"tokenizer.ggml.tokens", 9, array(8, 3, string(b"a") + string(b"bc") + string(b""))),
        pair(b"tokenizer.ggml.scores", 9, array(6, 2000, bytes(8000))),
        pair(b"llama.sections", 9, array(5, 2, struct.pack("<2i", 3, -4))),
    ]
    file.write_bytes(header(pairs, [tensor([8])]) + bytes(4096))
    metadata = read_gguf(file).metadata
    assert metadata["tokenizer.huggingface.json"] == 2**21 and metadata["tokenizer.ggml.tokens"] == 3
    assert metadata["tokenizer.ggml.scores"] == 2000 and metadata["llama.sections"] == [3, -4]
