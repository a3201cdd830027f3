"""The training: its loss, and how far the rows moved."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from matplotlib.figure import Figure

from .style import CHOSEN, HIGH, OTHER, grid, label, new_figure, whole_numbers


def training_figure(
    steps: Sequence[int],
    loss: Sequence[float] | np.ndarray,
    norms: Sequence[float] | np.ndarray | None,
    divergence: Sequence[float] | np.ndarray | None = None,
) -> Figure:
    """Loss, update norm and KL to the base over the optimizer steps, beside each other.

    Args:
        steps: of the logged values, ascending.
        loss: at those steps, in nats per token.
        norms: ‖ΔW‖ over all trained rows (Frobenius) at those steps; None where not recorded.
        divergence: KL(base ‖ tuned) of the anchor's prompts, in nats per token; None without one.
    """
    panels = [(loss, HIGH, "training loss, nats per token", "Loss")]
    if norms is not None:
        panels.append((norms, CHOSEN, "‖ΔW‖ of all trained rows", "How far the rows moved"))
    if divergence is not None:
        panels.append((divergence, OTHER, "KL to the base, nats", "Anchor prompts"))
    figure, axes = new_figure(2.7, len(panels))
    marker = "o" if len(steps) < 40 else ""
    for axis, (values, colour, unit, title) in zip(axes, panels, strict=True):
        numbers = np.asarray(values, float)
        axis.plot(steps, numbers, color=colour, linewidth=1.3, marker=marker, markersize=3)
        label(axis, "optimizer step", unit, title)
        finite = numbers[np.isfinite(numbers)]
        if finite.size and finite.min() >= 0:
            axis.set_ylim(0, 1.06 * finite.max() or None)
        whole_numbers(axis)
        grid(axis)
    return figure
