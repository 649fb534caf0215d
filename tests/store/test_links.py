"""Links: what is written can be read back, and whatever a stranger writes is read safely."""

from __future__ import annotations

from dataclasses import replace
from urllib.parse import urlsplit

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from comparator.backends import methods, resolve
from comparator.core.errors import UserError
from comparator.core.request import ChatTemplate, GenerationSettings, Request
from comparator.core.result import CellResult, Comparison, Environment, PromptInfo
from comparator.core.variant import Adapter, Cell, CellName
from comparator.store import links
from comparator.store.links import OpenComparison, Recipe, parse_query, parse_query_string

PAGE = "https://someone-comparator.hf.space/"


def query(url: str) -> str:
    return urlsplit(url).query


# ---------------------------------------------------------------- ids


def test_ids_are_22_safe_characters_and_never_repeat():
    ids = {links.new_id() for _ in range(2000)}
    assert len(ids) == 2000, "ids repeat: the randomness is not 16 bytes"
    for id in ids:
        assert links.check_id(id) == id
        assert len(id) == 22 and id[0].isalnum(), f"{id} would be taken for an option on a command line"


@pytest.mark.parametrize(
    "bad",
    [
        "", "short", "../../etc/passwd", "..%2F..%2Fetc%2Fpasswd", "A" * 21, "A" * 23, "A" * 21 + "B",
        "A" * 21 + "\n", "AAAAAAAAAAAAAAAAAAAA/A", "AAAAAAAAAAAAAAAAAAAA.A", "AAAAAAAAAAAAAAAAAAA\0AA", "-" + "A" * 21,
        "Ａ" * 22, "*" * 22, "A" * 10_000_000, None, 7, ["A" * 22],
    ],
)  # fmt: skip
def test_what_is_not_an_id_is_refused_and_quoted_shortly(bad):
    with pytest.raises(links.BadId) as caught:
        links.check_id(bad)
    assert len(str(caught.value)) < 400, "the whole hostile id is repeated in the message"


# ---------------------------------------------------------------- round trips

names = st.text(st.characters(codec="utf-8", exclude_characters="\0"), min_size=1, max_size=30).filter(
    lambda t: t == t.strip() and t
)
prompts = st.text(st.characters(codec="utf-8"), max_size=120)
adapters = st.builds(
    Adapter,
    source=names | st.sampled_from(["pirate", "none", "None", "user/repo", "/a folder/with: all*of+it@x"]),
    revision=st.none() | names,
    scale=st.floats(-4, 4, allow_nan=False),
    merged=st.booleans(),
)
variants = st.sampled_from(
    [
        "fp32",
        "bf16",
        "int8",
        "int8:threshold=0",
        "nf4",
        "nf4:dq,compute=fp16",
        "fp4:dtype=fp32",
        "nf4:skip=lm_head+q_proj",
    ]
).map(resolve)
cells = st.builds(Cell, variants, st.none() | adapters)
decodings = st.builds(
    GenerationSettings,
    max_new_tokens=st.integers(1, 4096),
    temperature=st.floats(0, 5),
    top_p=st.floats(0, 1),
    top_k=st.integers(0, 1000),
    repetition_penalty=st.floats(0.01, 5),
    seed=st.integers(0, 2**63),
    repeats=st.integers(1, 20),
    decode=st.sampled_from(["auto", "eager", "graph", "compiled"]),
)
values = st.none() | st.booleans() | st.integers(-(2**60), 2**60) | st.floats(-1e9, 1e9) | prompts
templates = st.builds(
    ChatTemplate,
    st.none() | st.sampled_from(["rag", "tool_use"]),
    st.dictionaries(st.sampled_from(["enable_thinking", "effort"]), values),
)
recipes = st.builds(
    Recipe,
    model=st.none() | names,
    cells=st.lists(cells, max_size=6, unique=True).map(tuple),
    prompt=prompts,
    system=st.none() | prompts,
    chat=st.none() | st.booleans(),
    template=templates,
    settings=decodings,
    reference=st.none() | cells,
    fidelity=st.sampled_from([None, "none", "prompt", "text"]),
)


@settings(max_examples=300, deadline=None)
@given(recipes)
def test_a_recipe_survives_its_link(recipe):
    try:
        url = links.recipe_url(PAGE, recipe)
    except UserError as problem:
        assert "too long" in problem.problem
        return
    assert parse_query_string(query(url)) == recipe, f"the link {url} means something else"
    assert url.isascii() and " " not in url, "the link would break when it is pasted"


@settings(max_examples=100, deadline=None)
@given(
    st.lists(variants, min_size=1, max_size=4, unique=True),
    st.lists(st.none() | adapters, max_size=3, unique=True),
)
def test_every_variant_with_every_adapter_is_written_as_two_lists(vs, attached):
    grid = tuple(Cell(v, a) for v in vs for a in (attached or [None]))
    recipe = Recipe(cells=grid)
    url = links.recipe_url(PAGE, recipe)
    assert query(url).count("v=") == len(vs), (
        f"a form's grid should not be spelled out column by column: {url}"
    )
    assert parse_query_string(query(url)) == recipe


def test_the_link_of_the_issue_reads_as_a_person_would_write_it():
    found = parse_query_string(
        "?model=smollm2-135m&v=bf16&v=nf4:dq&a=none&a=pirate*0.5&p=Hello%20there&n=32&t=0.7&r=3"
    )
    assert found == Recipe(
        "smollm2-135m",
        tuple(Cell(resolve(v), a) for v in ("bf16", "nf4:dq") for a in (None, Adapter("pirate", scale=0.5))),
        "Hello there",
        settings=GenerationSettings(max_new_tokens=32, temperature=0.7, repeats=3),
    )
    assert found.variants == ("bf16", "nf4:dq") and found.adapters == (None, "pirate*0.5")
    one = parse_query_string("v=nf4+%2B+pirate&v=bf16")
    assert [c.label for c in one.cells] == ["nf4 + pirate", "bf16"], "a column can carry its own adapter"


def test_a_request_and_what_came_of_it_give_the_same_recipe():
    request = Request(
        "smollm2-135m",
        (Cell(resolve("bf16")), Cell(resolve("nf4"), Adapter("pirate"))),
        "Hello",
        system="Be brief.",
        chat=True,
        settings=GenerationSettings(seed=7),
        reference=Cell(resolve("bf16")),
    )
    measured = Comparison(
        links.new_id(), "2026-01-01T00:00:00+00:00", PromptInfo("Hello", "Be brief.", True), request.settings,
        Environment(), "smollm2-135m", CellName("bf16"), (CellResult("bf16"), CellResult("nf4", "pirate")),
    )  # fmt: skip
    assert links.recipe_of(measured) == replace(links.recipe_of(request), fidelity=None)
    assert parse_query_string(query(links.recipe_url(PAGE, measured))) == links.recipe_of(measured)


def test_every_method_that_there_is_can_be_put_into_a_link():
    for name, (_, method) in methods().items():
        for notation in method.presets or (name,):
            recipe = Recipe(cells=(Cell(resolve(notation)),))
            assert parse_query_string(query(links.recipe_url(PAGE, recipe))) == recipe, notation


# ---------------------------------------------------------------- addresses


@pytest.mark.parametrize(
    ("base", "expected"),
    [
        ("http://127.0.0.1:7860", "http://127.0.0.1:7860/?c="),
        ("http://127.0.0.1:7860/", "http://127.0.0.1:7860/?c="),
        ("https://x.hf.space/?__sign=secret&c=old#top", "https://x.hf.space/?c="),
        ("https://example.org/tools/comparator", "https://example.org/tools/comparator?c="),
        ("", "/?c="),
    ],
)
def test_a_comparisons_link_keeps_the_page_and_drops_its_query(base, expected):
    id = links.new_id()
    assert links.comparison_url(base, id) == expected + id


@pytest.mark.parametrize(
    "base", ["javascript:alert(1)//", "data:text/html,x", "file:///etc/passwd", "http://[bad"]
)
def test_only_pages_have_links(base):
    with pytest.raises(UserError):
        links.comparison_url(base, links.new_id())


def test_an_id_with_a_path_in_it_never_becomes_a_link():
    with pytest.raises(links.BadId):
        links.comparison_url(PAGE, "../../secret")


def test_a_prompt_too_long_for_a_link_says_so_and_what_to_do():
    with pytest.raises(UserError, match="too long for a link") as caught:
        links.recipe_url(PAGE, Recipe(prompt="word " * 4000))
    assert "share the comparison" in caught.value.advice


# ---------------------------------------------------------------- strangers


def test_nothing_of_ours_is_nothing():
    assert parse_query({}) is None
    assert parse_query({"__theme": "dark", "view": "api", "utm_source": ["x", "y"]}) is None
    assert parse_query_string("") is None


def test_unknown_keys_are_passed_over():
    assert parse_query_string("__theme=dark&p=hi&P=no&zzz=%00") == Recipe(prompt="hi")


def test_an_id_outranks_a_recipe():
    id = links.new_id()
    assert parse_query({"c": id, "p": "hi", "v": ["nonsense"]}) == OpenComparison(id)
    assert parse_query({"c": [f" {id} "]}) == OpenComparison(id), "spaces come along when a link is copied"


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("n=abc", "max new tokens"), ("n=0", "max new tokens"), ("n=1.5", "max new tokens"), ("n=", "max new tokens"),
        ("n=９", "max new tokens"), ("n=1_0", "max new tokens"), ("n=" + "9" * 500, "max new tokens"),
        ("t=nan", "temperature"), ("t=inf", "temperature"), ("t=-1", "temperature"), ("t=", "temperature"),
        ("t=.", "temperature"), ("t=1e999", "temperature"), ("top_p=1.1", "top_p"), ("top_k=-1", "top_k"),
        ("rp=x", "repetition penalty"), ("seed=0x1", "seed"), ("r=-1", "repeats"), ("chat=perhaps", "chat"),
        ("decode=../../x", "decode"), ("f=all", "f"), ("v=nf5", "v is"), ("v=nf4:dqq", "v is"), ("v=", "v is"),
        ("v=nf4+%2B+", "v is"), ("v=nf4+%2B+x*y", "v is"), ("a=x*nan&v=nf4", "a is"), ("a=:merged&v=nf4", "a is"),
        ("ref=zzz", "ref is"), ("c=../../etc/passwd", "etc/passwd"), ("c=", "id"), ("t=1&t=2", "t appears 2 times"),
        ("c=a&c=b", "c appears"), ("v=nf4&" * 33, "v appears 33 times"), ("p=" + "x" * 32_001, "p has"),
        ("model=" + "x" * 2_000, "model has"),
    ],
)  # fmt: skip
def test_a_wrong_value_is_named(text, named):
    with pytest.raises(UserError) as caught:
        parse_query_string(text)
    assert named in caught.value.problem, f"{caught.value.problem} does not say that it is about {named}"
    assert caught.value.advice, "no way on"
    assert len(str(caught.value)) < 700


def test_too_much_is_refused_before_it_is_looked_at():
    for text in ("p=" + "a" * 200_000, "&".join(f"x{i}=1" for i in range(5000))):
        with pytest.raises(UserError, match="too long|too many"):
            parse_query_string(text)
    with pytest.raises(UserError, match="columns"):
        parse_query({"v": [f"int8:threshold={i}" for i in range(8)], "a": [f"user/a{i}" for i in range(8)]})
    with pytest.raises(UserError):
        parse_query({"p": [7]})


keys = st.sampled_from(sorted(links._KEYS)) | st.text(max_size=8)
junk = st.text(max_size=60) | st.sampled_from(
    [
        "<script>alert(1)</script>",
        "' OR 1=1 --",
        "../../x",
        "\0",
        "nf4:" + "dq," * 40,
        "@" * 40,
        "1e308",
        "%zz",
    ]
)


@settings(max_examples=300, deadline=None)
@given(st.dictionaries(keys, junk | st.lists(junk, max_size=4), max_size=8))
def test_whatever_comes_is_a_recipe_an_id_or_a_problem(params):
    try:
        found = parse_query(params)
    except UserError:
        return
    assert found is None or isinstance(found, Recipe | OpenComparison)
    if isinstance(found, Recipe):
        try:
            url = links.recipe_url(PAGE, found)
        except UserError:
            return  # too long to be written, or not Unicode text
        assert (parse_query_string(query(url)) or Recipe()) == found, "what was read cannot be passed on"
