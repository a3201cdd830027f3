"""Where rows sit, layer by layer: the paper's Figure 2, and the scores themselves."""

from __future__ import annotations

import numpy as np
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure

from .style import (
    CHOSEN,
    HIGH,
    INK,
    LOW,
    colour_bar,
    grid,
    label,
    legend,
    new_figure,
    shades,
    whole_numbers,
)

_DECADES = (0.001, 0.01, 0.1, 1, 10, 100)  # percent


def density_figure(
    highest: np.ndarray | None,
    lowest: np.ndarray | None,
    chosen: np.ndarray | None,
    hidden_size: int,
    share: float,
) -> Figure:
    """Heat maps of layers × rows: where the highest and the lowest scores are, and what trains.

    Args:
        highest, lowest: [L, C] in [0, 1]: over the prompts and the rows of a cell, the mean share
            that is among the `share` percent of the whole model with the highest (lowest) scores;
            None where there are no scores.
        chosen: [L, C'] in [0, 1], the share of the rows of a cell that train; None leaves it out.
        hidden_size: H, rows of a layer.

    Raises:
        ValueError: nothing to draw.
    """
    panels = [
        (highest, HIGH, f"highest {share:g} %: share of prompts", True),
        (lowest, LOW, f"lowest {share:g} %: share of prompts", True),
        (chosen, CHOSEN, "rows that train: share of a cell", False),
    ]
    panels = [p for p in panels if p[0] is not None]
    if not panels:
        raise ValueError("no density is given; nothing to draw")
    figure, axes = new_figure(3.2, len(panels), sharey=True)
    for axis, (density, colour, title, logarithmic) in zip(axes, panels, strict=True):
        percent = 100 * np.asarray(density, float).T  # [C, L], layers from left to right
        norm: LogNorm | None = None
        ticks: list[float] = []
        if logarithmic:
            found = percent[percent > 0]
            high = max(found.max(initial=0), 10 * _DECADES[0])
            low = min(max(found.min(initial=high), _DECADES[0]), high / 10)
            norm = LogNorm(low, high)
            ticks = [t for t in _DECADES if low <= t <= high]
        image = axis.imshow(
            percent,
            cmap=shades(colour),
            norm=norm,
            vmin=None if logarithmic else 0,
            aspect="auto",
            interpolation="nearest",
            extent=(-0.5, percent.shape[1] - 0.5, hidden_size, 0),
        )
        label(axis, "layer", "row" if axis is axes[0] else "", title)
        whole_numbers(axis)
        for spine in axis.spines.values():
            spine.set(visible=True, alpha=0.5)
        colour_bar(figure, image, axis, "%", ticks)
    return figure


def scores_figure(
    quantiles: np.ndarray, chosen: np.ndarray | None, levels: tuple[float, ...]
) -> Figure:
    """Scores per layer: how the rows' mean scores spread, and where those that train lie.

    Args:
        quantiles: [L, 5] of the mean score of a layer's rows (a probability's share), ascending.
        chosen: [L] mean score of the rows that train, NaN for a layer with none; or None.
        levels: the five quantiles' levels, symmetric around 0.5.
    """
    quantiles = np.asarray(quantiles, float)
    layers = np.arange(len(quantiles))
    figure, (axis,) = new_figure(2.9)
    outer = f"{100 * (levels[4] - levels[0]):.0f} % of the rows"
    inner = f"{100 * (levels[3] - levels[1]):.0f} %"
    for low, high, alpha, text in ((0, 4, 0.2, outer), (1, 3, 0.35, inner)):
        height = quantiles[:, high] - quantiles[:, low]
        axis.bar(layers, height, 0.8, quantiles[:, low], color=LOW, alpha=alpha, label=text)
    axis.plot(layers, quantiles[:, 2], "_", color=LOW, markersize=9, label="median")
    if chosen is not None:
        axis.plot(layers, chosen, "o", color=CHOSEN, markersize=4, label="mean of those that train")
    # Layers differ by orders of magnitude; around zero the scale is linear.
    spread = np.abs(quantiles[:, [1, 3]]).mean()
    axis.set_yscale("symlog", linthresh=float(spread) or 1e-12)
    axis.axhline(0, color=INK, linewidth=0.6)
    label(axis, "layer", "mean score of a row\n(share of p, symlog)")
    whole_numbers(axis)
    grid(axis)
    legend(axis, loc="upper left", ncols=4, bbox_to_anchor=(0, 1.14), borderaxespad=0)
    return figure
