"""From the lines of a results file to arms compared at one task loss or one task score."""

from __future__ import annotations

import csv
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from statistics import mean

from benchmarks.real.tasks import TASKS

Row = dict
Curve = list[dict]
RIVAL = "lora_all_r16"
# The same arm in another order and from another start.
AGAIN = {"lora_all_r16": "lora_again"}
MEASURES = (
    "kl_dialogues", "kl_people", "kl_text", "ce_rise", "facts_kept", "choice_score", "choice_lost",
    "choice_won",
)  # fmt: skip
# By what the best of an arm's rates is chosen, for every arm alike.
CHOSEN_BY = "kl_dialogues"
_TEXT = {"base", "task", "arm", "amount", "precision", "device"}


def read(folder: Path, amount: str | None = None) -> list[Row]:
    """All lines of `real_*.csv` that are runs, or those of one amount; what was not measured at a
    point is None."""
    rows = []
    for file in sorted(folder.glob("real_*.csv")):
        with file.open(newline="") as lines:
            reader = csv.DictReader(lines)
            if not {"arm", "step", "task_loss", CHOSEN_BY} <= set(reader.fieldnames or ()):
                continue
            rows += [{k: _value(k, v) for k, v in row.items()} for row in reader]
    return [row for row in rows if amount in (None, row["amount"])]


def kept(rows: list[Row]) -> list[Row]:
    """Of each base and task one amount alone: curves of two do not mix. The one in which most ways
    to train ran."""
    arms: dict[tuple, set[str]] = defaultdict(set)
    for row in rows:
        arms[row["base"], row["task"], row["amount"]].add(row["arm"])
    most: dict[tuple, str] = {}
    for (base, task, amount), ran in arms.items():
        known = arms.get((base, task, most.get((base, task), "")), set())
        if len(ran) > len(known):
            most[base, task] = amount
    return [row for row in rows if most[row["base"], row["task"]] == row["amount"]]


def _value(name: str, text: str):
    if name in _TEXT:
        return text
    return float(text) if text else None


def curves(rows: Iterable[Row]) -> dict[tuple, Curve]:
    """Runs by (base, task, arm, seed, rate), each from its first step to its last."""
    found: dict[tuple, Curve] = defaultdict(list)
    for row in rows:
        found[row["base"], row["task"], row["arm"], int(row["seed"]), row["rate"]].append(row)
    for curve in found.values():
        curve.sort(key=lambda r: r["step"])
    return found


def at(curve: Curve, axis: str, value: float) -> Row | None:
    """The run where it first reaches a task loss, or a task score; None where it ends before.

    Linear between the two points around. What is not measured at every point is linear between the
    last one before and the first one behind that have it; None where no point behind has it.
    """
    sign = -1 if axis == "task_loss" else 1
    for i, row in enumerate(curve):
        if sign * (row[axis] - value) < 0:
            continue
        if i == 0:
            return dict(row)
        found = dict(row)
        for name in row.keys() - _TEXT:
            early = next((r for r in reversed(curve[:i]) if r[name] is not None), None)
            late = next((r for r in curve[i:] if r[name] is not None), None)
            found[name] = late and _between(early, late, name, axis, value)
        return found
    return None


def _between(early: Row | None, late: Row, name: str, axis: str, value: float):
    """What `name` is where the axis has the value; not beyond one of the two points."""
    if early is None or not isinstance(late[name], float) or early[axis] == late[axis]:
        return late[name]
    share = min(1.0, max(0.0, (value - early[axis]) / (late[axis] - early[axis])))
    return early[name] + share * (late[name] - early[name])


def goals(task: str, axis: str) -> float | None:
    """Where arms are compared on that axis; None: the task has no such point."""
    return TASKS[task].loss if axis == "task_loss" else TASKS[task].score


def matched(rows: list[Row], axis: str, value: float | None = None) -> list[Row]:
    """A line per base, task and arm: the mean over seeds at the matched value, best first.

    The rate that counts is the one of the lowest `CHOSEN_BY` there, on the seeds that all rates
    ran with; of it all seeds count, and all must arrive. An arm none of whose rates arrived has
    None for all measures.
    """
    groups: dict[tuple, dict[float, dict[int, Curve]]] = defaultdict(lambda: defaultdict(dict))
    for (base, task, arm, seed, rate), curve in curves(rows).items():
        groups[base, task, arm][rate][seed] = curve
    lines = []
    for (base, task, arm), rates in groups.items():
        goal = goals(task, axis) if value is None else value
        if goal is None:
            continue
        sign = -1 if axis == "task_loss" else 1
        every = [r[axis] for runs in rates.values() for c in runs.values() for r in c]
        line = {"base": base, "task": task, "arm": arm, "goal": goal, "rates": len(rates)}
        line["best"] = sign * max(sign * v for v in every)
        arrived: dict[float, dict[int, Row]] = {}
        for rate, runs in rates.items():
            found = {seed: at(c, axis, goal) for seed, c in runs.items()}
            if None not in found.values():
                arrived[rate] = {seed: row for seed, row in found.items() if row is not None}
        line |= _best(arrived)
        one = next(iter(next(iter(rates.values())).values()))[0]
        line["trained_parameters"] = int(one["trained_parameters"])
        lines.append(line)
    order = {k: i for i, k in enumerate(dict.fromkeys((x["base"], x["task"]) for x in lines))}
    last = float("inf")
    lines.sort(key=lambda x: (order[x["base"], x["task"]], _or(x[CHOSEN_BY], last)))
    _against(lines)
    return lines


def _best(arrived: dict[float, dict[int, Row]]) -> Row:
    if not arrived:
        names = ("rate", "seeds", "step", "seconds", "spread", *MEASURES)
        return dict.fromkeys(names) | {"seeds": 0}
    common = set.intersection(*(set(runs) for runs in arrived.values()))
    if not common:  # other seeds for each rate: those that ran most tell most
        most = max(map(len, arrived.values()))
        arrived = {rate: runs for rate, runs in arrived.items() if len(runs) == most}

    def forgot(rate: float) -> float:
        runs = arrived[rate]
        return mean(runs[seed][CHOSEN_BY] for seed in (common or runs))

    rate = min(arrived, key=forgot)
    found = list(arrived[rate].values())
    line: Row = {"rate": rate, "seeds": len(found)}
    for name in ("step", "seconds", *MEASURES):
        known = [x[name] for x in found if x.get(name) is not None]
        line[name] = mean(known) if known else None
    values = [x[CHOSEN_BY] for x in found]
    line["spread"] = max(values) - min(values) if len(values) > 1 else None
    return line


def _against(lines: list[Row]) -> None:
    """Adds `of_lora`: forgetting as a share of what LoRA forgets on that base and task."""
    rival = {(x["base"], x["task"]): x[CHOSEN_BY] for x in lines if x["arm"] == RIVAL}
    for x in lines:
        theirs = rival.get((x["base"], x["task"]))
        x["of_lora"] = x[CHOSEN_BY] / theirs if theirs and x[CHOSEN_BY] is not None else None


def _or(value: float | None, other: float) -> float:
    return other if value is None else value


def noise(rows: list[Row], axis: str = "task_loss") -> list[Row]:
    """Arms that ran twice, rate by rate and seed by seed: how far apart do the two fall?"""
    every = curves(rows)
    found = []
    for (base, task, arm, seed, rate), curve in every.items():
        other = every.get((base, task, AGAIN.get(arm, ""), seed, rate))
        goal = goals(task, axis)
        if other is None or goal is None:
            continue
        one, two = at(curve, axis, goal), at(other, axis, goal)
        if one is None or two is None:
            continue
        line = {"base": base, "task": task, "arm": arm, "seed": seed, "rate": rate}
        for name in ("kl_dialogues", "kl_text", "facts_kept"):
            line |= {name: one[name], f"{name}, again": two[name]}
        found.append(line)
    return found
