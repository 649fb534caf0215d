"""The notation: parses, prints, round-trips; what does not parse says what is wrong and what to write."""

from __future__ import annotations

import string

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from comparator.backends import methods, resolve
from comparator.backends.base import Method, Option
from comparator.core.errors import UserError
from comparator.core.variant import (
    Adapter,
    Variant,
    format_adapter,
    format_variant,
    parse_adapter,
    parse_variant,
)

# Any path or revision; surrogates cannot be typed, and the ends of a notation are stripped of white space.
PATHS = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=20).filter(
    lambda s: s == s.strip()
)
NAMES = st.text(string.ascii_lowercase + string.digits + "_-", min_size=1, max_size=8)


@st.composite
def variants(draw) -> Variant:
    source = draw(st.none() | PATHS)
    options = draw(
        st.dictionaries(NAMES, st.none() | st.lists(PATHS, min_size=1, max_size=3).map("+".join), max_size=3)
    )
    ordered = tuple(sorted(options.items(), key=lambda o: (o[1] is not None, o[0])))
    method = draw(st.text(string.ascii_lowercase + string.digits, min_size=1, max_size=6))
    return Variant(method, source, draw(st.none() | PATHS) if source else None, ordered)


@given(variants())
@example(Variant("gptq", "/a:b/c@d,e", "v:1@x", (("kernel", "torch"),)))
@example(Variant("gptq", "C:\\models\\한국어 모델", None, ()))
@example(Variant("nf4", None, None, (("dq", None), ("skip", "lm_head+q_proj"))))
def test_a_variant_round_trips(variant):
    assert parse_variant(format_variant(variant)) == variant


@given(PATHS, st.none() | PATHS, st.floats(allow_nan=False, allow_infinity=False), st.booleans())
@example("user/repo", "main", 0.1 + 0.2, True)
@example("/a*b:c@d", None, 1e-300, False)
def test_an_adapter_round_trips(source, revision, scale, merged):
    adapter = Adapter(source, revision, scale, merged)
    assert parse_adapter(format_adapter(adapter)) == adapter


def _values(option: Option):
    if option.kind == "flag":
        return st.sampled_from(["true", "false"])
    if option.kind == "number":
        low, high = option.minimum or 0, 100 if option.maximum is None else option.maximum
        return st.floats(low, high).map(lambda v: f"{v:g}") | st.integers(int(low), int(high)).map(str)
    if option.kind == "names":
        return st.lists(st.sampled_from(["lm_head", "q_proj", "mlp"]), min_size=1, unique=True).map("+".join)
    if option.choices:
        return st.sampled_from(option.choices)
    return PATHS


def _written(option: Option, value: str) -> tuple[str, str | None]:
    if option.kind == "flag":
        return (option.name, None) if value == "true" else (option.name, "false")
    name, equals, rest = option.form.format(name=option.name, value=value).partition("=")
    return name, rest if equals else None


@st.composite
def valid(draw) -> Variant:
    """A method that there is, with options that it takes."""
    _, method = draw(st.sampled_from(list(methods().values())))
    chosen = draw(st.lists(st.sampled_from(method.options), unique=True)) if method.options else []
    return Variant(method.name, None, None, tuple(_written(o, draw(_values(o))) for o in chosen))


@given(valid())
def test_every_valid_variant_has_one_canonical_form(variant):
    try:
        canonical = resolve(variant)
    except UserError as problem:  # a combination that the backend refuses, in words
        assert problem.advice
        return
    assert resolve(canonical.notation) == canonical, "what is printed has to mean the same when it is read"
    assert resolve(canonical) == canonical
    backend, _ = methods()[variant.method]
    assert backend.values(canonical) == backend.values(variant), "canonical means the same, written shorter"


@pytest.mark.parametrize(
    ("written", "canonical"),
    [
        ("bf16", "bf16"),
        (" NF4:DQ ", "nf4:dq"),
        ("nf4:compute=bf16,dq", "nf4:dq"),
        ("nf4:compute=fp16,dq", "nf4:dq,compute=fp16"),
        ("nf4:dq=false", "nf4"),
        ("int8:threshold=6.0", "int8"),
        ("int8:threshold=0.0", "int8:threshold=0"),
        ("nf4:skip=q_proj+lm_head+q_proj", "nf4:skip=lm_head+q_proj"),
        ("fp4:dtype=fp32,", "fp4:dtype=fp32"),
    ],
)
def test_the_canonical_form(written, canonical):
    assert resolve(written).notation == canonical


@pytest.mark.parametrize(
    ("written", "names"),
    [
        ("", ["empty"]),
        ("nf5", ["nf5", "Did you mean nf4", "bf16"]),
        ("4bit!", ["4bit!"]),
        (":dq", ["method"]),
        ("nf4:", ["colon"]),
        ("nf4@", ["source"]),
        ("nf4:qd", ["qd", "dq", "compute"]),
        ("nf4:dq,dq", ["twice"]),
        ("nf4:compute=", ["compute="]),
        ("nf4:compute", ["compute needs a value"]),
        ("nf4:compute=fp8", ["fp8", "fp32, fp16, bf16"]),
        ("nf4:computee=fp16", ["computee", "Did you mean compute"]),
        ("int8:threshold=-1", ["threshold", "out of range"]),
        ("int8:threshold=warm", ["number"]),
        ("int8:threshold=nan", ["threshold"]),
        ("int8:g128", ["int8", "threshold"]),
        ("bf16:dq", ["bf16 has no option", "kv=int8"]),
        ("bf16@user/repo", ["bf16", "no source"]),
    ],
)
def test_what_is_wrong_is_named_and_the_way_out_too(written, names):
    with pytest.raises(UserError) as caught:
        resolve(written)
    assert all(name in str(caught.value) for name in names), str(caught.value)
    assert caught.value.advice


@given(st.text(max_size=30))
def test_any_text_is_a_variant_or_a_problem(text):
    try:
        resolve(text)
    except UserError as problem:
        assert problem.problem


@pytest.mark.parametrize(
    "written", ["", "*2", "@rev", "pirate*", "pirate*fast", "pirate*nan", "pirate*inf", "pirate:dq"]
)
def test_a_wrong_adapter_is_refused(written):
    with pytest.raises(UserError) as caught:
        parse_adapter(written)
    assert caught.value.advice


@pytest.mark.parametrize(
    ("written", "adapter"),
    [
        ("pirate", Adapter("pirate")),
        ("pirate*0.5", Adapter("pirate", scale=0.5)),
        ("user/repo@main*2:merged", Adapter("user/repo", "main", 2.0, True)),
        ("/a%3Ab/c", Adapter("/a:b/c")),
    ],
)
def test_adapters(written, adapter):
    assert parse_adapter(written) == adapter


def test_methods_describe_themselves_in_words():
    for backend, method in methods().values():
        assert isinstance(method, Method) and method.title and method.summary.endswith("."), method.name
        assert backend.method(method.name) is method
