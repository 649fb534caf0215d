"""The code of a column is plain transformers code that gives the same tokens, and nothing can be smuggled into it."""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import sample
import tiny_models

from comparator.adapters import builtin_path
from comparator.core.errors import UserError
from comparator.core.request import BUILTIN_MODEL, GenerationSettings
from comparator.core.result import AdapterInfo, Environment, ModelInfo, PromptInfo
from comparator.reporting.snippet import snippet

ROOT = Path(__file__).resolve().parents[2]
FP16_COMPUTE = "nf4:dq,compute=fp16"
COLUMNS = ["built-in nf4", "bf16", "int8", "nf4", "nf4 with adapter"]


def called(code: str) -> set[str]:
    """The names of the functions and methods that the code calls."""
    calls = [node.func for node in ast.walk(ast.parse(code)) if isinstance(node, ast.Call)]
    return {f.attr if isinstance(f, ast.Attribute) else ast.unparse(f) for f in calls}


def compared(model: str, columns: list[str]):
    """A comparison of the columns, each of which succeeded."""
    from comparator import api

    # A year in the prompt: how a tokenizer cuts digits is what a conversion gets wrong first.
    request = api.request(
        "What happened in Paris in 1789?", model=model, system="Be brief.", max_new_tokens=12, fidelity="none"
    )
    comparison = api.run(replace(request, cells=tuple(map(api.cell, columns))))
    for cell in comparison.cells:
        assert cell.status == "ok", cell.error
    return comparison


@pytest.fixture(scope="module")
def comparisons(builtin, two_layers, tmp_path_factory):
    """The built-in model, whose code converts its GGUF file, and two layers of it in a folder in every form."""
    pirate = tiny_models.cut_adapter(builtin_path("pirate"), tmp_path_factory.mktemp("adapters") / "pirate")
    columns = ["bf16", "int8", FP16_COMPUTE, f"{FP16_COMPUTE} + {pirate}*0.5"]
    return [compared(BUILTIN_MODEL, [FP16_COMPUTE]), compared(str(two_layers), columns)]


@pytest.fixture(scope="module")
def by_transformers(comparisons, tmp_path_factory) -> list[list[int]]:
    """What the code of each column gives, run in one process that knows nothing of this one."""
    folder = tmp_path_factory.mktemp("snippets")
    cells = [(cell, comparison) for comparison in comparisons for cell in comparison.cells]
    for number, (cell, comparison) in enumerate(cells):
        (folder / f"{number}.py").write_text(snippet(cell, comparison), encoding="utf-8")
    code = (
        "import json, runpy\n"
        f"found = [runpy.run_path(f'{{n}}.py')['new_tokens'] for n in range({len(cells)})]\n"
        "print(json.dumps(found))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | {"PYTHONPATH": str(ROOT), "TRANSFORMERS_VERBOSITY": "error"},
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.strip().splitlines()[-1])


@pytest.mark.parametrize("number", range(len(COLUMNS)), ids=COLUMNS)
def test_the_snippet_gives_the_same_tokens(number, comparisons, by_transformers):
    cell = [cell for comparison in comparisons for cell in comparison.cells][number]
    assert len(cell.token_ids) == 12
    assert by_transformers[number] == list(cell.token_ids), f"{cell.label}: transformers gives other tokens"


def test_packages_are_pinned_as_they_were():
    code = snippet(sample.NF4, sample.comparison())
    assert '# pip install "torch==2.13.0" "transformers==5.23.0" accelerate "bitsandbytes==0.50.2"' in code
    assert '"peft==0.21.2"' in snippet(sample.ADAPTED, sample.comparison())


def test_the_settings_arrive():
    asked = GenerationSettings(max_new_tokens=7, repetition_penalty=1.2)
    code = snippet(sample.NF4, sample.comparison(settings=asked))
    assert "max_new_tokens=7" in code and "do_sample=False" in code and "repetition_penalty=1.2" in code
    sampled = GenerationSettings(temperature=0.7, top_p=0.9, top_k=40, seed=3)
    code = snippet(sample.NF4, sample.comparison(settings=sampled))
    for part in (
        "do_sample=True",
        "temperature=0.7",
        "top_p=0.9",
        "top_k=40",
        "torch.manual_seed(3)",
        "its own noise",
    ):
        assert part in code


def test_raw_text_has_no_template():
    code = snippet(sample.NF4, sample.comparison(prompt=PromptInfo("Once upon", None, False, 2)))
    assert "apply_chat_template" not in code and "text = 'Once upon'" in code
    code = snippet(sample.NF4, sample.comparison(prompt=PromptInfo("Once", "Be brief.", False, 2)))
    assert r"text = 'Be brief.\n\nOnce'" in code, "the way comparator.decoding.text.encode joins them"


def test_a_hub_repo_is_pinned_to_its_commit():
    model = ModelInfo("user/name@main", "0123abcd", "LlamaForCausalLM", 1)
    code = snippet(replace(sample.REFERENCE, model=model), sample.comparison())
    assert "MODEL = 'user/name'" in code and code.count("revision='0123abcd'") == 2
    assert "comparator" not in code.lower().replace("quant comparator", ""), (
        "plain transformers is enough here"
    )


def test_a_folder_stays_as_it_was_named():
    model = ModelInfo("/models/a@b", None, "LlamaForCausalLM", 1)
    code = snippet(replace(sample.REFERENCE, model=model), sample.comparison())
    assert "MODEL = '/models/a@b'" in code and "revision" not in code


def test_several_devices_and_cuda():
    rows = tuple(replace(row, device=f"cuda:{i % 2}") for i, row in enumerate(sample.REFERENCE.layers))
    assert 'device_map="auto"' in snippet(replace(sample.REFERENCE, layers=rows), sample.comparison())
    rows = tuple(replace(row, device="cuda:1") for row in sample.REFERENCE.layers)
    assert "device_map={'': 'cuda:1'}" in snippet(replace(sample.REFERENCE, layers=rows), sample.comparison())


def test_a_stopped_column_says_so():
    assert "was stopped after 5 tokens" in snippet(
        replace(sample.NF4, finish_reason="stopped"), sample.comparison()
    )


ATTACK = "x'\n\"\"\"\nimport os; os.system('echo gotcha')\n#\\"


def test_nothing_of_a_strangers_document_becomes_code():
    model = ModelInfo(ATTACK, ATTACK, ATTACK, 1)
    rows = tuple(replace(r, device=ATTACK, name=ATTACK, tied_to=ATTACK) for r in sample.NF4.layers)
    cell = replace(sample.NF4, model=model, layers=rows, text=ATTACK, kernel=ATTACK)
    packages = {"torch": ATTACK, "transformers": f"5.23.0\n{ATTACK}", ATTACK: ATTACK}
    hostile = sample.comparison(
        cells=(cell,),
        prompt=PromptInfo(ATTACK, ATTACK, True, 3),
        environment=Environment(packages=packages),
        model=ATTACK,
    )
    code = snippet(cell, hostile)
    assert called(code) <= called(snippet(sample.NF4, sample.comparison()))
    lines = [node for node in ast.walk(ast.parse(code)) if isinstance(node, (ast.Import, ast.ImportFrom))]
    assert not any("os" in ast.unparse(line).split() for line in lines)


@pytest.mark.parametrize("variant", [ATTACK, "nf9", "nf4:quick", "nf4\nimport os"])
def test_an_unknown_variant_is_a_problem(variant):
    with pytest.raises(UserError):
        snippet(replace(sample.NF4, variant=variant), sample.comparison())


def test_an_adapter_is_loaded_scaled_and_merged():
    code = snippet(replace(sample.ADAPTED, adapter="user/repo@v1*0.5:merged"), sample.comparison())
    ast.parse(code)
    assert "PeftModel.from_pretrained(model, 'user/repo', revision='v1')" in code
    assert "scale_layer(0.5)" in code and "merge_and_unload(safe_merge=True)" in code


@pytest.mark.parametrize("targets", [("lm_head",), ("embed_tokens", "q_proj"), ("q_proj",)])
def test_a_merge_into_a_head_first_unties_it(targets):
    cell = replace(
        sample.ADAPTED, adapter="user/repo:merged", adapter_info=AdapterInfo("user/repo", targets=targets)
    )
    code = snippet(cell, sample.comparison())
    ast.parse(code)
    untied = "head.weight = torch.nn.Parameter(" in code
    assert untied == (targets != ("q_proj",)), "the copied code merges into the embedding as well"
    assert not untied or code.index("head.weight") < code.index("PeftModel.from_pretrained")
