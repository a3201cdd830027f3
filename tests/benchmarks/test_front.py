"""What the pages say of real models: blocks that are filled from runs, made up here."""

from __future__ import annotations

import re
import shutil

import pytest

from benchmarks.real import front, names, tables
from benchmarks.real.bases import SOURCES

SMOL, GEMMA = list(SOURCES)[:2]
# arm -> KL to the base where the task is learned well enough; None: it never is.
ENDS = {
    "lora_all_r16": 0.8, "lora_again": 0.82, "osf": 0.4, "lora_anchor": 0.2, "lora_replay5": 0.6,
    "loki_q30": 0.72, "loki_soft_q90": 0.08, "lora_soft": 0.04, "auto_gain_frozen": 0.02,
    "full": None,
}  # fmt: skip


def run(base, task, arm, end, seed=0):
    """A run from nothing learned to all learned, with `end` at the loss where arms are compared."""
    loss, points = front.matching.goals(task, "task_loss"), ((0, 5.0, 0.0), (9, None, end))
    if end is None:
        loss, points = 4.0, ((0, 5.0, 0.0), (9, None, 0.3))
    for step, at, kl in points:
        row = dict.fromkeys(front.matching.MEASURES, 0.5)
        row |= {"base": base, "task": task, "arm": arm, "seed": seed, "rate": 1e-3, "step": step}
        row |= {"amount": "full", "task_loss": loss if at is None else at, "kl_dialogues": kl}
        yield row | {"task_score": step / 10, "seconds": 1.0, "trained_parameters": 10}


@pytest.fixture
def rows():
    columns = [(b, t) for b in (GEMMA, SMOL) for t in ("wikidyk", "snips", "bfcl")]
    return [r for key in columns for arm, end in ENDS.items() for r in run(*key, arm, end)]


def cells(text: str) -> list[list[str]]:
    lines = re.findall(r"^\| (.*) \|$", text, re.M)
    return [line.split(" | ") for line in lines]


def test_the_table_has_six_lines_and_four_columns_in_one_unit(rows):
    head, lora, others, replay, papers, *ours = cells(front.in_short(rows))
    assert head[1:] == [
        "SmolLM2-135M, commands to JSON",
        "SmolLM2-135M, function calls",
        "Gemma-3-270M, commands to JSON",
    ]
    assert lora[1:] == ["1", "1", "1"]
    # The best of the others is named; ours and those with old data are none of them.
    assert others[1] == "0.5 (OSF, the only one that was run)"
    assert replay[1] == "0.75" and papers[1] == "0.9"
    assert [line[1] for line in ours] == ["0.025", "0.25"]  # the two that come first in `_OURS`
    assert "commands to JSON 0.8;" in front.in_short(rows)


def test_what_did_not_run_or_did_not_learn_is_told(rows):
    rows = [r for r in rows if r["base"] == SMOL and r["arm"] in ("lora_all_r16", "loki_q30")]
    rows += run(SMOL, "snips", "lora_soft", None)
    _, lora, papers, ours = cells(front.in_short(rows))
    assert ours[1:] == ["-", "", ""]
    assert lora[1:] == ["1"] * 3 and papers[1:] == ["0.9"] * 3
    # Without LoRA there is nothing to compare with.
    assert front.in_short([r for r in rows if r["arm"] != "lora_all_r16"]) == tables.NOTHING


def test_two_amounts_of_one_task_never_mix(rows):
    """Pages have the one with more ways to train; the fuller one has a table of its own."""
    few = [r | {"amount": "brief", "kl_dialogues": 9.0} for r in rows if r["arm"] == "lora_soft"]
    kept = front.matching.kept([*few, *rows])
    assert kept == rows
    many = [r | {"amount": "brief"} for r in rows] + [
        r | {"amount": "brief"} for r in run(SMOL, "snips", "dora", 0.7)
    ]
    kept = front.matching.kept([*rows, *many])
    assert {r["amount"] for r in kept if (r["base"], r["task"]) == (SMOL, "snips")} == {"brief"}
    assert {r["amount"] for r in kept if r["task"] == "bfcl"} == {"full"}


def test_the_finalists_are_told_from_the_fullest_runs_alone(rows, monkeypatch):
    for row in rows:
        row["device"] = "cuda" if row["arm"] == "osf" else "cpu"
    other = [r | {"amount": "brief", "kl_dialogues": 9.0, "arm": "dora"} for r in rows]
    every = [*rows, *other]
    monkeypatch.setattr(
        front.matching, "read", lambda _, amount: [r for r in every if r["amount"] == amount]
    )
    told = front.block("finals", "docs/evidence.md", rows)
    assert told.count("| way to train |") == 6 and "DoRA" not in told
    _, best, *_ = cells(told.split("SmolLM2-135M, commands to JSON:")[1])
    assert best == [
        "all linears, `protect: auto`", "0.02", "0.025", "", "0.5", "0.5", "50", "1", "CPU",
    ]  # fmt: skip
    assert "| OSF | 0.4 | 0.5 |  | 0.5 | 0.5 | 50 | 1 | GPU |" in told
    every.clear()
    assert front.block("finals", "docs/evidence.md", rows) == tables.NOTHING


def test_finalists_stand_side_by_side_with_their_seeds(rows):
    rows += run(SMOL, "snips", "auto_gain_frozen", 0.04, seed=1)
    told = tables.side_by_side(rows)
    assert told.count("|  | LoRA r16, all linears |") == 5  # a table for each measure
    head, first, second, *_ = cells(told)
    commands = dict(zip(head, first, strict=True))
    assert commands[""] == "SmolLM2-135M, commands to JSON"
    assert commands["all linears, `protect: auto`"] == "0.03 (2)"
    assert commands["LoRA r16, all linears"] == "0.8 (1)"
    assert commands["full fine-tuning"] == "-"
    assert commands["10 % of the rows, `protect: auto`"] == ""
    assert dict(zip(head, second, strict=True))["all linears, `protect: auto`"] == "0.02 (1)"
    assert tables.side_by_side([]) == tables.NOTHING


def test_all_other_ways_stand_side_by_side_best_first(rows):
    told = tables.others(rows)
    assert told.count("| way to train |") == 2  # commands and function calls, of one base
    commands, calls = (cells(part) for part in told.split("SmolLM2-135M, function calls:"))
    assert [line[0] for line in commands[1:]] == [
        "OSF", "LoRA + 5 % real data", "LoKI as in the paper, 30 % of the rows",
        "LoRA r16, all linears", "full fine-tuning",
    ]  # fmt: skip
    assert commands[1][2:] == ["0.4", "0.5", "0.5", "50%", "9", "0.001", "1"]
    assert commands[-1][2:] == ["-"] * 7 and len(calls) == len(commands)
    assert tables.others([]) == tables.NOTHING


def test_parts_of_auto_stand_in_the_order_in_which_they_are_told(rows):
    head, lora, *parts = cells(tables.parts_of_auto(rows))
    assert head[0] == "what trains, and how" and lora[0] == "LoRA r16, all linears"
    assert [line[0] for line in parts] == [
        names.PARTS[arm]
        for arm in ("lora_soft", "lora_anchor", "auto_gain_frozen", "loki_soft_q90")
    ]
    assert parts[0][1:4] == ["0.04", "0.05", "0.5"]
    assert tables.parts_of_auto([]) == tables.NOTHING


def test_every_rate_is_told_seed_by_seed(rows, tmp_path):
    rows += run(SMOL, "snips", "osf", 0.5, seed=1)
    rows += [r | {"rate": 1e-4} for r in run(SMOL, "snips", "osf", None, seed=2)]
    told = tables.write_rates(tmp_path, rows).read_text()
    part = told.split(f"## {SMOL}, snips: at a task loss of 0.4 (measured: full)")[1].split("##")[0]
    lines = {(line[0], line[1]): line[2:] for line in cells(part)[1:]}
    assert lines["osf", "0.001"] == ["0, 1", "0.4, 0.5", "0.5", "0.5", "0.5", "9", ""]
    assert lines["osf", "0.0001"] == ["", "", "", "", "", "", "2: 4, 9"]
    assert told.count("\n## ") == 6


def test_pages_are_filled_from_the_runs_and_from_nothing_else(rows, tmp_path):
    for page in front.PAGES:
        (tmp_path / page).parent.mkdir(exist_ok=True)
        shutil.copy(front.ROOT / page, tmp_path / page)
    (tmp_path / front.PICTURE).parent.mkdir(parents=True)
    front.fill(rows, tmp_path)
    readme = (tmp_path / "README.md").read_text()
    assert front.in_short(rows) in readme and f"]({front.PICTURE})" in readme
    assert (tmp_path / front.PICTURE).stat().st_size > 5000
    assert "](pictures/real_tradeoff.png)" in (tmp_path / "docs/evidence.md").read_text()
    outside = [re.sub(r"(?s)<!-- real:.*?<!-- /real:\w+ -->", "", t) for t in
               (readme, (front.ROOT / "README.md").read_text())]  # fmt: skip
    assert outside[0] == outside[1]
    front.fill([], tmp_path)
    readme = (tmp_path / "README.md").read_text()
    assert tables.NOTHING in readme and "real_tradeoff" not in readme
