"""Tables of the evidence page: each is made of the runs alone."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from benchmarks.real import matching, names
from benchmarks.real.bases import NAMES
from benchmarks.real.finals import RATES
from benchmarks.real.matching import CHOSEN_BY, RIVAL, Row
from benchmarks.real.tasks import TASKS
from benchmarks.writer import table

NOTHING = (
    "*No run of a real model stands in `benchmarks/results/` yet, so there is nothing to show here."
    " `python -m benchmarks.real report` fills this place from the runs.*"
)
# Of the finalists on all tasks: a measure, what it is, how its figures are written.
_MEASURED = (
    ("kl_dialogues", "KL to the base on dialogues (its own answers), nats a token", ".2g"),
    ("kl_people", "KL to the base on dialogues (people's answers), nats a token", ".2g"),
    ("kl_text", "KL to the base on plain text, nats a token", ".2g"),
    ("facts_kept", "Facts that are still right, of those that the base got right", ".0%"),
    ("step", "Steps of training to there", ".0f"),
)
_FIGURES = ("KL, dialogues", "of LoRA's", "KL, text", "facts kept", "steps", "rate", "seeds")
# What a screening compares all ways on.
_SCREENED = [(NAMES[0], "snips"), (NAMES[0], "bfcl")]


def finals(rows: list[Row]) -> str:
    """The ways that were measured most thoroughly, each base and task by itself."""
    parts = []
    lines = matching.matched(rows, "task_loss")
    for key in dict.fromkeys((x["base"], x["task"]) for x in lines):
        some = [x for x in _of(lines, key) if x[CHOSEN_BY] is not None]
        told = [
            {
                "way to train": names.name(x["arm"]),
                "KL, the base's own answers": f"{x[CHOSEN_BY]:.2g}",
                "of LoRA's": share(x),
                "seeds apart": f"{x['spread']:.1g}" if x["spread"] is not None else "",
                "KL, people's answers": f"{x['kl_people']:.2g}",
                "KL, text": f"{x['kl_text']:.2g}",
                "facts kept (%)": f"{100 * x['facts_kept']:.0f}",
                "seeds": x["seeds"],
                "on": " and ".join(sorted(_devices(rows, *key, x["arm"]))),
            }
            for x in some
        ]
        parts += [f"{names.title(*key)}:\n\n{table(told)}"]
    return "\n\n".join(parts) or NOTHING


def _devices(rows: list[Row], base: str, task: str, arm: str) -> set[str]:
    mine = [r for r in rows if (r["base"], r["task"], r["arm"]) == (base, task, arm)]
    return {str(r["device"]).upper().replace("CUDA", "GPU") for r in mine}


def side_by_side(rows: list[Row]) -> str:
    """The finalists on all tasks, a table for each measure; behind a figure its number of seeds."""
    lines = {(x["base"], x["task"], x["arm"]): x for x in matching.matched(rows, "task_loss")}
    arms = list(dict.fromkeys([RIVAL, *reversed(RATES)]))
    parts = []
    for measure, title, digits in _MEASURED:
        told = [
            {"": names.title(*key)}
            | {names.name(arm): _seen(lines.get((*key, arm)), measure, digits) for arm in arms}
            for key in ((base, task) for base in NAMES for task in TASKS)
            if any((*key, arm) in lines for arm in arms if arm != RIVAL)
        ]
        parts += [f"{title}:\n\n{table(told)}"] if told else []
    return "\n\n".join(parts) or NOTHING


def _seen(line: Row | None, measure: str, digits: str) -> str:
    if line is None:
        return ""
    value = line[measure]
    return "-" if value is None else f"{value:{digits}} ({line['seeds']})"


def others(rows: list[Row]) -> str:
    """All other ways, with old data and without, on the tasks of the screening; best first."""
    lines = matching.matched(rows, "task_loss")
    parts = []
    for key in _SCREENED:
        some = [x for x in _of(lines, key) if x["arm"] in (RIVAL, "loki_q30", *names.OTHERS)]
        told = [{"way to train": names.name(x["arm"]), "what it does": _does(x)} | _figures(x)
                for x in some]  # fmt: skip
        parts += [f"{names.title(*key)}:\n\n{table(told)}"] if told else []
    return "\n\n".join(parts) or NOTHING


def parts_of_auto(rows: list[Row]) -> str:
    """What each part of `auto` does, on the first task of the screening, in the order of
    `names.PARTS`."""
    lines = {x["arm"]: x for x in _of(matching.matched(rows, "task_loss"), _SCREENED[0])}
    arms = [arm for arm in names.PARTS if arm in lines]
    told = [
        {"what trains, and how": names.PARTS.get(arm, names.name(arm))} | _figures(lines[arm])
        for arm in [*([RIVAL] if RIVAL in lines else []), *arms]
    ]
    return table(told) if arms else NOTHING


def _of(lines: Iterable[Row], key: tuple[str, str]) -> list[Row]:
    return [x for x in lines if (x["base"], x["task"]) == key]


def _does(line: Row) -> str:
    return names.OTHERS.get(line["arm"], ("", ""))[1]


def _figures(line: Row) -> dict[str, str]:
    """A line's measures at the matched loss; `-` where the way did not come there."""
    if line[CHOSEN_BY] is None:
        return dict.fromkeys(_FIGURES, "-")
    told = (
        f"{line[CHOSEN_BY]:.2g}",
        share(line),
        f"{line['kl_text']:.2g}",
        f"{line['facts_kept']:.0%}",
        f"{line['step']:.0f}",
        f"{line['rate']:g}",
        str(line["seeds"]),
    )
    return dict(zip(_FIGURES, told, strict=True))


def share(line: Row | None) -> str:
    """Of what LoRA forgets: empty where a way did not run, `-` where it did not learn as much."""
    if line is None:
        return ""
    return "-" if line["of_lora"] is None else f"{line['of_lora']:.2g}"


def write_rates(folder: Path, rows: list[Row]) -> Path:
    """Write `real_rates.md` into `folder`: every way at every rate, seed by seed."""
    parts = [
        "Written by `python -m benchmarks.real report` from `real_*.csv`: every way at every rate"
        " that was tried, at the task loss where ways are compared. KL on dialogues (the base's own"
        " answers) stands seed by seed; the other figures are means of the seeds that came there."
        " *not*: seeds that did not, with the lowest loss and the last step of each."
    ]
    for amount in dict.fromkeys(r["amount"] for r in rows):
        some = [r for r in rows if r["amount"] == amount]
        for key in dict.fromkeys((r["base"], r["task"]) for r in some):
            goal = TASKS[key[1]].loss
            told = _rates(_of(some, key), goal)
            parts += [f"## {key[0]}, {key[1]}: at a task loss of {goal:g} (measured: {amount})"]
            parts += [table(told)]
    path = folder / "real_rates.md"
    path.write_text("\n\n".join(parts) + "\n", encoding="utf-8")
    return path


def _rates(rows: list[Row], goal: float) -> list[dict[str, str]]:
    runs: dict[tuple[str, float], dict[int, matching.Curve]] = {}
    for (_, _, arm, seed, rate), curve in matching.curves(rows).items():
        runs.setdefault((arm, rate), {})[seed] = curve
    order = {x["arm"]: i for i, x in enumerate(matching.matched(rows, "task_loss"))}
    found = []
    for arm, rate in sorted(runs, key=lambda key: (order[key[0]], -key[1])):
        seeds = {s: matching.at(c, "task_loss", goal) for s, c in sorted(runs[arm, rate].items())}
        came = {s: row for s, row in seeds.items() if row is not None}
        short = [_short_of(s, runs[arm, rate][s]) for s in seeds if s not in came]
        found.append(
            {
                "arm": arm,
                "rate": f"{rate:g}",
                "seeds": ", ".join(map(str, came)),
                "KL, dialogues": ", ".join(f"{row[CHOSEN_BY]:.3g}" for row in came.values()),
                "people's": _mean(came.values(), "kl_people"),
                "text": _mean(came.values(), "kl_text"),
                "facts": _mean(came.values(), "facts_kept"),
                "steps": _mean(came.values(), "step"),
                "not": "; ".join(short),
            }
        )
    return found


def _short_of(seed: int, curve: matching.Curve) -> str:
    least = min(r["task_loss"] for r in curve)
    return f"{seed}: {least:.3g}, {curve[-1]['step']:.0f}"


def _mean(rows: Iterable[Row], measure: str) -> str:
    known = [r[measure] for r in rows if r.get(measure) is not None]
    return f"{sum(known) / len(known):.3g}" if known else ""
