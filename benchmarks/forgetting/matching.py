"""Arms at one task score: from the runs of a results file to what they show."""

from __future__ import annotations

import csv
import re
from collections import defaultdict
from pathlib import Path

import numpy as np

# What a run must have learned to be compared with another; `classes` tests reports that it did not
# teach, where every arm stays below what it reaches on the other tasks.
MATCHED = {"facts": 0.9, "calls": 0.9, "classes": 0.8}
# The same for the screening, whose few steps teach less.
SCREENED = dict.fromkeys(MATCHED, 0.6)
MEASURES = (
    "retention", "retention_uncovered", "forgetting", "kl_general", "kl_covered", "kl_uncovered"
)  # fmt: skip
# LoKI's arms that do more than choose rows.
PROTECTED = re.compile("protect|anchor|soft")
# The same arm in another order and from another start: how far apart do two runs fall?
TWICE = {"lora_all_r16": "lora_again", "loki_q30": "loki_again_q30"}
# What was tried so that LoKI keeps more, in groups; each stands beside `loki_q30`.
TRIED = {
    "which score": {
        "loki_magnitude_q30": "|score| instead of the signed score",
        "loki_activation_q30": "z·∂p/∂z where the model is, not integrated",
        "loki_fisher_q30": "Fisher information E[(∂ log p/∂z_j)²·‖x‖²] of a row",
        "loki_fisher_global_q30": "the same, balanced over layers by itself",
        "global_lowest_q30": "lowest scores of all layers together",
        "smallest_weight_q30": "rows of the smallest norm, no data",
        "random_q30": "random rows",
        "highest_q30": "highest scores",
    },
    "which calibration": {
        "loki_one_kind_q30": "one kind of question only",
        "loki_all_tokens_q30": "prefixes that end all over the prompts",
        "loki_with_text_q30": "the questions and plain text",
    },
    "how many rows, which decay": {
        "loki_q10": "10 %",
        "loki_q20": "20 %",
        "loki_q60": "60 %",
        "random_q60": "60 %, random",
        "loki_q99": "99 %",
        "loki_lowrank_q90": "90 %, rank 16",
        "loki_wd0.3_q30": "weight decay 0.3",
    },
    "which protection": {
        "loki_protect_q30": "inputs, 0.99 of the energy",
        "loki_protect90_q30": "inputs, 0.9",
        "loki_protect70_q30": "inputs, 0.7",
        "loki_protect_text_q30": "inputs, 0.99, with plain text",
        "loki_protect_joint_q30": "inputs, 0.9, rows of the least Fisher information that is left",
        "loki_protect90_q60": "inputs, 0.9, 60 % of the rows",
        "random_protect90_q60": "inputs, 0.9, 60 % of the rows, random",
        "loki_protect90_anchor_q60": "inputs, 0.9, 60 % of the rows, anchor",
        "loki_protect90_anchor_q90": "inputs, 0.9, 90 % of the rows, anchor",
        "protect90_q99": "inputs, 0.9, 99 % of the rows, random",
        "loki_protect_q60": "inputs, 0.99, 60 % of the rows",
        "loki_protect_q90": "inputs, 0.99, 90 % of the rows",
        "loki_soft90_q30": "soft inputs, 0.9 of the energy",
        "loki_soft99_q10": "soft inputs, 0.99, 10 % of the rows",
        "loki_soft99_q30": "soft inputs, 0.99",
        "random_soft99_q30": "soft inputs, 0.99, random rows",
        "highest_soft99_q30": "soft inputs, 0.99, highest rows",
        "loki_soft99_q60": "soft inputs, 0.99, 60 % of the rows",
        "loki_soft99_q90": "soft inputs, 0.99, 90 % of the rows",
        "random_soft99_q90": "soft inputs, 0.99, 90 % of the rows, random",
        "loki_soft99_anchor_q30": "soft inputs, 0.99, anchor",
        "loki_soft99_anchor_q90": "soft inputs, 0.99, 90 % of the rows, anchor",
        "loki_soft99_joint_q30": "soft inputs, 0.99, rows of the least Fisher information left",
        "loki_soft999_q90": "soft inputs, 0.999, 90 % of the rows",
        "loki_soft99_lowrank": "soft inputs, 0.99, rank 16",
        "loki_soft99_lowrank_q90": "soft inputs, 0.99, 90 % of the rows, rank 16",
        "loki_soft99_rank64_q90": "soft inputs, 0.99, 90 % of the rows, rank 64",
        "lora_soft99": "soft inputs, 0.99, of LoRA r16 on all linears",
        "loki_anchor_q30": "anchor, weight 1",
        "loki_anchor4_q30": "anchor, weight 4",
        "loki_anchor_q60": "anchor, weight 1, 60 % of the rows",
        "loki_anchor_q99": "anchor, weight 1, 99 % of the rows",
        "loki_protect_anchor_q30": "inputs 0.99 and anchor",
        "loki_protect_anchor_q90": "inputs 0.99 and anchor, 90 % of the rows",
    },
    "what soft inputs have seen": {
        "loki_soft99_people_q90": "one kind of question, 90 % of the rows",
        "loki_soft99_eighth_q90": "an eighth of the prompts, 90 % of the rows",
        "loki_soft99_text_q90": "the prompts and plain text, 90 % of the rows",
        "loki_soft99_text_q30": "the prompts and plain text, 30 % of the rows",
        "loki_soft99_written_q90": "the prompts and what the base writes itself, 90 % of the rows",
    },
    "an anchor on the prompts and what the base writes itself": {
        "loki_soft99_written_anchor_q90": "soft inputs that have seen it too, 90 % of the rows",
        "loki_written_anchor_q90": "without, 90 % of the rows",
        "loki_written_anchor_lowrank_q90": "without, 90 % of the rows, rank 16",
        "random_written_anchor_q90": "without, 90 % of the rows, random",
        "lora_written_anchor": "LoRA r16 on all linears",
        "lora_soft99_written_anchor": "LoRA r16 on all linears, soft inputs that have seen it too",
        "lora_writtenreplay50": "replayed as half of the data of LoRA r16 instead",
    },
}
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


def matched(runs: Runs, scores: dict[str, float] = MATCHED) -> list[dict]:
    """One line per arm and task: the mean over seeds at the matched score, best first."""
    groups = defaultdict(lambda: defaultdict(list))
    for run in runs:
        groups[(run["task"], run["arm"])][run["seed"]].append(run)
    lines = []
    for (task, arm), seeds in groups.items():
        line = {"task": task, "arm": arm, "seeds": len(seeds)}
        line["params"] = int(next(iter(seeds.values()))[0]["params"])
        line["rates"] = min(map(len, seeds.values()))
        line["best task score"] = max(r["task_score"] for s in seeds.values() for r in s)
        for measure in MEASURES:
            values = [at_score(s, measure, scores[task]) for s in seeds.values()]
            reached = [v for v in values if v is not None]
            line[measure] = float(np.mean(reached)) if len(reached) == len(values) else None
            if measure == "forgetting":
                line["spread"] = float(np.ptp(reached)) if len(reached) > 1 else None
        lines.append(line)
    order = {task: i for i, task in enumerate(dict.fromkeys(r["task"] for r in runs))}
    lines.sort(key=lambda x: (order[x["task"]], x["forgetting"] is None, x["forgetting"] or 0))
    return lines


def against(columns: dict[str, Runs], rival: str = "lora_all_r16", least: int = 3) -> list[dict]:
    """Arms by columns: forgetting at the matched score over the rival's, both with the same seeds.

    Arms that ran in fewer than `least` columns are left out, and columns without the rival. The
    mean is geometric; an arm that somewhere missed the score has none and stands last.
    """
    found: dict[str, dict[str, list[tuple[float, float]] | None]] = defaultdict(dict)
    for column, runs in columns.items():
        curves = defaultdict(list)
        for run in runs:
            curves[run["arm"], run["seed"]].append(run)
        for arm, seed in curves:
            theirs = curves.get((rival, seed))
            if theirs is None or arm == rival:
                continue
            score = MATCHED[theirs[0]["task"]]
            pair = [at_score(c, "forgetting", score) for c in (curves[arm, seed], theirs)]
            if pair[1] is None:
                continue
            if pair[0] is None or found[arm].get(column, ()) is None:
                found[arm][column] = None  # one seed that never got there is enough
            else:
                found[arm].setdefault(column, []).append(tuple(pair))
    rows = []
    for arm, cells in found.items():
        shares = {c: sum(a for a, _ in v) / sum(b for _, b in v) for c, v in cells.items() if v}
        if len(cells) < least:
            continue
        # A rise below nothing has no logarithm.
        logs = [np.log(max(share, 1e-3)) for share in shares.values()]
        mean = float(np.exp(np.mean(logs))) if len(shares) == len(cells) else float("inf")
        row = {"arm": arm, "mean": mean}
        for column in columns:
            pairs = cells.get(column, ())
            row[column] = (
                "-" if pairs is None else f"{shares[column]:.2f} ({len(pairs)})" if pairs else ""
            )
        rows.append(row)
    rows.sort(key=lambda r: r["mean"])
    return [r | {"mean": f"{r['mean']:.2f}" if np.isfinite(r["mean"]) else "-"} for r in rows]


def r_squared(runs: Runs, predictor: str, measure: str = "forgetting") -> float:
    """Of a straight line through log(1 + predictor), over all runs."""
    x = np.log1p([r[predictor] for r in runs])
    y = np.array([r[measure] for r in runs])
    return float(np.corrcoef(x, y)[0, 1] ** 2)


def noise_floor(runs: Runs) -> list[dict]:
    """Per task and seed, the arms that ran twice, and how far apart the two fall."""
    curves = defaultdict(list)
    for run in runs:
        curves[run["task"], run["seed"], run["arm"]].append(run)
    rows = []
    for (task, seed, arm), curve in curves.items():
        again = curves.get((task, seed, TWICE.get(arm, "")))
        if again is None:
            continue
        a, b = (at_score(c, "forgetting", MATCHED[task]) for c in (curve, again))
        if a is not None and b is not None:
            rows.append(
                {"task": task, "seed": int(seed), "arm": arm}
                | {"forgetting": a, "again": b, "apart": abs(a - b)}
            )
    return rows


def noise_share(noise: list[dict]) -> float:
    """The largest difference between an arm and itself again, as a share of what it forgot."""
    return max((x["apart"] / max(x["forgetting"], x["again"]) for x in noise), default=0.0)


def tried(lines: list[dict]) -> list[dict]:
    """What `TRIED` lists, task by task, as far as it has been run."""
    found = {(x["task"], x["arm"]): x for x in lines}
    rows = []
    for task in dict.fromkeys(x["task"] for x in lines):
        for group, arms in ({"": {"loki_q30": "LoKI as the paper has it, 30 %"}} | TRIED).items():
            for arm, what in arms.items():
                if (task, arm) in found:
                    line = found[task, arm]
                    kept = ("retention", "forgetting", "kl_covered", "kl_uncovered")
                    rows.append(
                        {"task": task, "tried": group, "arm": arm, "what": what.replace("|", "\\|")}
                        | {k: line[k] for k in kept}
                    )
    return rows


def targets(lines: list[dict], share: float = 0.0) -> list[dict]:
    """What was aimed at, task by task, and whether the figures show it; missed ones stay in.

    A lead counts only if it is larger than the spread between the seeds of both arms and than
    `share` of the larger figure, the noise; with one seed the spread is not known, and the verdict
    says so.
    """
    rows = []
    for task in dict.fromkeys(line["task"] for line in lines):
        arms = {x["arm"]: x for x in lines if x["task"] == task and x["forgetting"] is not None}
        plain = [a for a in arms if a.startswith("loki") and not PROTECTED.search(a)]
        ours = [a for a in arms if a.startswith("loki") and PROTECTED.search(a)]
        others = [a for a in arms if a not in ours and not a.startswith("lora_replay")]
        without = [a for a in others if a.startswith(("random", "protect", "lora"))]
        without = [a for a in without if "protect" in a or "soft" in a]
        foreign = [a for a in others if not re.search("protect|soft", a) and a not in plain]
        for aim, left, right, part in (
            ("LoKI without protection forgets at most half of LoRA r16", plain,
             ["lora_all_r16"], 0.5),
            ("chosen rows forget less than random rows", ["loki_q30"], ["random_q30"], 1),
            ("the same, both with protected inputs", ["loki_protect_q30"],
             ["random_protect_q30"], 1),
            ("the same, both with soft inputs", ["loki_soft99_q30"], ["random_soft99_q30"], 1),
            ("LoKI with its best protection forgets less than every rival", ours, foreign, 1),
            ("... than protected inputs without chosen rows", ours, without, 1),
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
            theirs = part * them["forgetting"]
            noise = max([*spreads, share * max(theirs, us["forgetting"])])
            lead = theirs - us["forgetting"]
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
