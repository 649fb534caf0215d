"""The one endpoint for programs: docs/api.md's own example, its refusals, and that there is no other."""

from __future__ import annotations

import inspect
import json
import re
import shlex
import urllib.request
from pathlib import Path

import pytest

from comparator.core.settings import Settings
from comparator.ui.admission import Admission
from comparator.ui.api import endpoint

DOCS = Path(__file__).resolve().parents[2] / "docs" / "api.md"


@pytest.fixture(scope="module")
def client(server):
    from gradio_client import Client

    return Client(server.url, verbose=False)


def test_the_example_of_the_docs_runs(server, capsys):
    code = re.search(r"```python\n(.*?)```", DOCS.read_text(encoding="utf-8"), re.DOTALL).group(1)
    assert "http://127.0.0.1:7860/" in code
    space: dict = {}
    exec(code.replace("http://127.0.0.1:7860/", server.url), space)
    answer, on_progress = space["answer"], capsys.readouterr().out
    cells = answer["comparison"]["cells"]
    assert [c["variant"] for c in cells] == ["bf16", "nf4"] and all(c["text"] for c in cells)
    assert all(c["latency"]["decode_tok_s"] > 0 and c["memory"]["resident_bytes"] > 0 for c in cells)
    assert cells[1]["memory"]["resident_bytes"] < cells[0]["memory"]["resident_bytes"]
    assert "layers" not in cells[0]
    assert answer["url"] == f"{server.url}?c={answer['id']}" and answer["url"] in on_progress


def test_what_was_asked_over_the_endpoint_opens_on_the_page(client, saved):
    answer = client.predict(
        "Say hello", ["bf16"], max_new_tokens=2, layers=True, fidelity="none", api_name="/compare"
    )
    kept = saved.load(answer["id"])
    assert kept.cells[0].text == answer["comparison"]["cells"][0]["text"] and kept.prompt.text == "Say hello"
    assert len(answer["comparison"]["cells"][0]["layers"]) == len(kept.cells[0].layers) > 14


@pytest.mark.parametrize(
    "given, said",
    [
        ({"prompt": " "}, "The prompt is empty"),
        ({"prompt": "Hi", "variants": ["nf5"]}, "Did you mean nf4"),
        ({"prompt": "Hi", "variants": []}, "No variant is selected"),
        ({"prompt": "Hi", "model": "no/../where"}, "no/../where"),
        ({"prompt": "Hi", "max_new_tokens": 10**9}, "max_new_tokens|new tokens"),
        ({"prompt": "Hi", "fidelity": "all"}, "fidelity"),
    ],
)
def test_a_refusal_says_what_is_wrong(client, given, said):
    from gradio_client.exceptions import AppError

    with pytest.raises(AppError, match=said):
        client.predict(**given, api_name="/compare")


def test_there_is_one_endpoint_and_the_docs_list_what_it_takes(client, tmp_path):
    on_progress = client.view_api(return_format="dict")
    assert list(on_progress["named_endpoints"]) == ["/compare"] and not on_progress["unnamed_endpoints"]
    names = [p["parameter_name"] for p in on_progress["named_endpoints"]["/compare"]["parameters"]]
    signature = inspect.signature(endpoint(Admission(Settings(data_dir=tmp_path))))
    assert names == [name for name in signature.parameters if name != "request"]
    table = DOCS.read_text(encoding="utf-8").split("## Parameters")[1].split("## ")[0]
    assert (
        re.findall(
            r"`(\w+)`(?=[,` ])",
            "".join(line.split("|")[1] for line in table.splitlines() if line.startswith("| `")),
        )
        == names
    )


def test_the_curl_commands_of_the_docs_answer(server):
    block = re.search(r"```\n(curl .*?)```", DOCS.read_text(encoding="utf-8"), re.DOTALL).group(1)
    commands = re.sub(r"\\\n|→.*", "", block).replace("http://127.0.0.1:7860/", server.url).splitlines()
    ask, read = [shlex.split(line) for line in commands if line.startswith("curl")]
    url = next(part for part in ask if part.startswith("http"))
    body, header = ask[ask.index("-d") + 1].encode(), dict([ask[ask.index("-H") + 1].split(": ")])
    with urllib.request.urlopen(urllib.request.Request(url, body, header), timeout=60) as answer:
        event = json.load(answer)["event_id"]
    with urllib.request.urlopen(read[-1].replace("EVENT_ID", event), timeout=300) as answer:
        events = answer.read().decode()
    assert "event: complete" in events, events[-500:]
    cells = json.loads(events.rpartition("data: ")[2])[0]["comparison"]["cells"]
    assert [c["variant"] for c in cells] == ["bf16", "nf4"] and all(c["text"] for c in cells)
