"""Forgetting while it trained: KL to the base along the run, and what was learned for it."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from .style import CHOSEN, HIGH, INK, grid, label, new_figure, whole_numbers

_UNIT = "KL to the base, nats per token"


def forgetting_figure(
    steps: Sequence[int],
    divergence: Sequence[float],
    loss: Sequence[float] | None = None,
    limit: float | None = None,
) -> Figure:
    """KL over the steps and, where the loss is known, KL against the loss; the last point is named.

    Args:
        steps: of the evaluations, ascending.
        divergence: KL(base ‖ tuned) at each of them.
        loss: at each of them too; NaN where it is not known.
        limit: the KL at which the training stops.
    """
    losses = np.asarray([np.nan] * len(steps) if loss is None else loss, float)
    known = np.isfinite(losses)
    values = np.asarray(divergence, float)
    figure, axes = new_figure(2.7, 2 if known.any() else 1, sharey=True)
    _way(axes[0], np.asarray(steps), values, HIGH)
    label(axes[0], "optimizer step", _UNIT, "How much was forgotten")
    whole_numbers(axes[0])
    last = f"{values[-1]:.4f} at step {steps[-1]}"
    axes[0].set_title(last, color=INK, fontsize=8.5, loc="right")
    if known.any():
        _way(axes[1], losses[known], values[known], CHOSEN)
        label(axes[1], "evaluation loss", "", "For what was learned")
        axes[1].invert_xaxis()  # learned: to the right, as in time
        at = f"{losses[known][-1]:.4f} at step {np.asarray(steps)[known][-1]}"
        axes[1].set_title(at, color=INK, fontsize=8.5, loc="right")
    highest = max(values.max(), limit or 0)
    for axis in axes:
        if limit is not None:
            axis.axhline(limit, color=INK, ls="--", lw=1)
        axis.set_ylim(0, 1.08 * highest or None)
        grid(axis)
    return figure


def _way(axis: Axes, x: np.ndarray, y: np.ndarray, colour: str) -> None:
    """A line with a dot for each evaluation, and a large one for the last."""
    axis.plot(x, y, color=colour, lw=1.3, marker="o", markersize=3, clip_on=False)
    axis.plot(x[-1:], y[-1:], "o", color=colour, markersize=7, clip_on=False)
