"""Knowledge kept against task learned: what a run gave up for what it gained."""

from __future__ import annotations

from collections.abc import Sequence

from matplotlib.figure import Figure

from .style import CHOSEN, HIGH, INK, LOW, OTHER, grid, label, new_figure

_COLOURS = (CHOSEN, HIGH, LOW, OTHER)


def tradeoff_figure(
    names: Sequence[str],
    learned: Sequence[float],
    kept: Sequence[float],
    learned_unit: str = "task learned: training loss removed, %",
    kept_unit: str = "knowledge kept: answers as the base's, %",
    way: Sequence[tuple[float, float]] = (),
) -> Figure:
    """Every model as a point; the base stands at 0 learned, 100 kept, and top right is best.

    Args:
        names: of M tuned models.
        learned, kept: M percentages each.
        way: (learned, kept) of one of them while it trained, from the base on.
    """
    figure, (axis,) = new_figure(2.9)
    axis.plot(0, 100, "s", color=INK, markersize=6, clip_on=False, zorder=3)
    axis.annotate("base", (0, 100), (8, -3), textcoords="offset points", color=INK, fontsize=8.5)
    if way:
        xs, ys = zip((0.0, 100.0), *way, strict=True)
        axis.plot(xs, ys, ":", color=OTHER, lw=1.2, marker=".", markersize=4, clip_on=False)
    for i, (name, x, y) in enumerate(zip(names, learned, kept, strict=True)):
        colour = _COLOURS[i % len(_COLOURS)]
        arrow = {"arrowstyle": "->", "color": colour, "alpha": 0.6, "shrinkB": 5, "lw": 1.2}
        axis.annotate("", (x, y), (0, 100), arrowprops=arrow, annotation_clip=False)
        axis.plot(x, y, "o", color=colour, markersize=8, clip_on=False, zorder=3)
        right = x < 75
        axis.annotate(
            f"{name}: {x:.0f} % learned, {y:.0f} % kept",
            (x, y),
            (9, -3 if y > 5 else 4) if right else (8, -17 if y > 12 else 9),
            textcoords="offset points",
            ha="left" if right else "right",
            color=INK,
            fontsize=8.5,
        )
    axis.set_xlim(min(0.0, *learned, *(x for x, _ in way)), 100)
    axis.set_ylim(0, 105)
    label(axis, learned_unit, kept_unit.replace(": ", ":\n"))
    grid(axis)
    return figure
