"""The error log: traceback and versions on file, tokens and prompts not, memory freed, the file small and private."""

from __future__ import annotations

import logging
import pickle
import stat
import weakref
from dataclasses import dataclass

import pytest

from comparator.core.errors import UserError
from comparator.util import error_log
from comparator.util.cuda_errors import is_context_damaged, is_out_of_memory
from comparator.util.error_log import PrivateFile


class Large:
    """Stands for a tensor in a frame: something whose life a weak reference can follow."""


def fail(message: str = "no such layer", watch: list | None = None) -> None:
    large = Large()
    if watch is not None:
        watch.append(weakref.ref(large))
    raise KeyError(message)


def failed(message: str = "no such layer", watch: list | None = None) -> Exception:
    try:
        try:
            fail(message, watch)
        except KeyError as error:
            raise RuntimeError("loading failed") from error
    except RuntimeError as error:
        return error


def written() -> str:
    return error_log.log_file().read_text(encoding="utf-8")


def test_an_error_is_logged_with_its_traceback_and_versions(own_dirs):
    assert not error_log.log_file().parent.exists()
    report = error_log.record(failed(), "load nf4")
    text = written()
    for part in (
        report.id,
        "load nf4",
        "Traceback",
        "in fail",
        "KeyError: 'no such layer'",
        "loading failed",
        "pydantic ",
    ):
        assert part in text, f"{part!r} is missing: a bug report made from the log cannot be acted on"
    assert report.log_file == str(error_log.log_file())
    assert error_log.find(report.id) == report and report.traceback in report.details


def test_the_file_is_the_owners_alone(own_dirs):
    error_log.record(failed(), "run")
    assert stat.S_IMODE(error_log.log_file().stat().st_mode) == 0o600


def test_release_frees_what_the_frames_hold():
    watch: list = []
    error = failed(watch=watch)
    assert watch[0]() is not None, "the frame must hold it, or this test shows nothing"
    error_log.release(error)
    assert watch[0]() is None, (
        "a traceback in the chain of causes still holds its frames, and with them the tensors"
    )


def test_tokens_never_reach_the_file(own_dirs):
    token = "hf_" + "a1B2" * 8
    error = failed(f"401 for Authorization: Bearer {token}, token={token}")
    report = error_log.record(error, f"download with {token}")
    assert token not in written() + report.details
    assert "hf_…" in written()


@pytest.mark.parametrize(
    "prompt", ["What is the\ncapital of “France”?", "it's mine \\ yours", "Grüße an alle"]
)
def test_a_running_prompt_never_reaches_the_file(own_dirs, prompt):
    with error_log.hidden(prompt, None):
        error_log.record(failed(f"cannot encode {prompt!r} ({prompt})"), "encode")
        error_log.fallback("decode eagerly", failed(prompt))
    assert prompt not in written() and repr(prompt)[1:-1] not in written()
    assert "[prompt]" in written()
    error_log.record(failed(prompt), "encode")
    assert repr(prompt)[1:-1] in written(), "what no comparison uses any more must not be looked for"


@dataclass
class Asked:
    model: str
    prompt: str
    system: str | None
    repeats: int = 2


def test_the_request_is_in_the_details_without_its_prompts(own_dirs):
    problem = UserError("Could not run.", "", error_log.record(failed(), "run"))
    assert error_log.with_request(UserError("No room."), Asked("m", "p", None)) is None
    error_id = error_log.with_request(problem, Asked("user/model", "my secret question", "my system"))
    details = error_log.find(error_id).details
    assert "user/model" in details and "repeats: 2" in details and "user/model" in written()
    assert "secret" not in details + written() and "my system" not in details + written()


def test_the_file_rotates(tmp_path):
    handler = PrivateFile(tmp_path / "logs" / "a.log", max_bytes=2000, backups=2)
    for number in range(40):
        assert handler.write(logging.ERROR, f"entry {number} " + "x" * 200)
    handler.close()
    files = sorted(p.name for p in (tmp_path / "logs").iterdir())
    assert files == ["a.log", "a.log.1", "a.log.2"]
    assert all(p.stat().st_size <= 2000 for p in (tmp_path / "logs").iterdir())
    assert all(stat.S_IMODE(p.stat().st_mode) == 0o600 for p in (tmp_path / "logs").iterdir())
    assert "entry 39 " in (tmp_path / "logs" / "a.log").read_text()


def test_a_folder_that_cannot_be_written_costs_nothing_but_the_file(tmp_path, settings_env):
    (tmp_path / "file").write_text("")
    settings_env(data_dir=tmp_path / "file" / "data")
    report = error_log.record(failed(), "run")
    assert report.log_file is None and "KeyError" in report.traceback


def test_a_fallback_says_why(own_dirs):
    error_log.fallback("decode without the fused kernel for norms", failed())
    error_log.fallback("decode eagerly", "the model is spread over two devices")
    assert "Fallback: decode without the fused kernel for norms" in written() and "in fail" in written()
    assert "spread over two devices" in written()


def test_an_error_of_another_process_is_logged_here_once(own_dirs):
    import dataclasses

    report = error_log.record(failed(), "load nf4")
    elsewhere = dataclasses.replace(report, id="0badcafe", machine="gpu-2", log_file="/other/comparator.log")
    travelled = pickle.loads(pickle.dumps(UserError("Could not load.", "Restart.", elsewhere)))
    assert travelled.report == elsewhere and str(travelled) == "Could not load. Restart."
    error_log.adopt(travelled)
    error_log.adopt(travelled)
    assert written().count("0badcafe") == 1 and "gpu-2" in written()
    assert error_log.find("0badcafe")
    # An actor on this machine with this data folder has written it already.
    error_log.adopt(UserError("a", "", dataclasses.replace(report, id="feedbeef")))
    assert "feedbeef" not in written() and error_log.find("feedbeef")


def test_warnings_and_uncaught_exceptions_reach_the_file_too(own_dirs, monkeypatch):
    import sys
    import threading

    monkeypatch.setattr(sys, "excepthook", sys.excepthook)
    monkeypatch.setattr(threading, "excepthook", lambda args: None)
    logger = logging.getLogger("comparator")
    before = list(logger.handlers)
    try:
        error_log.setup()
        logging.getLogger("comparator.store.index").warning("the index was rebuilt")
        thread = threading.Thread(target=fail, name="saver")
        thread.start()
        thread.join()
    finally:
        logger.handlers = before
    assert "the index was rebuilt" in written()
    assert "run thread saver" in written() and "in fail" in written()


def test_paths_are_replaced_and_addresses_are_not():
    text = "[Errno 2] No such file: '/home/me/models/x/config.json', see https://huggingface.co/a/b for user/repo"
    assert error_log.without_paths(text) == (
        "[Errno 2] No such file: '…', see https://huggingface.co/a/b for user/repo"
    )


class AcceleratorError(RuntimeError):
    """Named as torch names it."""


HINT = "\nCompile with `TORCH_USE_CUDA_DSA` to enable device-side assertions."


@pytest.mark.parametrize(
    "error, memory, damaged",
    [
        (MemoryError(), True, False),
        (RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB."), True, False),
        (AcceleratorError("CUDA error: out of memory" + HINT), True, False),
        (AcceleratorError("CUDA error: an illegal memory access was encountered" + HINT), False, True),
        (RuntimeError("Triton Error [CUDA]: an illegal memory access was encountered"), False, True),
        (AcceleratorError("CUDA error: device-side assert triggered" + HINT), False, True),
        (AcceleratorError("CUDA error: unknown error" + HINT), False, True),
        (AcceleratorError("CUDA error: no kernel image is available for execution" + HINT), False, False),
        (
            AcceleratorError("CUDA error: operation not permitted when stream is capturing" + HINT),
            False,
            False,
        ),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied" + HINT), False, False),
    ],
    ids=lambda value: str(value)[:40],
)
def test_out_of_memory_and_a_damaged_context_are_told_apart(error, memory, damaged):
    assert (is_out_of_memory(error), is_context_damaged(error)) == (memory, damaged)


def test_paths_in_what_is_saved_are_reduced_to_their_last_part():
    text = "Cannot read /srv/app/cache/models/x/config.json of /home/me/models/mine/a.bin (https://huggingface.co/a/b/c)"
    assert error_log.shorten_paths(text, ["/home/me/models/mine", ""]) == (
        "Cannot read …/config.json of /home/me/models/mine/a.bin (https://huggingface.co/a/b/c)"
    )
