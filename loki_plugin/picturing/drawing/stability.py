"""Would other prompts have chosen the same rows? Overlap by prompts, and by layer."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from matplotlib.figure import Figure

from .style import CHOSEN, INK, LOW, grid, label, legend, new_figure, whole_numbers


def stability_figure(
    sizes: Sequence[int],
    overlap: np.ndarray,
    halves: np.ndarray,
    chance: float,
    enough: float,
) -> Figure:
    """Rows in common with the selection from all prompts.

    Args:
        sizes: K ascending numbers of prompts; the last is all of them.
        overlap: [K, G] in [0, 1], mean over resamples, of the G layers (or 1, the whole model).
        halves: [G] in [0, 1], of two disjoint halves of the prompts.
        chance: the overlap of two random selections.
        enough: the overlap that is asked for.
    """
    percent, halves = 100 * np.asarray(overlap, float), 100 * np.asarray(halves, float)
    figure, (left, right) = new_figure(2.9, 2, sharey=True)
    left.plot(sizes, percent, color=LOW, alpha=0.2, linewidth=0.7)
    left.plot(sizes, percent.mean(1), "o-", color=LOW, markersize=4, label="mean of all layers")
    left.set_xscale("log", base=2)
    label(left, "calibration prompts", "rows in common with\nthe whole selection, %")
    left.set_xticks(sizes, [str(n) for n in sizes])
    left.minorticks_off()
    layers = range(percent.shape[1])
    right.bar(layers, percent[-1], color=LOW, alpha=0.7, label=f"{sizes[-1]} prompts")
    right.plot(layers, halves, ".", color=INK, label="two halves")
    label(right, "layer" if len(halves) > 1 else "whole model", "")
    right.set_ylim(0, 105)
    whole_numbers(right)
    for axis in (left, right):
        grid(axis)
        said = axis is left  # one legend for the lines of both
        lines = (
            (enough, CHOSEN, "--", f"enough: {enough:.0%}"),
            (chance, INK, ":", "by chance"),
        )
        for share, colour, style, text in lines:
            axis.axhline(100 * share, color=colour, ls=style, lw=1, label=text if said else "_")
        legend(axis, loc="lower left", ncols=3, bbox_to_anchor=(0, 1), columnspacing=1.0)
    return figure
