"""Forgetting along the runs against what was learned, a panel for each base and task."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from benchmarks.real.matching import CHOSEN_BY, Row, at, curves, goals

# Arms with a colour; all others are thin and grey.
SHOWN = {
    "lora_all_r16": ("LoRA r16, all linears", "black"),
    "full": ("full fine-tuning", "tab:brown"),
    "loki_q30": ("LoKI as in the paper, 30 % of the rows", "tab:blue"),
    "lora_replay5": ("LoRA + 5 % real data", "tab:orange"),
    "lora_selfreplay50": ("LoRA + 50 % own text", "tab:pink"),
    "lora_null_frozen": ("LoRA-Null, A frozen", "tab:purple"),
    "auto_gain_frozen": ("all linears, `protect: auto`", "tab:red"),
    "auto_q10": ("10 % of the rows, `protect: auto`", "tab:green"),
}
_LEARNED = {
    "task_loss": "held-out loss of the new task (learned: to the right)",
    "task_score": "answers exactly right in the new task (learned: to the right)",
}
_PER_LINE, _FLOOR = 3, 1e-4


def plot(rows: list[Row], path: Path) -> None:
    """A line per arm, along the run of its best rate (seed 0); dotted: where arms are compared."""
    draw(rows, path, "task_loss")


def draw(
    rows: list[Row],
    path: Path,
    axis_of: str,
    titles: Mapping[tuple[str, str], str] | None = None,
    others: str = "all other arms",
) -> None:
    """The same against `task_loss` or `task_score`, of all (base, task) or of those with titles."""
    from matplotlib.figure import Figure

    titles = titles or {(r["base"], r["task"]): f"{r['base']}: {r['task']}" for r in rows}
    panels = list(titles)
    lines, width = -(-len(panels) // _PER_LINE), min(len(panels), _PER_LINE)
    figure = Figure(figsize=(4.8 * width + 1, 4.2 * lines + 1.2), layout="constrained")
    axes = figure.subplots(lines, width, squeeze=False).flatten()
    handles: dict = {}
    every = curves(rows)
    for axis, (base, task) in zip(axes, panels, strict=False):
        runs = {k[2:]: c for k, c in every.items() if k[:2] == (base, task) and k[3] == 0}
        for arm in sorted(dict.fromkeys(k[0] for k in runs), key=lambda a: a in SHOWN):
            mine = [c for k, c in runs.items() if k[0] == arm]
            goal = goals(task, axis_of)
            best = min(mine, key=lambda c: _forgot(c, axis_of, goal))[1:]
            name, colour = SHOWN.get(arm, (others, "0.8"))
            strong = arm in SHOWN
            (line,) = axis.plot(
                [r[axis_of] for r in best],
                [max(r[CHOSEN_BY], _FLOOR) for r in best],
                color=colour,
                marker="o" if strong else ".",
                markersize=4 if strong else 2,
                linewidth=2 if strong else 0.8,
            )
            handles.setdefault(name.replace("`", ""), line)
        if (goal := goals(task, axis_of)) is not None:
            axis.axvline(goal, color="0.6", linestyle=":", linewidth=1)
        axis.set(
            xlabel=_LEARNED[axis_of],
            ylabel="forgetting: KL to the base on dialogues",
            title=titles[base, task],
            yscale="log",
        )
        if axis_of == "task_loss":
            axis.invert_xaxis()
    for axis in axes[len(panels) :]:
        axis.set_axis_off()
    names = [n for n, _ in SHOWN.values() if n in handles]
    names += [n for n in handles if n not in names]
    figure.legend(
        [handles[n] for n in names], names, loc="outside lower center", ncols=3, frameon=False
    )
    figure.savefig(path, dpi=120)


def _forgot(curve: list[Row], axis_of: str, goal: float | None) -> float:
    found = at(curve, axis_of, goal) if goal is not None else None
    return float("inf") if found is None else found[CHOSEN_BY]
