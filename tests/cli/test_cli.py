"""The command line, as a person runs it: without gradio, on the real built-in model; in a process of its own where
output, exit code or Ctrl-C depend on that."""

from __future__ import annotations

import csv
import json
import logging
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import sample
import tiny_models
from typer.testing import CliRunner

from comparator.backends import methods
from comparator.cli import app
from comparator.core import document
from comparator.core.errors import UserError
from comparator.reporting import export

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def without_gradio(tmp_path_factory) -> dict[str, str]:
    """An environment in which importing gradio fails."""
    folder = tmp_path_factory.mktemp("blocked")
    (folder / "gradio").mkdir()
    (folder / "gradio" / "__init__.py").write_text("raise ImportError('gradio is blocked in this test')\n")
    return os.environ | {
        "PYTHONPATH": os.pathsep.join([str(folder), str(ROOT)]),
        "NO_COLOR": "1",
        "COLUMNS": "120",
    }


def comparator(
    *arguments: str, env: dict[str, str], cwd: Path, stdin: str | bytes | None = ""
) -> subprocess.CompletedProcess:
    given = stdin.encode() if isinstance(stdin, str) else stdin
    done = subprocess.run(
        [sys.executable, "-m", "comparator", *arguments],
        env=env,
        cwd=cwd,
        input=given,
        capture_output=True,
        timeout=600,
    )
    return subprocess.CompletedProcess(done.args, done.returncode, done.stdout.decode(), done.stderr.decode())


@pytest.fixture(scope="module")
def ran(builtin, without_gradio, tmp_path_factory):
    """One real comparison with two columns, two runs each, written in every format; the prompt from stdin."""
    folder = tmp_path_factory.mktemp("run")
    outputs = [f"result{ending}" for ending in export.FORMATS]
    done = comparator(
        "run", "--variant", "bf16", "--variant", "nf4:compute=fp16,dq", "--prompt", "-", "--max-new-tokens", "6",
        "--repeats", "2", "--fidelity", "none", *(part for name in outputs for part in ("--output", name)),
        env=without_gradio, cwd=folder, stdin="What is the capital of France?\n",
    )  # fmt: skip
    return done, folder


def test_a_comparison_succeeds(ran):
    done, folder = ran
    assert done.returncode == 0, done.stderr[-3000:]
    comparison = document.read(folder / "result.json")
    assert comparison.ok and comparison.prompt.text == "What is the capital of France?"
    assert [c.label for c in comparison.cells] == ["bf16", "nf4:dq,compute=fp16"], (
        "notation is written canonically"
    )
    assert "Paris" in comparison.cells[0].text
    for cell in comparison.cells:
        assert len(cell.token_ids) == 6 and cell.finish_reason == "length"
        assert len(cell.latency.runs) == 2 and cell.latency.decode_tok_s > 0
        assert cell.memory.weight_bytes and cell.layers


def test_the_table_is_on_stdout_and_nothing_else(ran):
    done, folder = ran
    assert done.stdout.splitlines()[0].split()[:3] == ["decode", "TTFT", "resident"]
    rows = [line for line in done.stdout.splitlines() if line.startswith(("bf16", "nf4:dq"))]
    assert "bf16 (reference)" in rows[0] and "×" in rows[1]
    resident = document.read(folder / "result.json").cells[1].memory.resident_bytes
    assert f"{resident / 1e6:.0f} ×" in rows[1], "the table shows what the document holds"


def test_progress_is_on_stderr_without_the_libraries_noise(ran):
    done, _ = ran
    lines = done.stderr.splitlines()
    assert "── bf16" in lines and "── nf4:dq,compute=fp16" in lines
    assert any(re.match(r"   bf16: 6 tokens, decode [\d.]+ tok/s, TTFT", line) for line in lines)
    assert "bf16: run 2 of 2" in lines
    assert [line for line in lines if line.startswith("Wrote ")] == [
        f"Wrote result{e}" for e in export.FORMATS
    ]
    noise = [
        line
        for line in lines
        if re.search(r"warn|deprecat|\[transformers\]|inputs will be cast|it/s\]|INFO", line, re.I)
    ]
    assert not noise, f"a library talks: {noise}"


def test_every_format_is_written(ran):
    _, folder = ran
    comparison = document.read(folder / "result.json")
    for ending in export.FORMATS:
        assert (folder / f"result{ending}").read_text(encoding="utf-8") == export.render(
            comparison, f"x{ending}"
        )
    with (folder / "result.layers.csv").open(newline="") as file:
        found = list(csv.DictReader(file))
    assert len(found) == sum(len(c.layers) for c in comparison.cells)


def test_show_prints_and_converts(ran, tmp_path):
    _, folder = ran
    shown = CliRunner().invoke(
        app, ["show", str(folder / "result.json"), "--output", str(tmp_path / "again.md")]
    )
    assert shown.exit_code == 0, shown.output
    assert "What is the capital of France?" in shown.output and "bf16 (reference)" in shown.output
    assert (tmp_path / "again.md").read_text() == (folder / "result.md").read_text()
    as_json = CliRunner().invoke(app, ["show", str(folder / "result.json"), "--json"])
    assert document.loads(as_json.output) == document.read(folder / "result.json")
    code = CliRunner().invoke(app, ["show", str(folder / "result.json"), "--code", "nf4:dq,compute=fp16"])
    assert "bnb_4bit_use_double_quant=True" in code.output
    compile(code.output, "snippet", "exec")


def test_a_column_that_fails_is_told_and_the_others_finish(builtin, here, own_engine, settings_env, tmp_path):
    """With the room a run needs, bf16 does not fit 470 MB; nf4 does."""
    settings_env(memory_budget="470MB")
    file = tmp_path / "r.json"
    done = here(
        "run", "-v", "bf16", "-v", "nf4", "-p", "Hello", "-n", 2, "--no-evict", "--fidelity", "none", "-o", file
    )  # fmt: skip
    assert done.code == 1, "a failed column has to show in the exit code"
    failed, worked = document.read(file).cells
    assert (failed.status, worked.status) == ("failed", "ok")
    assert failed.error.problem and failed.error.advice
    assert f"bf16 failed: {failed.error.problem} {failed.error.advice}" in done.err
    assert " ".join(failed.error.problem.split()) in " ".join(done.out.split()), (
        "the table's notes say it too"
    )
    assert "Traceback" not in done.err


def test_ctrl_c_stops_cleanly_and_keeps_what_there_is(two_layers, without_gradio, tmp_path):
    running = subprocess.Popen(
        [sys.executable, "-m", "comparator", "run", "-m", str(two_layers), "-v", "bf16", "-v", "nf4", "-n", "1000",
         "-p", "Tell me a long story.", "--fidelity", "none", "-o", "stopped.json"],
        env=without_gradio, cwd=tmp_path, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    seen = b""
    try:
        deadline = time.monotonic() + 300
        while b"\xe2\x94\x80\xe2\x94\x80 bf16\n" not in seen and time.monotonic() < deadline:
            seen += os.read(running.stderr.fileno(), 4096)
        time.sleep(0.5)
        running.send_signal(signal.SIGINT)
        out, err = running.communicate(timeout=60)
    finally:
        running.kill()
    assert running.returncode == 130, (seen + err).decode()[-2000:]
    assert b"Traceback" not in err and b"Stopping" in err
    comparison = document.read(tmp_path / "stopped.json")
    assert [c.status for c in comparison.cells] == ["stopped", "stopped"]
    assert 0 < len(comparison.cells[0].token_ids) < 1000, "what was generated stays"
    assert comparison.cells[1].token_ids == (), "the second column never ran"
    assert "bf16" in out.decode(), "the table of what was finished is printed"


def test_layers(two_layers, here, tmp_path):
    done = here("layers", "-m", two_layers, "-v", "nf4", "--search", "q_proj", "-o", tmp_path / "rows.json")
    assert done.code == 0, done.err[-2000:]
    assert "14 × nf4 in uint8 (" in done.out, "the summary comes first"
    rows = json.loads((tmp_path / "rows.json").read_text())
    assert len(rows) == 2 and all("q_proj" in row["name"] for row in rows)
    assert {row["logical_dtype"] for row in rows} == {"nf4"} and rows[0]["shape"] == [576, 576]


# ---------------------------------------------------------------- without a model


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["run"], ["--prompt"]),
        (["run", "-p", ""], ["prompt is empty"]),
        (["run", "-p", "x", "-v", "nf5"], ["nf5", "Did you mean nf4"]),
        (["run", "-p", "x", "-v", "nf4:qd"], ["qd", "dq"]),
        (["run", "-p", "x", "-n", "0"], ["max_new_tokens is 0", "between 1 and"]),
        (["run", "-p", "x", "--temperature", "hot"], ["--temperature"]),
        (["run", "-p", "x", "--temperature", "-1"], ["temperature is -1"]),
        (["run", "-p", "x", "--fidelity", "total"], ["--fidelity", "'none'", "'prompt'", "'text'"]),
        (["run", "-p", "x", "--eval-text", "missing.txt"], ["missing.txt"]),
        (["run", "-p", "x", "--stride", "600"], ["stride 600"]),
        (["run", "-p", "x", "--reference", "fp32"], ["fp32", "bf16, int8, nf4"]),
        (["run", "-p", "x", "-v", "nf4", "-v", "nf4:dq=false"], ["selected twice"]),
        (["run", "-p", "x", "-a", "pirate*fast"], ["fast"]),
        (["run", "-p", "x", "-o", "a.docx"], ["a.docx", ".json"]),
        (["run", "-p", "x", "-o", "missing/a.json"], ["missing"]),
        (["run", "-p", "x", "--max-memory", "lots"], ["lots", "0=6GiB"]),
        (["run", "-p", "x", "-m", "/no/such/folder"], ["/no/such/folder"]),
        (["layers"], ["--variant"]),
        (["show", "missing.json"], ["missing.json"]),
        (["adapters", "nobody"], ["nobody", "pirate"]),
        (["bogus"], ["bogus"]),
    ],
    ids=lambda value: (
        " ".join(value) if value and value[0] in ("run", "layers", "show", "bogus", "adapters") else ""
    ),
)
def test_wrong_usage_is_exit_code_2_with_a_way_out(arguments, said, here, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    done = here(*arguments)
    assert done.code == 2, done.err
    assert all(part in " ".join(done.err.split()) for part in said), done.err
    assert "Traceback" not in done.err and done.out == ""


def test_a_prompt_that_is_not_utf8(without_gradio, tmp_path):
    done = comparator("run", "--prompt", "-", env=without_gradio, cwd=tmp_path, stdin=b"caf\xe9")
    assert done.returncode == 2 and "UTF-8" in done.stderr and "Traceback" not in done.stderr
    bad = os.fsdecode(b"caf\xe9")
    done = comparator("run", "--prompt", bad, env=without_gradio, cwd=tmp_path)
    assert done.returncode == 2 and "UTF-8" in done.stderr and "Traceback" not in done.stderr


def test_a_wrong_setting_is_named(without_gradio, tmp_path):
    done = comparator("run", "-p", "x", env=without_gradio | {"COMPARATOR_MAX_COLUMNS": "many"}, cwd=tmp_path)
    assert done.returncode == 2 and "COMPARATOR_MAX_COLUMNS is “many”" in done.stderr


def test_variants_lists_every_method_and_option():
    text = CliRunner().invoke(app, ["variants"]).output
    listed = json.loads(CliRunner().invoke(app, ["variants", "--json"]).output)
    assert [m["method"] for m in listed] == list(methods())
    flat = " ".join(text.split())
    for backend, method in methods().values():
        assert re.search(rf"^{method.name}\b", text, re.M)
        for option in method.options:
            assert option.example in text, f"{method.name}: {option.name} is missing"
            assert " ".join(option.help.split()) in flat
            if option.transformers_default:
                assert f"transformers' default is {option.transformers_default}" in flat
        if reason := backend.unavailable():
            assert reason in flat


def test_a_missing_library_is_said_not_hidden(monkeypatch):
    from comparator.backends.bnb import BitsAndBytes

    monkeypatch.setattr(BitsAndBytes, "requires", ("no_such_library",))
    text = CliRunner().invoke(app, ["variants"]).output
    assert "no_such_library" in text and re.search(r"^nf4\b", text, re.M)


def test_help_reads_well():
    commands = [command.name for command in app.registered_commands]
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    missing = [name for name in commands if f"python -m comparator {name}" not in readme]
    assert not missing, f"not among the README's examples: {missing}"
    for command in [[], *([name] for name in commands)]:
        result = CliRunner().invoke(app, [*command, "--help"])
        assert result.exit_code == 0 and "Usage" in result.output
    text = CliRunner().invoke(app, ["run", "--help"], env={"COLUMNS": "120", "NO_COLOR": "1"}).output
    assert "python -m comparator run" in text, "an example says more than a list of options"
    assert "default: bf16 int8 nf4" in text and "Exit code" in text


@pytest.mark.parametrize(
    "command", [None, *app.registered_commands], ids=lambda c: c.name if c else "program"
)
def test_help_fits_80_columns(command):
    """No option is cut, no example is broken at a place where a shell would end the command, no type is “a string”."""
    output = (
        CliRunner()
        .invoke(app, [*([command.name] if command else []), "--help"], env={"COLUMNS": "80", "NO_COLOR": "1"})
        .output
    )
    assert not re.findall(r"-[a-z-]*…", output), "an option is cut"
    assert not re.findall(r"^│ +-.*<(?:str|list\[str\])>", output, re.M), (
        "say what it is: FILE, NOTATION, one of …"
    )
    assert max(map(len, output.splitlines())) <= 80
    epilog = command.epilog if command else app.info.epilog
    lines = [line.strip() for line in output.splitlines()]
    for example in re.findall(r"^ +python -m.*(?:\n {6}.*)*", epilog or "", re.M):
        for line in example.splitlines():
            assert line.strip() in lines, f"an example wraps: {line}"
    if command:
        assert "Exit code" in output


def test_the_installed_program_completes_commands_and_choices(tmp_path):
    script = tmp_path / "quant-comparator"
    script.write_text("from comparator.cli import main\nmain()\n")

    def completed(words: str) -> list[str]:
        environment = {
            "COMP_WORDS": words, "COMP_CWORD": str(len(words.split(" ")) - 1), "_QUANT_COMPARATOR_COMPLETE": "complete_bash",
            "PYTHONPATH": str(ROOT),
        }  # fmt: skip
        done = subprocess.run(
            [sys.executable, script], env=os.environ | environment, capture_output=True, text=True
        )
        return done.stdout.split()

    assert completed("quant-comparator sens") == ["sensitivity"]
    assert completed("quant-comparator sensitivity --by ") == ["module", "layer", "kind"]
    assert completed("quant-comparator run -v nf") == ["nf4", "nf4:dq"]


def test_show_refuses_what_is_no_document(tmp_path):
    (tmp_path / "a.json").write_text("{}")
    result = CliRunner().invoke(app, ["show", str(tmp_path / "a.json")])
    assert isinstance(result.exception, UserError)
    (tmp_path / "b.json").write_text(document.dumps(sample.comparison()))
    result = CliRunner().invoke(app, ["show", str(tmp_path / "b.json"), "--code", "fp64"])
    assert isinstance(result.exception, UserError) and "bf16, nf4" in result.exception.advice


def test_a_strangers_document_cannot_steer_the_terminal(tmp_path):
    evil = "\x1b]0;title\x07\x1b[2J\x9b2Jtext"
    changed = json.loads(document.dumps(sample.comparison()))
    for cell in changed["cells"]:
        cell |= {"text": evil, "notes": [evil], "variant": evil, "kernel": evil}
    changed["prompt"]["text"] = changed["environment"]["device"] = evil
    (tmp_path / "evil.json").write_text(json.dumps(changed))
    output = CliRunner().invoke(app, ["show", str(tmp_path / "evil.json")]).output
    assert "text" in output and not re.search(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]", output)


def test_adapters_describes_the_one_that_comes_with_us(builtin):
    result = CliRunner().invoke(app, ["adapters", "pirate"])
    assert result.exit_code == 0, result.output
    assert re.search(r"rank +4\b", result.output) and "q_proj" in result.output and "MB" in result.output
    (described,) = json.loads(CliRunner().invoke(app, ["adapters", "pirate", "--json", "-q"]).stdout)
    assert described["fits"] and described["ranks"] == [4] and "q_proj" in described["targets"]


def test_reindex(own_dirs):
    from comparator.store import open_store

    with open_store() as store:
        store.save(sample.comparison())
    result = CliRunner().invoke(app, ["reindex"])
    assert result.exit_code == 0 and "has 1 saved comparison of" in result.output


@pytest.fixture
def broken_model(own_dirs) -> str:
    """A checkpoint that loads and cannot run: four heads of queries, three of keys."""
    folder = own_dirs / "broken"
    tiny_models.save(folder, "llama", num_key_value_heads=3)
    return str(folder)


def test_a_failure_names_the_log_and_verbose_prints_the_traceback(broken_model, own_dirs):
    command = ["run", "-m", broken_model, "-v", "fp32", "-p", "Where is Atlantis?", "--raw", "-n", "2"]
    quiet = CliRunner().invoke(app, command)
    log = own_dirs / "data" / "logs" / "comparator.log"
    assert quiet.exit_code == 1 and "Could not load fp32" in quiet.stderr
    assert f"in {log} (--verbose" in quiet.stderr and "Traceback" not in quiet.stderr
    error_id = re.search(r"Details: error (\w+) in", quiet.stderr)[1]
    assert error_id in log.read_text() and "Traceback" in log.read_text()
    assert "Atlantis" not in log.read_text(), "the prompt is in the log"
    level = logging.getLogger("comparator").level
    try:
        loud = CliRunner().invoke(app, [*command, "--verbose"])
    finally:
        logging.getLogger("comparator").setLevel(level)
    assert "Traceback" in loud.stderr and "Atlantis" not in loud.stderr.partition("Error ")[2]


def test_an_exception_that_nobody_expected_is_logged(own_dirs, monkeypatch, capsys):
    import comparator.cli

    def fail(**_):
        raise LookupError("a fault of this program")

    monkeypatch.setattr(comparator.cli, "app", fail)
    with pytest.raises(SystemExit) as ended:
        comparator.cli.main()
    message = capsys.readouterr().err
    assert ended.value.code == 1 and "a fault of this program" in message and "comparator.log" in message
    assert "in fail" in (own_dirs / "data" / "logs" / "comparator.log").read_text()
