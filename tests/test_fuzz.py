"""What strangers send, changed at random: it is read, or refused with a `UserError`, in bounded time and memory.

`make test` tries a few examples of each, the same ones each time; `make fuzz` spends a minute on each, and
`make fuzz SECONDS=3600` a night.
"""

from __future__ import annotations

import copy
import gzip
import json
import os
import resource
import shutil
import struct
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import tiny_models
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st

from comparator.adapters import describe as describe_adapter
from comparator.adapters.locate import AdapterFiles
from comparator.backends import calibration, resolve
from comparator.comparison.prompts.reader import load as load_prompts
from comparator.core import document
from comparator.core.errors import UserError
from comparator.core.request import ChatTemplate
from comparator.core.variant import parse_adapter
from comparator.decoding import chat_template
from comparator.reporting import export
from comparator.sources import examine, folder, gguf_header, safetensors_header
from comparator.training import data
from comparator.training.types import DataSource
from tests.sample import comparison

BUDGET_S = float(os.environ.get("FUZZ_SECONDS", 0))  # of each test; 0: a few examples
EXAMPLES = 15
MOST_S = 5.0  # of processor time, for one input
MOST_BYTES = 300e6

# ---------------------------------------------------------------- the machinery


def fuzz(strategy: st.SearchStrategy, read: Callable[[Any], object], examples: int = EXAMPLES) -> None:
    """Call `read` with inputs of the strategy. It returns or raises `UserError`, within bounds."""
    end, round_ = time.monotonic() + BUDGET_S, 0

    while round_ == 0 or time.monotonic() < end:

        @seed(round_ + int(end) if BUDGET_S else 0)
        @settings(
            max_examples=200 if BUDGET_S else examples, deadline=None, database=None,
            phases=(Phase.generate, Phase.shrink) if BUDGET_S else (Phase.generate,),
            suppress_health_check=list(HealthCheck),
        )  # fmt: skip
        @given(strategy)
        def run(given_: Any) -> None:
            before_s, before = time.thread_time(), _resident()
            try:
                read(given_)
            except UserError as problem:
                assert problem.problem, "a refusal without words"
            assert time.thread_time() - before_s < MOST_S, "this input takes too long"
            assert _resident() - before < MOST_BYTES, "this input takes too much memory"

        run()
        round_ += 1


def _resident() -> float:
    """The most memory that this process ever held, bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


_SCALARS = st.one_of(
    st.none(), st.booleans(), st.integers(-3, 300), st.floats(),
    st.sampled_from([2**31, 2**53, 2**63, -(2**63) - 1, 10**30, 10**400, 1e308, -0.0]),
    st.text(max_size=12),
    st.sampled_from(["", "../../x", "\x00", "=1+1", "\ud800", "(a*)*b", "x" * 20_000, "NaN", "1e999", "bf16", "int8"]),
)  # fmt: skip
JUNK = st.recursive(
    _SCALARS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3),
    max_leaves=6,
) | st.just([[[[[[[[[[[[[[[[{"a": []}]]]]]]]]]]]]]]]])  # fmt: skip
_REMOVED = object()


def changed(tree: Any) -> st.SearchStrategy:
    """The JSON tree with a few of its values replaced or removed."""
    places = sorted(_places(tree), key=str)
    change = st.tuples(st.sampled_from(places), JUNK | st.just(_REMOVED))
    return st.lists(change, min_size=1, max_size=4).map(lambda changes: _apply(tree, changes))


def _places(tree: Any, here: tuple = ()) -> list[tuple]:
    children = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    found = [here] if here else []
    for key, child in children:
        found += _places(child, (*here, key))
    return found


def _apply(tree: Any, changes: list) -> Any:
    tree = copy.deepcopy(tree)
    for place, value in changes:
        parent = tree
        try:
            for key in place[:-1]:
                parent = parent[key]
            if value is _REMOVED:
                del parent[place[-1]]
            else:
                parent[place[-1]] = copy.deepcopy(value)
        except (KeyError, IndexError, TypeError):
            continue  # an earlier change took the place away
    return tree


def as_json(tree: Any) -> bytes:
    return json.dumps(tree).encode()  # lone surrogates as escapes, as a stranger's file may have them


def damaged(content: bytes) -> st.SearchStrategy:
    """The bytes, cut off, with some replaced or inserted."""
    edit = st.tuples(st.integers(0, max(len(content), 1)), st.binary(max_size=9), st.booleans())

    def apply(drawn: tuple) -> bytes:
        edits, end = drawn
        out = content
        for place, new, insert in edits:
            out = out[:place] + new + out[place if insert else place + len(new) :]
        return out[:end] if end is not None else out

    return st.tuples(st.lists(edit, max_size=4), st.none() | st.integers(0, len(content))).map(apply)


# ---------------------------------------------------------------- what people type


def test_notation():
    pieces = ["nf4", "int8", "gptq", "gguf", "torchao", "hqq", "endpoint", "@", ":", ",", "=", "+", "%", "skip", "only",
              "threshold", "dq", "compute", "bf16", "4bit", "g64", "cal", "file", "(a*)*b", "../..", "user/repo", "9" * 400,
              "\x00", "é", "​", "*", "?", "[", "nan", "-1", "1e400"]  # fmt: skip
    text = st.lists(st.sampled_from(pieces) | st.text(max_size=4), max_size=12).map("".join)

    def read(text: str) -> None:
        for parse in (resolve, parse_adapter):
            try:
                parse(text)
            except UserError:
                continue

    fuzz(text, read, examples=100)


def test_chat_templates():
    pieces = ["{{ messages[0].content }}", "{% for m in messages %}", "{% endfor %}", "{% if add_generation_prompt %}",
              "{% endif %}", "{{ raise_exception('no') }}", "{{ 'a' * 10**7 }}", "{% for i in range(10**6) %}x{% endfor %}",
              "{{ ''.__class__.__mro__ }}", "{{ strftime_now('%Y') }}", "{% set x = namespace(a=[]) %}", "{{ x.a.b.c }}",
              "{{ messages | tojson }}", "{% generation %}", "{{ cycler }}", "{{ 2**99999 }}", "{%- macro a() %}{{ a() }}",
              "{% endmacro %}{{ a() }}", "{{ lipsum(n=50) }}", "{% include 'x' %}"]  # fmt: skip
    text = st.lists(st.sampled_from(pieces) | st.text(max_size=6), max_size=6).map("".join)

    def read(text: str) -> None:
        made = SimpleNamespace(chat_template=text, special_tokens_map={}, name_or_path="x")
        chat_template.render(made, "Hello", "Be short.", ChatTemplate())

    fuzz(text, read)


# ---------------------------------------------------------------- documents and uploads


def test_documents(tmp_path):
    tree = json.loads(document.dumps(comparison()))

    def read(content: bytes) -> None:
        found = document.loads(content, max_bytes=10_000_000)
        for name in ("a.md", "a.csv", "a.html", "a.json"):
            export.render(found, name)

    fuzz(changed(tree).map(as_json) | damaged(as_json(tree)), read, examples=30)


UPLOADS = {
    ".jsonl": b'{"prompt": "a", "completion": "b"}\n{"messages": [{"role": "user", "content": "x"}]}\n{"text": "c"}\n',
    ".json": b'[{"prompt": "a", "completion": ["b"]}, "c", {"text": 1}]',
    ".csv": b'prompt,completion\na,b\n"c ""d""",e;f\n',
    ".tsv": b"text\tother\na\tb\n",
    ".parquet": b"PAR1\x15\x04\x15\x10",
    ".txt": b"One text.\n\nAnother one.\n",
    ".txt.gz": gzip.compress(b"One text.\n" * 50),
}


@pytest.mark.parametrize("ending", UPLOADS)
def test_uploads(ending, tmp_path):
    """As samples for training, calibration texts and prompt sets."""
    file = tmp_path / f"upload{ending}"
    sample = UPLOADS[ending]
    rows = [json.loads(line) for line in UPLOADS[".jsonl"].splitlines()]
    several = changed(rows).map(lambda rows: b"\n".join(as_json(r) for r in rows))
    content = damaged(sample) | (several if ending == ".jsonl" else changed(rows).map(as_json))

    def read(content: bytes) -> None:
        file.write_bytes(content)
        source = DataSource(str(file), name=file.name, uploaded=True)
        for parse in (
            lambda: data.read(source).fingerprint,
            lambda: calibration.read_file(file),
            lambda: load_prompts(file),
        ):
            try:
                parse()
            except UserError:
                continue

    fuzz(content, read, examples=8)


# ---------------------------------------------------------------- files of models and adapters


def tensors(shapes: dict[str, tuple[int, ...]]) -> tuple[dict, int]:
    """A safetensors header for F32 tensors of these shapes, and the bytes of their data."""
    header, place = {"__metadata__": {"format": "pt"}}, 0
    for name, shape in shapes.items():
        size = 4
        for n in shape:
            size *= n
        header[name] = {"dtype": "F32", "shape": list(shape), "data_offsets": [place, place + size]}
        place += size
    return header, place


def test_safetensors_headers(tmp_path):
    header, size = tensors({"a.weight": (4, 6), "b.weight": (6,), "c": (2, 2, 2)})
    file = tmp_path / "model.safetensors"
    whole = as_json(header)

    def read(drawn: tuple[bytes, int | None]) -> None:
        content, length = drawn
        file.write_bytes(
            struct.pack("<Q", len(content) if length is None else length) + content + bytes(size)
        )
        safetensors_header._read.cache_clear()
        safetensors_header.read_header(file)

    content = changed(header).map(as_json) | damaged(whole)
    fuzz(st.tuples(content, st.none() | st.integers(0, 2**64 - 1)), read, examples=60)


def test_gguf_headers(tmp_path):
    import numpy
    from gguf import GGUFWriter

    file = tmp_path / "model.gguf"
    writer = GGUFWriter(file, "llama")
    writer.add_context_length(128)
    writer.add_array("tokenizer.ggml.tokens", ["a", "b"])
    writer.add_array("numbers", [1, 2, 3])
    writer.add_tensor("blk.0.attn_q.weight", numpy.ones((32, 32), numpy.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    whole = file.read_bytes()
    head = len(whole) - 4096

    def read(content: bytes) -> None:
        file.write_bytes(content + whole[head:])
        gguf_header.read_gguf(file)

    fuzz(damaged(whole[:head]), read, examples=100)


@pytest.fixture(scope="module")
def llama(tmp_path_factory) -> Path:
    place = tmp_path_factory.mktemp("llama")
    tiny_models.save(place, "llama", chat=True)
    return place


def test_model_configs(llama, tmp_path):
    """Read, and held against the files: the model is built without memory, as before a load."""
    place = tmp_path / "model"
    shutil.copytree(llama, place)
    config = json.loads((place / "config.json").read_text())

    def read(content: bytes) -> None:
        (place / "config.json").write_bytes(content)
        checkpoint = folder.inspect(place, "user/model")
        examine._examine.cache_clear()
        examine.require_complete(checkpoint)

    fuzz(changed(config).map(as_json) | damaged(as_json(config)), read, examples=25)


def test_adapter_configs(tmp_path):
    names = [f"base_model.model.model.layers.{n}.self_attn.{m}.lora_{ab}.weight" for n in (0, 1) for m in ("q_proj", "v_proj")
             for ab in "AB"]  # fmt: skip
    header, size = tensors({n: (4, 8) if "lora_A" in n else (8, 4) for n in names})
    whole = as_json(header)
    (tmp_path / "adapter_model.safetensors").write_bytes(struct.pack("<Q", len(whole)) + whole + bytes(size))
    config = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"],
              "rank_pattern": {"q_proj": 4}, "alpha_pattern": {}, "modules_to_save": None, "use_dora": False,
              "use_rslora": False, "layers_to_transform": None, "layers_pattern": None, "bias": "none",
              "base_model_name_or_path": "user/base", "trainable_token_indices": None}  # fmt: skip

    def read(content: bytes) -> None:
        (tmp_path / "adapter_config.json").write_bytes(content)
        describe_adapter(AdapterFiles("user/adapter", tmp_path))

    fuzz(changed(config).map(as_json) | damaged(as_json(config)), read, examples=60)
