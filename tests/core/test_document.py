"""The document: what is written comes back equal, and nothing that is not a document comes in."""

from __future__ import annotations

import json
import math
import string
import time
from dataclasses import fields, replace
from typing import Any

import pytest
import sample
from hypothesis import HealthCheck, given, infer, settings
from hypothesis import strategies as st

from comparator.core import document
from comparator.core.errors import UserError
from comparator.core.request import GenerationSettings
from comparator.core.result import (
    SCHEMA,
    CellResult,
    Comparison,
    Environment,
    Fidelity,
    Latency,
    LayerRow,
    Memory,
    PromptFidelity,
    PromptInfo,
)
from comparator.core.variant import CellName

TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=40)
NUMBER = st.floats(allow_nan=False, allow_infinity=False) | st.integers(-(2**53), 2**53).map(float)


def raw(**changes: Any) -> dict[str, Any]:
    """The sample as plain JSON data, with top-level keys replaced."""
    return json.loads(document.dumps(sample.comparison())) | changes


def test_what_is_written_comes_back_equal():
    comparison = sample.comparison()
    assert document.loads(document.dumps(comparison)) == comparison, "a field is lost or changes its type"
    assert document.loads(document.dumps(comparison, indent=2).encode()) == comparison
    assert document.loads(b"\xef\xbb\xbf" + document.dumps(comparison).encode()) == comparison, (
        "a BOM is common"
    )


# Strategies are made from the dataclasses' own types, so a field that is added is tested from its first day.
st.register_type_strategy(float, NUMBER)
st.register_type_strategy(int, st.integers(-(2**63) + 1, 2**63 - 1))
st.register_type_strategy(str, TEXT)
COMPARISONS = st.builds(
    Comparison,
    id=st.from_regex(r"[A-Za-z0-9_-]{22}", fullmatch=True),
    created_at=st.datetimes().map(lambda d: d.isoformat()),
    prompt=st.from_type(PromptInfo),
    settings=st.from_type(GenerationSettings),
    environment=st.from_type(Environment),
    reference=st.none() | st.from_type(CellName),
    cells=st.lists(
        st.builds(
            CellResult,
            latency=st.from_type(Latency),
            memory=st.from_type(Memory),
            **{
                f.name: infer
                for f in fields(CellResult)
                if f.name not in ("latency", "memory", "layers", "fidelity")
            },
            layers=st.lists(st.from_type(LayerRow), max_size=1).map(tuple),
            fidelity=st.none()
            | st.builds(
                Fidelity,
                prompt=st.none() | st.from_type(PromptFidelity),
                text=st.none()
                | st.dictionaries(TEXT, st.none() | NUMBER | TEXT | st.lists(NUMBER, max_size=2)),
            ),
        ),
        max_size=2,
    ).map(tuple),
    schema=st.just(SCHEMA),
)


@settings(
    max_examples=100, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large]
)
@given(COMPARISONS)
def test_any_comparison_round_trips(comparison):
    assert document.loads(document.dumps(comparison)) == comparison, "a field is lost or changes its type"


def test_unknown_keys_are_passed_over():
    changed = raw(added_later={"deep": [1, 2, {"x": None}]})
    changed["cells"][1]["memory"]["also_new_bytes"] = 7
    assert document.loads(json.dumps(changed)) == sample.comparison(), "additions do not raise the schema"


@pytest.mark.parametrize("number", [math.nan, math.inf, -math.inf])
def test_a_figure_that_is_no_number_is_not_written(number):
    cell = replace(sample.NF4, latency=replace(sample.NF4.latency, decode_tok_s=number))
    with pytest.raises(UserError, match="cells.0.latency.decode_tok_s is"):
        document.dumps(sample.comparison(cells=(cell,)))


@pytest.mark.parametrize("number", ["NaN", "Infinity", "-Infinity", "1e999", "-1e999", "9" * 400])
@pytest.mark.parametrize("place", ['"ttft_s":0.3', '"mean":0.321', '"seed":0', '"bytes":442368'])
def test_a_number_out_of_range_is_refused(number, place):
    text = document.dumps(sample.comparison())
    assert place in text, "the sample changed; choose another place"
    with pytest.raises(UserError):
        document.loads(text.replace(place, f"{place.split(':')[0]}:{number}"))


@pytest.mark.parametrize(
    ("schema", "message"),
    [
        (99, "Schema 99 is newer than this installation reads"),
        (0, "no schema 0"),
        ("1", "schema"),
        (True, "schema"),
    ],
)
def test_the_schema_is_checked_before_the_rest(schema, message):
    with pytest.raises(UserError, match=message):
        document.loads(json.dumps({"schema": schema, "cells": "what a newer schema may hold"}))


def test_an_unknown_shape_of_a_newer_schema_asks_to_update():
    with pytest.raises(UserError) as caught:
        document.loads('{"schema": 3}')
    assert "Update" in caught.value.advice


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "not JSON"),
        ("hello", "not JSON"),
        ("{", "not JSON"),
        ("[]", "not a comparison document"),
        ("null", "not a comparison document"),
        ("3", "not a comparison document"),
        ("{}", "schema is missing"),
        ('{"schema": 1}', "is missing"),
        (b"\xff\xfe\x00", "not JSON"),
        (b"PK\x03\x04 a zip", "not JSON"),
    ],
)
def test_what_is_no_document_says_so(text, message):
    with pytest.raises(UserError, match=message) as caught:
        document.loads(text)
    assert caught.value.advice, "a person has to know what to do next"


@pytest.mark.parametrize(
    ("path", "value", "place"),
    [
        (("cells", 0, "status"), "great", "cells.0.status"),
        (("cells", 0, "latency", "ttft_s"), "0.2", "cells.0.latency.ttft_s"),
        (("cells", 0, "latency", "ttft_s"), True, "cells.0.latency.ttft_s"),
        (("cells", 1, "layers", 1, "shape"), "1536", "cells.1.layers.1.shape"),
        (("cells", 1, "layers", 1, "parameters"), 1.5, "cells.1.layers.1.parameters"),
        (("cells",), {"0": {}}, "cells"),
        (("prompt", "text"), None, "prompt.text"),
        (("environment", "packages"), {"torch": 2}, "environment.packages.torch"),
        (("created_at",), "yesterday", "yesterday"),
        (("id",), "../../etc/passwd", "id"),
        (("id",), "", "id"),
    ],
)
def test_a_wrong_type_is_refused_by_name(path, value, place):
    changed = raw()
    target = changed
    for part in path[:-1]:
        target = target[part]
    target[path[-1]] = value
    with pytest.raises(UserError) as caught:
        document.loads(json.dumps(changed))
    assert place in str(caught.value)
    assert len(str(caught.value)) < 500, "a message that quotes the file could be as long as the file"


def test_lone_surrogates_never_reach_a_file():
    written = document.dumps(sample.comparison(model="bad \udcff byte"))
    written.encode("utf-8")
    assert document.loads(written).model == "bad ? byte"
    with pytest.raises(UserError):
        document.loads(document.dumps(sample.comparison()).replace("Be brief.", "\\ud800"))


def test_size_is_checked_before_anything_else(settings_env):
    text = document.dumps(sample.comparison())
    with pytest.raises(UserError, match="MB"):
        document.loads(text, max_bytes=len(text) - 1)
    settings_env(max_upload="1kB")
    with pytest.raises(UserError, match="MAX_UPLOAD"):
        document.loads(text)
    settings_env(max_upload=None)
    assert document.loads(text)


@pytest.mark.parametrize(
    "hostile",
    [
        "[" * 2_000_000,
        '{"a":' * 400_000,
        "[" * 1000 + "]" * 1000,
        '{"schema":1,"x":' + "[" * 60 + "]" * 60 + "}",
        "[" + "[]," * 5_000_000 + "[]]",
        "[" + "0," * 5_000_000 + "0]",
        '"' + '\\"' * 8_000_000,
        '\\"' * 8_000_000,
        '"' * 8_000_001,
        "9" * 8_000_000,
        '{"schema":' + "9" * 5000 + "}",
    ],
    ids=lambda text: f"{text[:8]}…{len(text)}",
)
def test_hostile_shapes_are_refused_quickly(hostile):
    start = time.process_time()
    with pytest.raises(UserError):
        document.loads(hostile)
    assert time.process_time() - start < 5, "the check before parsing has become quadratic"


def test_brackets_inside_strings_do_not_count_as_nesting():
    comparison = sample.comparison(model="[" * 5000 + '\\"{' + "," * 5000)
    assert document.loads(document.dumps(comparison)) == comparison


JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | TEXT | st.sampled_from(["<script>", "=1+1", "'; DROP TABLE"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(string.ascii_letters, max_size=6), inner, max_size=3),
    max_leaves=8,
)  # fmt: skip


def _places(value: Any, path: tuple = ()) -> list[tuple]:
    here = [path] if path else []
    children = (
        value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    )
    return here + [p for key, child in children for p in _places(child, (*path, key))]


PLACES = _places(raw())


@settings(max_examples=250, deadline=None)
@given(st.sampled_from(PLACES), JSON_VALUES, st.booleans())
def test_a_document_with_anything_anywhere_is_read_or_refused(path, value, remove):
    """Never another exception, and whatever is let in can be saved and read again."""
    changed = raw()
    target = changed
    for part in path[:-1]:
        target = target[part]
    if remove:
        del target[path[-1]]
    else:
        target[path[-1]] = value
    try:
        comparison = document.loads(json.dumps(changed))
    except UserError as problem:
        assert problem.advice and len(str(problem)) < 500
    else:
        assert isinstance(comparison, Comparison)
        assert document.loads(document.dumps(comparison)) == comparison


def test_read_says_what_is_wrong_with_the_file(tmp_path):
    path = tmp_path / "result.json"
    with pytest.raises(UserError, match="no file"):
        document.read(path)
    with pytest.raises(UserError, match="folder"):
        document.read(tmp_path)
    path.write_text(document.dumps(sample.comparison()))
    assert document.read(path) == sample.comparison()
    with pytest.raises(UserError, match="MB"):
        document.read(path, max_bytes=100)
