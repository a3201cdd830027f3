"""How every picture looks, and how it leaves: as a PNG, or as SVG that follows the page's theme.

The colours are those of Okabe and Ito, which colour-blind readers can tell apart.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from io import BytesIO, StringIO
from os import PathLike
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import Colormap, LinearSegmentedColormap, to_rgb
from matplotlib.figure import Figure  # not pyplot: no window, no global state
from matplotlib.ticker import MaxNLocator

INK, PAPER = "#2b3038", "#ffffff"
LOW, HIGH, CHOSEN, OTHER = "#0072b2", "#d55e00", "#009e73", "#cc79a7"
# In a page these colours are the page's own, so that they change with light and dark.
_THEMED = {
    INK: "currentColor",
    LOW: "var(--low)",
    HIGH: "var(--high)",
    CHOSEN: "var(--chosen)",
    OTHER: "var(--other)",
}
DPI = 120
_WIDTH = 8.6  # inches
_SMALL = 8


def new_figure(height: float, columns: int = 1, **subplots) -> tuple[Figure, list[Axes]]:
    """A figure of the common width and `height` inches, with a row of `columns` axes."""
    figure = Figure(figsize=(_WIDTH, height), layout="constrained", facecolor="none")
    axes = list(figure.subplots(1, columns, squeeze=False, **subplots)[0])
    for axis in axes:
        axis.set_facecolor("none")
        axis.tick_params(colors=INK, labelsize=_SMALL, width=0.6, length=3)
        for side, spine in axis.spines.items():
            spine.set(color=INK, linewidth=0.6, visible=side in ("left", "bottom"))
    return figure, axes


def label(axis: Axes, x: str, y: str, title: str = "") -> None:
    """Axis titles, units included."""
    axis.set_xlabel(x, color=INK, fontsize=_SMALL + 0.5)
    axis.set_ylabel(y, color=INK, fontsize=_SMALL + 0.5)
    if title:
        axis.set_title(title, color=INK, fontsize=9.5, loc="left")


def grid(axis: Axes) -> None:
    """Faint horizontal lines behind everything."""
    axis.grid(axis="y", color=INK, alpha=0.15, linewidth=0.6)
    axis.set_axisbelow(True)


def legend(axis: Axes, **where) -> None:
    axis.legend(fontsize=_SMALL, frameon=False, labelcolor=INK, **where)


def whole_numbers(axis: Axes) -> None:
    """Ticks of x at whole numbers only: layers, steps."""
    axis.xaxis.set_major_locator(MaxNLocator("auto", integer=True))


def shades(colour: str) -> Colormap:
    """From nothing to `colour`: transparent, so that it reads on light and on dark paper."""
    rgb = to_rgb(colour)
    shaded = LinearSegmentedColormap.from_list(colour, [(*rgb, 0.06), (*rgb, 1.0)])
    return shaded.with_extremes(bad=(*rgb, 0.0), under=(*rgb, 0.0))


def colour_bar(figure: Figure, image, axis: Axes, text: str, ticks: Iterable[float] = ()):
    """A bar beside `axis` that says what the shades of `image` mean; `text` is the unit."""
    bar = figure.colorbar(image, ax=axis, pad=0.03, fraction=0.05, aspect=24)
    if bar.solids is not None:
        bar.solids.set_rasterized(True)  # else one path for each of its 256 shades
    bar.outline.set_visible(False)
    bar.ax.set_facecolor("none")
    bar.ax.tick_params(colors=INK, labelsize=_SMALL - 1, width=0.6, length=2, which="both")
    bar.ax.set_title(text, color=INK, fontsize=_SMALL, pad=5)
    if ticks := list(ticks):
        bar.set_ticks(ticks, labels=[f"{t:g}" for t in ticks], minor=False)
        bar.ax.minorticks_off()
    return bar


def to_png(figure: Figure, path: str | Path | None = None, dpi: int = DPI) -> bytes:
    """The figure on white paper, as the bytes of a PNG, which are also written to `path`."""
    buffer = BytesIO()
    figure.savefig(buffer, format="png", dpi=dpi, facecolor=PAPER)
    content = buffer.getvalue()
    if path is not None:
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    return content


def check_format(path: str | PathLike) -> None:
    """Check, before hours of work, that a picture can be written in the format of its ending.

    Raises:
        ValueError: it cannot.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    known = sorted(FigureCanvasAgg.get_supported_filetypes())
    if Path(path).suffix.removeprefix(".").lower() not in known:
        raise ValueError(f"'{path}' must end in a format of pictures: {', '.join(known)}")


def save(figure: Figure, path: str | PathLike) -> Path:
    """Write the figure on white paper; the file's ending names its format."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=DPI, facecolor=PAPER)
    return path


def to_pixels(figure: Figure) -> np.ndarray:
    """The figure on white paper, [height, width, 3] uint8."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    paper, figure_paper = PAPER, figure.get_facecolor()
    figure.set_facecolor(paper)
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    pixels = np.asarray(canvas.buffer_rgba())[..., :3].copy()
    figure.set_facecolor(figure_paper)
    return pixels


def svg_file(figure: Figure, name: str) -> str:
    """The figure on white paper as the text of an SVG file, the same for the same figure.

    Args:
        name: ids are made of it.
    """
    return _svg(figure, name, PAPER)


def _svg(figure: Figure, name: str, paper: str) -> str:
    buffer = StringIO()
    # The only way to set these two.
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": name}):
        figure.savefig(buffer, format="svg", facecolor=paper, metadata={"Date": None})
    return buffer.getvalue()


def to_svg(figure: Figure, name: str) -> str:
    """An `<svg>` element to stand inside a page: its text is text, its ink the page's.

    Args:
        name: prefixed to every id, which must be one of its kind in a page.
    """
    svg = _svg(figure, name, "none")
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    # Inside HTML the namespaces go without saying.
    svg = re.sub(r'\s+xmlns(:\w+)?="[^"]*"', "", svg)
    svg = re.sub(r'(<svg[^>]*?)\s+width="[^"]*"', r"\1", svg, count=1)
    svg = re.sub(r'(<svg[^>]*?)\s+height="[^"]*"', r"\1", svg, count=1)
    svg = re.sub(r"\bid=\"", f'id="{name}-', svg)
    svg = re.sub(r"url\(#", f"url(#{name}-", svg)
    svg = re.sub(r'href="#', f'href="#{name}-', svg)
    svg = re.sub(r"font: ([\d.]+)px [^;\"]*", r"font-size: \1px", svg)
    for colour, themed in _THEMED.items():
        svg = svg.replace(colour, themed)
    return svg.strip()
