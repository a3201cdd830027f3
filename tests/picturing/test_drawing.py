"""Drawing: what stands where, in which unit, in colours that everybody can tell apart."""

from __future__ import annotations

import re
import subprocess
import sys

import numpy as np
import pytest
from matplotlib.colors import to_rgb

from loki_plugin.picturing.drawing import style
from loki_plugin.picturing.drawing.change import change_figure
from loki_plugin.picturing.drawing.forgetting import forgetting_figure
from loki_plugin.picturing.drawing.rows import density_figure, scores_figure
from loki_plugin.picturing.drawing.stability import stability_figure
from loki_plugin.picturing.drawing.style import to_pixels, to_svg
from loki_plugin.picturing.drawing.tradeoff import tradeoff_figure
from loki_plugin.picturing.drawing.training import training_figure

LEVELS = (0.05, 0.25, 0.5, 0.75, 0.95)


def figures():
    spread = np.array([[-2, -1, 0, 1, 2], [-3, 0, 1, 2, 9]]) * 1e-3
    density = np.array([[0.5, 0.1, 0.0], [0.01, 0.02, 0.3]])
    return {
        "density": density_figure(density, density[::-1], density, 6, 5),
        "scores": scores_figure(spread, np.array([-1e-3, np.nan]), LEVELS),
        "stability": stability_figure([2, 4], density[:, :2], density[0, :2], 0.1, 0.95),
        "training": training_figure([5, 10], [2.0, 1.0], [0.1, 0.2], [0.0, 0.1]),
        "tradeoff": tradeoff_figure(["a", "b"], [30, 90], [99, 40]),
        "way": tradeoff_figure(["a"], [30], [99], way=[(-5, 100), (20, 97)]),
        "forgetting": forgetting_figure([1, 2], [0.0, 0.1], [2.0, np.nan], 0.05),
        "change": change_figure(["x", "y"], [0.5, 0.6], [0.4, 0.6]),
    }


@pytest.mark.parametrize("name", figures())
def test_every_axis_says_what_it_shows(name):
    figure = figures()[name]
    axes = [a for a in figure.axes if a.get_label() != "<colorbar>"]
    assert axes
    assert axes[0].get_ylabel()
    assert name == "change" or all(a.get_xlabel() for a in axes)


def pixel(figure, axis, x, y):
    """The colour at the data coordinates (x, y)."""
    pixels = to_pixels(figure).astype(float) / 255  # also lays the figure out
    column, row = axis.transData.transform((x, y))
    return pixels[pixels.shape[0] - 1 - int(row), int(column)]


def test_a_dense_cell_is_dark_where_it_belongs():
    """Layer 2, rows 12 to 16 of 16: nothing else is."""
    highest = np.full((4, 4), 1e-3)
    highest[2, 3] = 1.0
    figure = density_figure(highest, None, None, 16, 5)
    axis = figure.axes[0]
    assert pixel(figure, axis, 2, 14) == pytest.approx(to_rgb(style.HIGH), abs=0.02)
    for layer, row in ((2, 10), (1, 14), (3, 14), (0, 2)):
        assert pixel(figure, axis, layer, row).min() > 0.9


def test_the_scale_is_logarithmic():
    """Three equal factors of density are three equal steps of shade."""
    density = np.array([[1e-4, 1e-3, 1e-2, 1e-1]])
    figure = density_figure(density, None, None, 4, 5)
    shades = [1 - pixel(figure, figure.axes[0], 0, row + 0.5)[2] for row in range(4)]
    assert np.diff(shades) == pytest.approx([np.diff(shades)[0]] * 3, abs=0.02)
    assert np.diff(shades)[0] > 0.1


def test_a_density_without_a_single_high_row_draws_nothing():
    figure = density_figure(np.zeros((2, 4)), None, None, 4, 5)
    assert pixel(figure, figure.axes[0], 0.2, 2.2).min() > 0.99


def test_nothing_to_draw_is_an_error():
    with pytest.raises(ValueError, match="no density is given"):
        density_figure(None, None, None, 4, 5)


def test_colours_differ_for_readers_who_do_not_see_red_and_green():
    """Viénot, Brettel and Mollon 1999: what protanopes and deuteranopes see, in linear light."""
    blind = {
        "protan": [[0.11238, 0.88762, 0], [0.11238, 0.88762, 0], [0.00401, -0.00401, 1]],
        "deutan": [[0.29275, 0.70725, 0], [0.29275, 0.70725, 0], [-0.02234, 0.02234, 1]],
    }
    colours = np.array([to_rgb(c) for c in (style.LOW, style.HIGH, style.CHOSEN, style.OTHER)])
    for matrix in blind.values():
        seen = (colours**2.2) @ np.array(matrix).T
        seen = seen.clip(0, 1) ** (1 / 2.2)
        distances = np.linalg.norm(seen[:, None] - seen[None], axis=-1)
        assert distances[~np.eye(4, dtype=bool)].min() > 0.1


def test_svg_takes_the_colours_of_its_page_and_nothing_from_outside():
    drawn = figures()
    svgs = {name: to_svg(figure, name) for name, figure in drawn.items()}
    for name, svg in svgs.items():
        assert svg.startswith("<svg") and svg.endswith("</svg>")
        assert "http" not in svg and "<script" not in svg
        assert "currentColor" in svg and style.INK not in svg
        ids = re.findall(r'\bid="([^"]+)"', svg)
        assert all(i.startswith(f"{name}-") for i in ids)
        assert set(re.findall(r'(?:href="#|url\(#)([^")]+)', svg)) <= set(ids)
    assert ">optimizer step</text>" in svgs["training"]


def test_drawing_leaves_pyplot_alone():
    """No window, no global state of somebody else's notebook."""
    code = (
        "import sys\n"
        "from matplotlib import rcParams\n"
        "settings = lambda: [rcParams[k] for k in rcParams if k != 'backend']  # asks pyplot\n"
        "before = settings()\n"
        "from loki_plugin.picturing.drawing import training, style\n"
        "f = training.training_figure([1, 2], [2.0, 1.0], None)\n"
        "style.to_svg(f, 'a'), style.to_png(f), style.to_pixels(f)\n"
        "assert settings() == before\n"
        "print('matplotlib.pyplot' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
