"""Which runs the finals are, and how processes share them."""

from __future__ import annotations

import pytest

from benchmarks.real import __main__ as real
from benchmarks.real import finals, sweep
from benchmarks.real.arms import ARMS
from benchmarks.real.tasks import TASKS


def test_six_ways_on_all_tasks_with_three_seeds_each_once():
    keys = finals.keys("a base", "full")
    assert len(keys) == len(set(keys)) == 6 * len(TASKS) * 3
    assert {k.arm for k in keys} <= set(ARMS) and {k.seed for k in keys} == {0, 1, 2}
    assert {k.rate for k in keys if (k.arm, k.task) == ("auto_q10", "wikidyk")} == {2e-3}
    # What is stopped early has compared whole tasks.
    assert {k.task for k in keys[:18]} == {next(iter(TASKS))}


def test_processes_share_all_of_them_and_none_twice():
    keys = finals.keys("a base", "full")
    parts = [finals.part(keys, f"{i}/4") for i in (1, 2, 3, 4)]
    assert sorted(map(str, sum(parts, []))) == sorted(map(str, keys))
    assert finals.part(keys, "1/1") == keys


@pytest.mark.parametrize("told", ["0/4", "5/4", "4", "a/b", "1/0", "/", "-1/2"])
def test_a_faulty_part_is_told(told, capsys, monkeypatch):
    monkeypatch.setattr("sys.argv", ["real", "run", "--finals", f"--part={told}"])
    monkeypatch.setattr(real, "Lab", lambda *_: None)
    monkeypatch.setattr(real, "Data", lambda *_: None)
    with pytest.raises(SystemExit):
        real.main()
    assert "expected i/n with 1 <= i <= n" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ("run --finals --arms full", "--finals says which runs"),
        ("run --finals --seeds 1", "--finals says which runs"),
        ("run --finals --best", "--finals says which runs"),
        ("report --part 1/2", "report: --finals and --part are for `run`"),
    ],
)
def test_what_would_change_nothing_is_refused(line, told, capsys, monkeypatch):
    monkeypatch.setattr("sys.argv", ["real", *line.split()])
    with pytest.raises(SystemExit):
        real.main()
    assert told in capsys.readouterr().err


def test_the_command_runs_its_part(monkeypatch):
    ran = []
    monkeypatch.setattr(
        sweep, "run_all", lambda labs, keys, file, *_, **__: ran.append((keys, file))
    )
    monkeypatch.setattr(real, "Lab", lambda *_: None)
    monkeypatch.setattr(real, "Data", lambda *_: None)
    line = "run --finals --part 2/3 --amount full --stage final --base smollm2-135m-instruct"
    monkeypatch.setattr("sys.argv", ["real", *line.split()])
    real.main()
    ((keys, file),) = ran
    assert keys == finals.keys("smollm2-135m-instruct", "full")[1::3]
    assert file.name == "real_final.csv"
