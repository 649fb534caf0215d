"""What comparator/util/compat/lm_eval.py uses of the harness is where it expects it."""

from __future__ import annotations

import pytest

pytest.importorskip("lm_eval", reason="requirements-tasks.txt is not installed")

from comparator.util.compat import lm_eval as compat


def test_a_tasks_yaml_is_read_with_what_it_includes(tmp_path):
    (tmp_path / "base").write_text("output_type: multiple_choice\n")
    (tmp_path / "one.yaml").write_text("task: one\ninclude: base\n")
    read = compat.load_yaml(tmp_path / "one.yaml")
    assert (read["task"], read["output_type"]) == ("one", "multiple_choice")


def test_requests_are_built_without_a_bar(capsys):
    from lm_eval.api import task

    before = task.tqdm
    try:
        compat.without_bars()
        assert list(task.tqdm(range(3))) == [0, 1, 2]
    finally:
        task.tqdm = before
    assert capsys.readouterr().err == "", "the harness draws its bars in another way: change without_bars"
