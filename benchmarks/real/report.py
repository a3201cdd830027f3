"""From `real_*.csv` to `results/real.md` and its picture: nothing in them is written by hand."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

from benchmarks.real import matching, tasks
from benchmarks.real.arms import ARMS
from benchmarks.real.bases import NAMES
from benchmarks.real.matching import CHOSEN_BY, RIVAL, Row
from benchmarks.real.picture import plot
from benchmarks.writer import table

# At most this share of what LoRA forgets was aimed at.
AIMS = {("smollm2-135m-instruct", "snips"): 0.05, ("smollm2-135m-instruct", "bfcl"): 0.05}
OTHERWISE = 0.2
_SHOWN = {
    "arm": "arm", "of_lora": "KL dialogues / LoRA's", "kl_dialogues": "KL, its own answers",
    "kl_people": "KL, people's answers", "kl_text": "KL, text", "ce_rise": "rise of cross-entropy",
    "facts_kept": "facts kept", "choice_score": "multiple choice", "choice_lost": "lost",
    "choice_won": "won", "trained_parameters": "trained", "rate": "rate", "step": "steps",
    "seconds": "seconds", "seeds": "seeds", "spread": "spread",
}  # fmt: skip


def write(folder: Path) -> Path:
    """Write `real.md` and `real_*.png` into `folder`, from the runs that are there.

    Raises:
        ValueError: no runs are there.
    """
    rows = [r for r in matching.read(folder) if r["amount"] != "ci"]
    if not rows:
        raise ValueError(f"'{folder}' has no runs of real bases yet; `run` makes them")
    parts = [_head(folder, rows)]
    amounts = [amount for amount, _ in Counter(r["amount"] for r in rows).most_common()]
    for amount in amounts:
        some = [r for r in rows if r["amount"] == amount]
        name = "real_pareto" + ("" if amount == amounts[0] else f"_{amount}")
        plot(some, folder / f"{name}.png")
        parts += [f"## Measured: {amount}", _amount(some), f"![Forgetting]({name}.png)"]
        for axis, title in (("task_loss", "task loss"), ("task_score", "task score")):
            parts += _tables(some, axis, title)
        found = matching.noise(some)
        if found:
            parts += ["### How much is noise", _NOISE, table([_plain(x) for x in found])]
    aimed = verdicts(matching.kept(rows))
    parts += ["## What was aimed at", table(aimed)] if aimed else []
    parts += ["## Not run", _not_run(rows)]
    path = folder / "real.md"
    path.write_text("\n\n".join(parts) + "\n", encoding="utf-8")
    print(f"written: {path}")
    return path


_NOISE = (
    "The same arm with another order of the data and another start of what is new, at the same"
    " task loss. Differences between arms that are not larger count as none."
)


def _head(folder: Path, rows: list[Row]) -> str:
    machines = [m for f in sorted(folder.glob("real_*.json")) for m in json.loads(f.read_text())]
    runs = [
        curve
        for amount in dict.fromkeys(r["amount"] for r in rows)
        for curve in matching.curves(r for r in rows if r["amount"] == amount).values()
    ]
    hours = sum(curve[-1]["seconds"] for curve in runs) / 3600
    precisions = ", ".join(dict.fromkeys(r["precision"] for r in rows))
    return (
        "# Forgetting of real pretrained models\n\nWritten by `python -m benchmarks.real report`"
        f" from `real_*.csv`. {'; '.join(dict.fromkeys(machines))}. {len(runs)} runs,"
        f" {hours:.1f} hours of training (precision: {precisions}; measured in float32), four"
        " sequences a step, AdamW, the rate constant after five steps.\n\n"
        "A run is measured on its way. Arms are compared where their curves first reach the same"
        " held-out task loss, or the same share of answers that are exactly right; values between"
        " two points are linear. Of each arm the rate with the lowest KL on dialogues counts, and"
        " for every arm alike. KL is KL(base || tuned) in nats per token. `-`: not measured."
        " *spread*: largest minus smallest seed of the KL on"
        " dialogues."
    )


def _amount(rows: list[Row]) -> str:
    one = {
        (b, t): sorted({int(r["seed"]) for r in rows if (r["base"], r["task"]) == (b, t)})
        for b, t in dict.fromkeys((r["base"], r["task"]) for r in rows)
    }
    return "; ".join(f"{b}, {t}: seeds {', '.join(map(str, s))}" for (b, t), s in one.items()) + "."


def _tables(rows: list[Row], axis: str, title: str) -> list[str]:
    lines = matching.matched(rows, axis)
    parts = []
    for base, task in dict.fromkeys((x["base"], x["task"]) for x in lines):
        some = [x for x in lines if (x["base"], x["task"]) == (base, task)]
        parts += [f"### {base}, {task}: at a {title} of {some[0]['goal']:g}"]
        reached = [{_SHOWN[k]: x[k] for k in _SHOWN} for x in some if x["rate"] is not None]
        if reached:
            parts += [table([_plain(x) for x in reached])]
        missed = [f"{x['arm']} ({x['best']:.3g})" for x in some if x["rate"] is None]
        if missed:
            parts += [f"Ended before, with its best {title}: {', '.join(missed)}."]
    return parts


def verdicts(rows: list[Row]) -> list[Row]:
    """What was aimed at, base by base and task by task, with the figures; missed ones stay in."""
    found = []
    lines = matching.matched(rows, "task_loss")
    for base, task in dict.fromkeys((x["base"], x["task"]) for x in lines):
        arms = {
            x["arm"]: x
            for x in lines
            if (x["base"], x["task"]) == (base, task) and x[CHOSEN_BY] is not None
        }
        own = [a for a in arms if is_ours(a) and not _is_a_try(a)]
        ours = min(own, key=lambda a: arms[a][CHOSEN_BY], default=None)
        rival = arms.get(RIVAL)
        if ours is None or rival is None:
            continue
        foreign = [a for a in arms if not is_ours(a) and not a.startswith("lora_replay")]
        best = min(foreign, key=lambda a: arms[a][CHOSEN_BY])
        share, aim = arms[ours]["of_lora"], AIMS.get((base, task), OTHERWISE)
        lost = [1 - a["facts_kept"] for a in (arms[ours], rival)]
        found.append(
            {
                "base": base,
                "task": task,
                "our best": ours,
                "KL of LoRA's": f"{share:.3f}",
                "facts lost, ours and LoRA's": f"{lost[0]:.3f}, {lost[1]:.3f}",
                "aimed at": f"<= {aim:g}",
                "reached": "yes" if share <= aim else "no",
                "best without real data of others": f"{best} {arms[best]['of_lora']:.3f}",
                "least of all": "yes" if share <= arms[best]["of_lora"] else "no",
            }
        )
    return found


def is_ours(arm: str) -> bool:
    """Whether an arm has a protection of this package."""
    return any(word in arm for word in ("soft", "hard", "form", "auto", "anchor", "gain"))


def _is_a_try(arm: str) -> bool:
    """Whether no setting of the package asks for an arm, or it sees people's dialogues: these are
    held against nobody."""
    tries = ("_talks", "_rest", "_null_frozen", "auto_frozen", "_frozen_eighth")
    return arm == "auto_gain" or arm.endswith(tries)


def _not_run(rows: list[Row]) -> str:
    ran = {(r["base"], r["task"], r["arm"]) for r in rows}
    lines = []
    for base in NAMES:
        for task in tasks.TASKS:
            missing = [a for a in ARMS if (base, task, a) not in ran]
            if len(missing) == len(ARMS):
                lines.append(f"- {base}, {task}: nothing")
            elif missing:
                lines.append(f"- {base}, {task}: {', '.join(missing)}")
    return "\n".join(lines) or "Every arm ran on every base and task."


def _plain(line: Row) -> Row:
    def told(value):
        if value is None:
            return "-"
        if isinstance(value, float):
            return f"{value:.3g}" if abs(value) < 1000 else f"{value:,.0f}"
        return f"{value:,}" if isinstance(value, int) else value

    return {k: told(v) for k, v in line.items()}
