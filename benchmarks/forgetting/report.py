"""From the results files to figures and words: `docs/evidence.md`."""

from __future__ import annotations

import csv
import re
from collections import defaultdict
from pathlib import Path

import numpy as np
import torch

from benchmarks.forgetting.arms import Context
from benchmarks.forgetting.base import Base
from benchmarks.forgetting.measures import ask
from benchmarks.machine import describe
from benchmarks.writer import command, table
from loki_plugin import select_rows
from loki_plugin.evaluating.suppress import suppressed

EVIDENCE = Path(__file__).parents[2] / "docs" / "evidence.md"
# What a run must have learned to be compared with another.
MATCHED = 0.9
MEASURES = ("retention", "retention_uncovered", "forgetting", "kl_general", "kl_uncovered")
# LoKI's arms that do more than choose rows.
PROTECTED = re.compile("protect|anchor")
Runs = list[dict]


def read(file: Path) -> Runs:
    if not file.is_file():
        return []
    with file.open(newline="") as lines:
        return [{k: _number(v) for k, v in row.items()} for row in csv.DictReader(lines)]


def _number(text: str):
    try:
        return float(text)
    except ValueError:
        return text


def at_score(runs: Runs, measure: str, score: float) -> float | None:
    """`measure` where the curve over learning rates first reaches the task score; None: never.

    Linear between the two rates around it. A curve that starts above the score counts with its
    lowest rate: it may do better at a lower one.
    """
    curve = sorted(runs, key=lambda r: r["lr"])
    for i, run in enumerate(curve):
        if run["task_score"] >= score:
            if i == 0:
                return run[measure]
            low = curve[i - 1]
            share = (score - low["task_score"]) / (run["task_score"] - low["task_score"])
            return low[measure] + share * (run[measure] - low[measure])
    return None


def matched(runs: Runs, score: float = MATCHED) -> list[dict]:
    """One line per arm and task: the mean over seeds at the matched score, best first."""
    groups = defaultdict(lambda: defaultdict(list))
    for run in runs:
        groups[(run["task"], run["arm"])][run["seed"]].append(run)
    lines = []
    for (task, arm), seeds in groups.items():
        line = {"task": task, "arm": arm, "seeds": len(seeds)}
        line["rates"] = min(map(len, seeds.values()))
        line["best task score"] = max(r["task_score"] for s in seeds.values() for r in s)
        for measure in MEASURES:
            values = [at_score(s, measure, score) for s in seeds.values()]
            reached = [v for v in values if v is not None]
            line[measure] = float(np.mean(reached)) if len(reached) == len(values) else None
            if measure == "forgetting":
                line["spread"] = float(np.ptp(reached)) if len(reached) > 1 else None
        lines.append(line)
    order = {task: i for i, task in enumerate(dict.fromkeys(r["task"] for r in runs))}
    lines.sort(key=lambda x: (order[x["task"]], x["forgetting"] is None, x["forgetting"] or 0))
    return lines


def r_squared(runs: Runs, predictor: str, measure: str = "forgetting") -> float:
    """Of a straight line through log(1 + predictor), over all runs."""
    x = np.log1p([r[predictor] for r in runs])
    y = np.array([r[measure] for r in runs])
    return float(np.corrcoef(x, y)[0, 1] ** 2)


def suppress(base: Base, folder: Path) -> None:
    """Zero the lowest, highest and random rows of every layer: does the score tell what matters?"""
    context = Context(base, 0)
    model, measured = base.model().eval(), base.world.measured()
    rows, then = [], {k: ask(model, base.tokenizer, i) for k, i in measured.items()}
    known = {k: sum(a.right) for k, a in then.items()}
    hidden = context.scores.shape[-1]
    for quota in (q for q in (1, 2, 5, 10, 20, 30) if q * hidden >= 100):  # at least one row
        for magnitude in (False, True):
            for which, strategy in (
                ("lowest", "layer_balanced"),
                ("highest", "layer_highest"),
                ("random", "random"),
            ):
                if which == "random" and magnitude:
                    continue
                chosen = select_rows(context.scores, quota, strategy, magnitude=magnitude)
                with suppressed(model, chosen):
                    now = {k: ask(model, base.tokenizer, i) for k, i in measured.items()}
                kept = [
                    sum(a and b for a, b in zip(then[k].right, now[k].right, strict=True))
                    / max(1, known[k])
                    for k in measured
                ]
                rise = [now[k].loss - then[k].loss for k in measured]
                name = f"{which} by |score|" if magnitude else which
                rows.append(
                    {
                        "quota": quota,
                        "silenced": name,
                        "retention": round(float(np.mean(kept)), 4),
                        "forgetting": round(float(np.mean(rise)), 4),
                    }
                )
                print(rows[-1], flush=True)
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "suppress.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)


def targets(lines: list[dict]) -> list[dict]:
    """What was aimed at, task by task, and whether the figures show it; missed ones stay in.

    A lead counts only if it is larger than the spread between the seeds of both arms; with one
    seed that is not known, and the verdict says so.
    """
    rows = []
    for task in dict.fromkeys(line["task"] for line in lines):
        arms = {x["arm"]: x for x in lines if x["task"] == task and x["forgetting"] is not None}
        plain = [a for a in arms if a.startswith("loki") and not PROTECTED.search(a)]
        ours = [a for a in arms if a.startswith("loki") and PROTECTED.search(a)]
        others = [a for a in arms if a not in ours and "replay" not in a]
        foreign = [a for a in others if "protect" not in a and a not in plain]
        for aim, left, right, share in (
            ("LoKI without protection forgets at most half of LoRA r16", plain,
             ["lora_all_r16"], 0.5),
            ("chosen rows forget less than random rows", ["loki_q30"], ["random_q30"], 1),
            ("the same, both with protected inputs", ["loki_protect_q30"],
             ["random_protect_q30"], 1),
            ("LoKI with its best protection forgets less than every rival", ours, foreign, 1),
            ("... than protected inputs without chosen rows", ours,
             ["random_protect_q30", "protect_q99", "lora_protect"], 1),
            ("... and no more than LoRA with 1 % real replay", ours, ["lora_replay1"], 1),
        ):  # fmt: skip
            best = [
                min((arms[a] for a in names if a in arms), key=_forgot, default=None)
                for names in (left, right)
            ]
            if None in best:
                continue
            us, them = best
            spreads = [x["spread"] for x in best if x["spread"] is not None]
            noise = max(spreads, default=0)
            lead = share * them["forgetting"] - us["forgetting"]
            verdict = "yes" if lead > noise else "no" if lead < -noise else "not told apart"
            verdict += "" if len(spreads) == 2 else " (one seed)"
            rows.append(
                {"task": task, "aim": aim}
                | {"ours": f"{us['arm']} {_forgot(us):.3f}"}
                | {"rival": f"{them['arm']} {_forgot(them):.3f}", "shown": verdict}
            )
    return rows


def _forgot(line: dict) -> float:
    return line["forgetting"]


def plot(runs: Runs, path: Path) -> None:
    """Task score against forgetting, one line per arm and seed 0."""
    from matplotlib.figure import Figure

    tasks = list(dict.fromkeys(r["task"] for r in runs))
    figure = Figure(figsize=(7 * len(tasks), 6), layout="constrained")
    axes = figure.subplots(1, len(tasks), squeeze=False)[0]
    for axis, task in zip(axes, tasks, strict=True):
        arms = list(dict.fromkeys(r["arm"] for r in runs if r["task"] == task))
        for i, arm in enumerate(arms):
            curve = sorted(
                (r for r in runs if r["arm"] == arm and r["task"] == task and r["seed"] == 0),
                key=lambda r: r["lr"],
            )
            style = {"marker": "osv^Dx+*"[i // 10 % 8], "linestyle": "-" if "loki" in arm else ":"}
            axis.plot(
                [r["task_score"] for r in curve],
                [r["forgetting"] for r in curve],
                color=f"C{i % 10}",
                label=arm,
                **style,
            )
        axis.set(xlabel="task score", ylabel="forgetting (rise of cross-entropy)", title=task)
        axis.set_yscale("symlog", linthresh=0.05)
        axis.legend(fontsize=6, ncols=2)
    figure.savefig(path, dpi=110)


def write(folder: Path, base: Base, evidence: Path = EVIDENCE) -> None:
    """`docs/evidence.md` and the plot, from what is in the results folder."""
    screen, final = (read(folder / f"forgetting_{n}.csv") for n in ("screen", "final"))
    if not screen and not final:
        raise SystemExit(f"'{folder}' has no results yet; run `screen` first")
    plot(final or screen, folder / "forgetting_pareto.png")
    parts = [_head(base)]
    for title, runs in (("Finalists", final), ("Screening", screen)):
        if runs:
            parts += [f"## {title}", _about(runs), table([_shown(x) for x in matched(runs)])]
    for title, runs in (("finalists", final), ("screening", screen)):
        aims = targets(matched(runs))
        parts += [f"## What was aimed at: {title}", table(aims)] if aims else []
    parts += ["![Task score against forgetting](../benchmarks/results/forgetting_pareto.png)"]
    everything = screen + final
    parts += ["## What predicts forgetting", _predictors(everything)]
    silenced = read(folder / "suppress.csv")
    if silenced:
        parts += [
            "## Do the scores tell what matters?",
            "The lowest, highest and random rows of every layer are silenced in the base (no"
            " training): share of the known answers that stay right, and rise of cross-entropy.",
            table([{k: str(v).replace("|", "\\|") for k, v in x.items()} for x in silenced]),
        ]
    parts += [_limits()]
    evidence.write_text("\n\n".join(parts) + "\n", encoding="utf-8")
    print(f"written: {evidence}")


def _head(base: Base) -> str:
    r = base.report
    return (
        "# Evidence\n\nWritten by `"
        + command("forgetting", DIR=_work())
        + f"` from `benchmarks/results/forgetting_*.csv`. {describe(torch.device('cpu'))}.\n\n"
        f"The base: a Llama of {r['parameters']:,} parameters, trained from nothing on a generated"
        f" world (seed {r['seed']}; training loss {r['train_loss']:.3f}; answers it has learned"
        f" {r['loss_on_seen_items']:.3f}, sums it never saw {r['loss_on_unseen_sums']:.3f},"
        f" English text learned {r['loss_on_training_text']:.2f}, held out"
        f" {r['loss_on_held_out_text']:.2f},"
        " cross-entropy per token each). Calibration, anchors and protected inputs see half of the"
        " items of four kinds (people, arithmetic, opposites, instructions); measured are the other"
        " half and three kinds that no calibration covers (places, grammar, sequences).\n\n"
        "*retention*: share of what the base answered right that is still right; *forgetting*: rise"
        " of the answers' cross-entropy; both are means over the seven kinds, *uncovered* over the"
        " three. KL is forward KL(base || tuned) at the answers' positions."
    )


def _work() -> str:
    import sys

    return sys.argv[sys.argv.index("--work") + 1] if "--work" in sys.argv else "DIR"


def _about(runs: Runs) -> str:
    hours = sum(r["seconds"] for r in runs) / 3600
    rates = max(len({r["lr"] for r in runs if r["arm"] == a}) for a in {r["arm"] for r in runs})
    return (
        f"{len(runs)} runs of {runs[0]['steps']:.0f} steps, {len({r['arm'] for r in runs})} arms,"
        f" up to {rates} learning rates,"
        f" {len({r['seed'] for r in runs})} seed(s), task(s)"
        f" {', '.join(dict.fromkeys(r['task'] for r in runs))}; {hours:.1f} hours of"
        " training on one thread."
        f" Compared where each curve over learning rates first reaches a task score of {MATCHED};"
        " `-` means that not every seed reached it. `spread`: largest minus smallest seed."
    )


def _shown(line: dict) -> dict:
    return {
        k: "-" if v is None else (f"{v:.3f}" if isinstance(v, float) else v)
        for k, v in line.items()
    }


def _predictors(runs: Runs) -> str:
    found = {p: r_squared(runs, p) for p in ("kl_task", "delta_norm", "kl_general")}
    return (
        f"R² over all {len(runs)} runs of a line through log(1 + x), for the rise of cross-entropy:"
        f" KL to the base on the new task {found['kl_task']:.2f}, ‖ΔW‖_F {found['delta_norm']:.2f},"
        f" KL on the measured kinds themselves {found['kl_general']:.2f}."
    )


def _limits() -> str:
    return (
        "## What this does not show\n\nThe model is small, its world is made up, and what is asked"
        " is short. Orders between arms that are far apart can be expected elsewhere; sizes of"
        " effects cannot. The learning rates of the screening are three per arm, so that arms near"
        " each other there are not told apart; an arm with fewer `rates` than others was not"
        " finished."
        " Forgetting grows faster than the task score, so that a line between two distant rates"
        " overstates it. The fewer steps, the higher the rate that a constrained update needs, and"
        " the more it forgets: compare the screening with the longer finals. Nothing here has"
        " been measured on a pretrained model of billions of parameters; `docs/reproduce.md` says"
        " how to."
    )
