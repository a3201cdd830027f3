"""Whether a task of lm-eval runs code that the model writes, read from its files."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from loki_plugin.evaluating.harness import _runs_code


@pytest.mark.parametrize(
    ("task", "base", "runs"),
    [
        ("unsafe_code: true", None, True),
        ("task: a\nprocess: !function utils.process", None, False),
        ("include: base.yaml", "unsafe_code: true\nx: !function u.x", True),
        ("include: [base.yaml]", "unsafe_code: true", True),
        ("include: base.yaml\nunsafe_code: false", "unsafe_code: true", False),
        ("include: base.yaml", "task: b", False),
    ],
)
def test_it_is_read_from_the_file_and_what_that_includes(tmp_path, task, base, runs):
    (tmp_path / "task.yaml").write_text(task)
    if base:
        (tmp_path / "base.yaml").write_text(base)
    assert _runs_code({"yaml_path": str(tmp_path / "task.yaml")}) is runs
    assert _runs_code(SimpleNamespace(yaml_path=tmp_path / "task.yaml")) is runs


def test_tasks_without_a_file_run_none():
    assert not _runs_code(None) and not _runs_code({"yaml_path": -1})
