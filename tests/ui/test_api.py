"""The one endpoint for programs: docs/api.md's own example, its refusals, and that there is no other."""

from __future__ import annotations

import inspect
import re
from pathlib import Path

import pytest

from comparator.settings import Settings
from comparator.ui.api import endpoint
from comparator.ui.desk import Desk

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
    answer, told = space["answer"], capsys.readouterr().out
    cells = answer["comparison"]["cells"]
    assert [c["variant"] for c in cells] == ["bf16", "nf4"] and all(c["text"] for c in cells)
    assert all(c["latency"]["decode_tok_s"] > 0 and c["memory"]["resident_bytes"] > 0 for c in cells)
    assert cells[1]["memory"]["resident_bytes"] < cells[0]["memory"]["resident_bytes"]
    assert "layers" not in cells[0]
    assert answer["url"] == f"{server.url}?c={answer['id']}" and answer["url"] in told


def test_what_was_asked_over_the_endpoint_opens_on_the_page(client, saved):
    answer = client.predict(
        "Say hello", ["bf16"], max_new_tokens=2, layers=True, fidelity="none", api_name="/compare"
    )
    kept = saved.load(answer["id"])
    assert kept.cells[0].text == answer["comparison"]["cells"][0]["text"] and kept.prompt.text == "Say hello"
    assert len(answer["comparison"]["cells"][0]["layers"]) == len(kept.cells[0].layers) > 200


@pytest.mark.parametrize(
    "given, said",
    [
        ({"prompt": " "}, "The prompt is empty"),
        ({"prompt": "Hi", "variants": ["nf5"]}, "Did you mean nf4"),
        ({"prompt": "Hi", "variants": []}, "No variant is chosen"),
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
    told = client.view_api(return_format="dict")
    assert list(told["named_endpoints"]) == ["/compare"] and not told["unnamed_endpoints"]
    names = [p["parameter_name"] for p in told["named_endpoints"]["/compare"]["parameters"]]
    signature = inspect.signature(endpoint(Desk(Settings(data_dir=tmp_path))))
    assert names == [name for name in signature.parameters if name != "request"]
    table = DOCS.read_text(encoding="utf-8").split("## What it takes")[1].split("## ")[0]
    assert (
        re.findall(
            r"`(\w+)`(?=[,` ])",
            "".join(line.split("|")[1] for line in table.splitlines() if line.startswith("| `")),
        )
        == names
    )
