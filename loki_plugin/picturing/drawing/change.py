"""Scores before and after, task by task."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from matplotlib.figure import Figure

from .style import CHOSEN, INK, grid, label, legend, new_figure


def change_figure(
    names: Sequence[str], before: Sequence[float], after: Sequence[float], title: str = ""
) -> Figure:
    """Two bars for each of M tasks.

    Args:
        names: of the tasks.
        before, after: M scores each, of the base and of the tuned model.
    """
    figure, (axis,) = new_figure(3.2)
    places = np.arange(len(names))
    for shift, text, values, colour in (
        (-0.19, "base", before, INK),
        (0.19, "tuned", after, CHOSEN),
    ):
        axis.bar(places + shift, values, 0.36, label=text, color=colour, alpha=0.8)
    axis.set_xticks(places, names, rotation=30 if len(names) > 5 else 0)
    axis.set_xlim(-0.8, max(3, len(names)) - 0.2)
    label(axis, "", "score", title)
    grid(axis)
    legend(axis, loc="upper right")
    return figure
