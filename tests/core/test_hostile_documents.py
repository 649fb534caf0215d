"""Documents that want to do harm, through the store's own door.

Each is either refused with a clear `UserError`, or taken as it is: every string the same data as before, nothing
written but the document and its sidecar inside the data folder, memory bounded. That no browser runs what is in such
strings is the page's and the report's affair, tested with them.
"""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from comparator.core import document
from comparator.core.errors import UserError
from comparator.core.settings import Settings
from comparator.store import links, open_store
from tests.sample import comparison

ROOT = Path(__file__).resolve().parents[2]
SAMPLE = json.loads(document.dumps(comparison()))

HOSTILE_TEXTS = [
    "<script>document.title='owned'</script>",
    "<img src=x onerror=alert(1)>",
    "</textarea></script><svg/onload=alert(1)>",
    "javascript:alert(1)//",
    "{{constructor.constructor('alert(1)')()}}${alert(1)}<%= 7*7 %>",
    "'; DROP TABLE comparisons; --",
    "=HYPERLINK(\"http://evil.example\",\"x\")",
    "../../../../etc/passwd",
    "..\\..\\windows\\system32",
    "/etc/passwd\0.json",
    "[x](javascript:alert(1)) ![](http://evil.example/track.png)",
    "\u202egnp.exe",
    "\u0000\u0001\u001b[2J\u001b]0;owned\u0007",
    "𝕏" * 2000,
    "%s%n{0.__class__}",
]  # fmt: skip


def places(value, here=()) -> list[tuple]:
    """The path of every value in a JSON tree."""
    found = [here] if here else []
    children = (
        value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    )
    for key, child in children:
        found += places(child, (*here, key))
    return found


def at(tree, path):
    for part in path:
        tree = tree[part]
    return tree


def changed(path: tuple, value) -> dict:
    tree = copy.deepcopy(SAMPLE)
    at(tree, path[:-1])[path[-1]] = value
    return tree


PLACES = places(SAMPLE)
# One place of each kind is enough: cells.2.layers.0.name stands for all layers' names.
STRINGS = sorted(
    {
        tuple("*" if isinstance(p, int) else p for p in path): path
        for path in reversed(PLACES)
        if isinstance(at(SAMPLE, path), str)
    }.values(),
    key=str,
)


def imported(store, data: bytes) -> str:
    """Import a document that was sent as a file; returns its id."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "sent.json")
        path.write_bytes(data)
        return store.import_file(path, "visitor")


class TaskContext:
    """A store in a folder of its own; `try_it(data)` says what became of a document."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.settings = Settings(data_dir=folder / "data", public=True, max_upload="4MB")
        self.store = open_store(self.settings)
        self.before = self.outside()
        self.taken = self.refused = 0

    def outside(self) -> list[str]:
        return sorted(p.name for p in self.folder.iterdir())

    def try_it(self, data: bytes) -> str:
        known = set(os.listdir(self.settings.data_dir / "comparisons"))
        try:
            id = imported(self.store, data)
        except UserError as problem:
            self.refused += 1
            assert problem.problem and problem.advice, f"refused without a reason or a way on: {data[:200]!r}"
            assert len(str(problem)) < 1000, "the refusal repeats the document"
            assert set(os.listdir(self.settings.data_dir / "comparisons")) == known, (
                "a refused document left a file"
            )
            return "refused"
        self.taken += 1
        new = set(os.listdir(self.settings.data_dir / "comparisons")) - known
        assert new == {f"{id}.json", f"{id}.meta.json"}, f"a document wrote {new}"
        assert self.outside() == self.before, "a document wrote outside of the data folder"
        links.check_id(id)
        raw = json.loads(data)
        loaded = self.store.load(id)
        assert loaded.id == id
        same(raw | {"id": id}, loaded.to_dict())
        self.store._recent.clear()
        same(raw | {"id": id}, self.store.load(id).to_dict())
        entry = self.store.search(id, "visitor")[0]
        assert entry.imported and raw["prompt"]["text"].startswith(entry.prompt), (
            "the history shows another text"
        )
        assert self.store.search(id, "somebody else") == []
        return "taken"


def same(raw, loaded, path=()) -> None:
    """Everything that the JSON says and a document can hold is in what was loaded, unchanged."""
    if isinstance(raw, dict):
        assert isinstance(loaded, dict), path
        for key in raw:
            if key in loaded:
                same(raw[key], loaded[key], (*path, key))
    elif isinstance(raw, list):
        assert isinstance(loaded, list | tuple) and len(raw) == len(loaded), path
        for index, (left, right) in enumerate(zip(raw, loaded, strict=True)):
            same(left, right, (*path, index))
    else:
        if isinstance(loaded, float) and isinstance(raw, int):
            raw = float(raw)  # a field of seconds takes 1 for 1.0; beyond 2**53 an integer is rounded
        assert raw == loaded, f"{path}: {raw!r} became {loaded!r}"
        if isinstance(raw, str | bool):
            assert type(raw) is type(loaded), f"{path} changed its type"


@pytest.fixture(scope="module")
def door(tmp_path_factory) -> TaskContext:
    return TaskContext(tmp_path_factory.mktemp("hostile"))


def test_the_sample_itself_is_taken(door):
    """Guards the others: with a door that refuses everything they would all pass."""
    assert door.try_it(json.dumps(SAMPLE).encode()) == "taken"


@pytest.mark.parametrize("path", STRINGS, ids=lambda p: ".".join(map(str, p)))
def test_a_script_in_any_string_is_data_or_refused(door, path):
    outcomes = {text: door.try_it(json.dumps(changed(path, text)).encode()) for text in HOSTILE_TEXTS}
    free = path[-1] not in ("id", "created_at", "status", "finish_reason")
    expected = {"taken"} if free else {"refused"}
    assert set(outcomes.values()) == expected, f"{path}: {outcomes}"


hostile_values = st.one_of(
    st.sampled_from(HOSTILE_TEXTS),
    st.sampled_from(
        [None, True, -1, 0, 2**63, -(2**63) - 1, 10**400, 1e308, 5e-324, float("nan"), float("inf"), -0.0]
    ),
    st.sampled_from(
        [[], {}, [[]] * 3, {"": {}}, [None], {"__class__": "os.system"}, {"$ref": "file:///etc/passwd"}]
    ),
    st.integers(1, 200).map(lambda depth: json.loads("[" * depth + "]" * depth)),
    st.integers(1, 60).map(lambda depth: json.loads('{"a":' * depth + "1" + "}" * depth)),
    st.integers(1_000, 100_000).map(lambda size: "x" * size),
    st.integers(1_000, 20_000).map(lambda size: [0] * size),
    st.text(max_size=50),
    st.recursive(
        st.none() | st.integers() | st.text(max_size=5), lambda s: st.lists(s, max_size=4), max_leaves=12
    ),
)
schemas = st.sampled_from([99, 0, -1, 2, 1.0, 1.5, "1", None, True, [], 10**30, float("nan")])


@st.composite
def hostile_documents(draw) -> bytes:
    """A valid document, spoilt: values, missing and added keys, its schema, and then perhaps its bytes."""
    tree = copy.deepcopy(SAMPLE)
    for _ in range(draw(st.integers(1, 4))):
        kind = draw(st.sampled_from(["value", "value", "value", "remove", "add", "schema", "many cells"]))
        path = draw(st.sampled_from(PLACES))
        try:
            parent = at(tree, path[:-1])
            if kind == "value":
                parent[path[-1]] = draw(hostile_values)
            elif kind == "remove":
                del parent[path[-1]]
            elif kind == "add" and isinstance(parent, dict):
                parent[
                    draw(st.sampled_from(["__proto__", "constructor", "owner", "../x", "name", "deleted_at"]))
                ] = draw(hostile_values)
            elif kind == "schema":
                tree["schema"] = draw(schemas)
            else:
                tree["cells"] = tree["cells"] * draw(st.integers(2, 20))
        except (KeyError, IndexError, TypeError):
            continue  # an earlier change took that place away
    text = json.dumps(tree, ensure_ascii=draw(st.booleans()), allow_nan=True)
    data = text.encode("utf-8", "surrogatepass")
    spoil = draw(st.sampled_from(["no", "no", "no", "cut", "byte", "insert", "bom", "twice", "utf16"]))
    where = draw(st.integers(0, len(data) - 1))
    if spoil == "cut":
        data = data[:where]
    elif spoil == "byte":
        data = data[:where] + bytes([draw(st.integers(0, 255))]) + data[where + 1 :]
    elif spoil == "insert":
        data = data[:where] + draw(st.binary(max_size=8)) + data[where:]
    elif spoil == "bom":
        data = b"\xef\xbb\xbf" + data
    elif spoil == "twice":
        data = data + data
    elif spoil == "utf16":
        data = text.encode("utf-16", "surrogatepass")
    return data


@settings(max_examples=200, deadline=None, suppress_health_check=list(HealthCheck))
@given(hostile_documents())
def test_generated_hostile_documents_are_refused_or_are_data(door, data):
    door.try_it(data)


def test_both_outcomes_were_seen(door):
    """Runs after the generated ones: a generator whose documents all break at once tests nothing."""
    if door.taken + door.refused < 400:
        pytest.skip("only with the whole file")
    assert door.taken > 100 and door.refused > 100, f"{door.taken} taken, {door.refused} refused"


@pytest.mark.parametrize("schema", [99, 0, -1, "1", None, 10**30, 1.5])
def test_another_schema_is_refused_by_its_number(door, schema):
    assert door.try_it(json.dumps(SAMPLE | {"schema": schema}).encode()) == "refused"


def test_what_a_document_says_of_owner_name_and_deletion_is_not_believed(door):
    data = json.dumps(
        SAMPLE | {"owner": "0" * 32, "name": "Admin", "deleted_at": "2020", "imported": False}
    ).encode()
    id = imported(door.store, data)
    entry = door.store.entry(id)
    assert entry.owner != "0" * 32 and entry.name == "" and entry.deleted_at is None and entry.imported


# Each is made and tried in a process that may not have more than so much memory.
GIANTS = {
    "100 MB of one string": 'b\'{"schema":1,"model":"\' + b"x" * 100_000_000 + b\'"}\'',
    "100 MB of lists": 'b"[" * 50_000_000 + b"]" * 50_000_000',
    "100 MB of numbers": 'b\'{"schema":1,"cells":[\' + b"1," * 50_000_000 + b"1]}"',
    "32 MB of empty lists": 'b\'{"schema":1,"cells":[\' + b"[]," * 10_600_000 + b"[]]}"',
    "32 MB of empty objects in the right place": 'VALID.replace(b\'"cells":[\', b\'"cells":[\' + b"{}," * 10_000_000)',
    "32 MB of keys": 'b"{" + b",".join(b\'"%d":0\' % n for n in range(2_400_000)) + b"}"',
    "32 MB of one key again and again": 'b"{" + b\'"a":1,\' * 5_000_000 + b\'"a":1}\'',
    "32 MB of deep objects": "b'{\"a\":' * 6_000_000",
    "32 MB of backslashes": "b'\"' + b\"\\\\\\\\\" * 15_000_000 + b'\"'",
    "one number of 32 MB": 'b\'{"schema":1,"x":\' + b"9" * 31_000_000 + b"}"',
    "12 MB of valid layers": "VALID.replace(b'\"layers\":[', b'\"layers\":[' + LAYER * (12_000_000 // len(LAYER)), 1)",
}
# Imports once, then tries each giant that is asked for in a process forked for it.
TRY = """
import json, os, pathlib, resource, sys, tempfile, time
from comparator import document
from comparator.core.settings import Settings
from comparator.store import open_store
from comparator.types import UserError
from tests.sample import comparison
VALID = document.dumps(comparison()).encode()
LAYER = json.dumps(json.loads(VALID)["cells"][1]["layers"][1], separators=(",", ":")).encode() + b","

def tried(giant):
    store = open_store(Settings(data_dir=tempfile.mkdtemp(), public=True))
    sent = pathlib.Path(tempfile.mkdtemp(), "sent.json")
    sent.write_bytes(VALID)
    store.import_file(sent, "me")
    data = eval(giant)
    sent.write_bytes(data)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    start = time.perf_counter()
    try:
        store.import_file(sent, "me")
        outcome = "taken"
    except UserError as problem:
        outcome = str(problem)
    return {"outcome": outcome, "s": time.perf_counter() - start, "size": len(data),
            "kb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before}

for line in sys.stdin:
    if os.fork() == 0:
        print(json.dumps(tried(line)), flush=True)
        os._exit(0)
    if ended := os.waitstatus_to_exitcode(os.wait()[1]):
        print(json.dumps({"outcome": f"ended with {ended}", "s": 0, "size": 0, "kb": 10**9}), flush=True)
"""


@pytest.fixture(scope="module")
def judge(tmp_path_factory):
    """A process that tries giants: an expression in, a line of JSON out."""
    env = {**os.environ, "TMPDIR": str(tmp_path_factory.mktemp("giants")), "COMPARATOR_MAX_UPLOAD": "32MB"}
    with subprocess.Popen(
        [sys.executable, "-c", TRY],
        cwd=ROOT,
        env=env,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        yield process


@pytest.mark.parametrize("what", GIANTS)
def test_a_giant_is_refused_within_bounded_memory_and_time(what, judge):
    print(GIANTS[what], file=judge.stdin, flush=True)
    found = json.loads(judge.stdout.readline())
    assert found["outcome"] == "taken" or len(found["outcome"]) < 1000
    assert (found["outcome"] == "taken") == (what == "12 MB of valid layers"), found
    most_mb = 600 if found["outcome"] == "taken" else 400
    assert found["kb"] / 1000 < most_mb, (
        f"{what}: {found['kb'] / 1000:.0f} MB for {found['size'] / 1e6:.0f} MB"
    )
    assert found["s"] < 60, f"{what}: {found['s']:.0f} s"
