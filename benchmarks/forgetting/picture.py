"""Task score against forgetting, a panel for each base and task."""

from __future__ import annotations

from pathlib import Path

from benchmarks.forgetting.matching import MATCHED, Runs, at_score

# Arms with a colour; all others are thin and grey.
SHOWN = {
    "lora_all_r16": ("LoRA r16, all linears", "black"),
    "full": ("full fine-tuning", "tab:gray"),
    "freeze_bottom": ("lower layers frozen", "tab:olive"),
    "osf": ("OSF", "tab:brown"),
    "lora_anchor": ("LoRA r16 + anchor", "tab:purple"),
    "lora_soft99": ("LoRA r16, soft inputs", "tab:pink"),
    "lora_written_anchor": ("LoRA r16 + anchor on its own text", "indigo"),
    "random_q30": ("random rows, 30 %", "tab:cyan"),
    "loki_q30": ("LoKI, 30 %", "tab:blue"),
    "loki_soft99_q30": ("LoKI, 30 %, soft inputs", "tab:green"),
    "loki_soft99_q90": ("LoKI, 90 %, soft inputs", "tab:red"),
    "loki_written_anchor_q90": ("LoKI, 90 % + anchor on its own text", "gold"),
    "loki_soft99_written_anchor_q90": ("the same, soft inputs", "tab:orange"),
}
_PER_LINE = 3


def plot(columns: dict[str, Runs], path: Path) -> None:
    """One line per arm through its learning rates, seed 0; the dotted line is the matched score.

    Points far above those at the score are outside.

    Args:
        columns: runs of one base and task each, by title.
    """
    from matplotlib.figure import Figure

    lines = -(-len(columns) // _PER_LINE)
    width = min(len(columns), _PER_LINE)
    figure = Figure(figsize=(4.6 * width, 3.9 * lines + 0.9), layout="constrained")
    axes = figure.subplots(lines, width, squeeze=False).flatten()
    handles = {}
    for axis, (title, runs) in zip(axes, columns.items(), strict=False):
        drawn, curves = dict.fromkeys(r["arm"] for r in runs), []
        for arm in sorted(drawn, key=lambda a: a in SHOWN):  # the coloured ones on top
            curve = [r for r in runs if r["arm"] == arm and r["seed"] == 0]
            curve.sort(key=lambda r: r["lr"])
            curves.append(curve)
            name, colour = SHOWN.get(arm, ("all other arms", "0.85"))
            strong = arm in SHOWN
            (line,) = axis.plot(
                [r["task_score"] for r in curve],
                [r["forgetting"] for r in curve],
                color=colour,
                linestyle="-" if "loki" in arm else "--",
                marker="o" if strong else ".",
                markersize=4 if strong else 2,
                linewidth=1.6 if strong else 0.7,
            )
            handles.setdefault(name, line)
        axis.axvline(MATCHED[runs[0]["task"]], color="0.6", linestyle=":", linewidth=1)
        axis.set(xlabel="task score", ylabel="forgetting", title=title)
        if all(r["forgetting"] > 0 for r in runs):
            axis.set_yscale("log")
        else:
            axis.set_yscale("symlog", linthresh=0.01)
        reached = [at_score(c, "forgetting", MATCHED[runs[0]["task"]]) for c in curves]
        if any(reached):  # rates far beyond the score would press all else together
            axis.set_ylim(top=3 * max(filter(None, reached)))
    for axis in axes[len(columns) :]:
        axis.set_axis_off()
    names = [n for n, _ in SHOWN.values() if n in handles]
    names += [n for n in handles if n not in names]
    figure.legend(
        [handles[n] for n in names], names, loc="outside lower center", ncols=4, frameon=False
    )
    figure.savefig(path, dpi=110)
