"""What all figures of a report share: colours that colour-blind readers can tell apart, sizes, labels and PNG."""

from __future__ import annotations

import io
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import Colormap, to_hex
from matplotlib.figure import Figure as Canvas
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray

Matrix = NDArray[np.float64]

OKABE_ITO = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#D55E00", "#56B4E9", "#F0E442", "#000000")
"""Okabe and Ito (2008), "Color Universal Design": eight colours for categories."""
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
SEQUENTIAL = "cividis"
DIVERGING = "PuOr"
WIDTH_COLORS = {
    bits: to_hex(matplotlib.colormaps["viridis"](place))
    for bits, place in {2: 0.05, 3: 0.28, 4: 0.5, 6: 0.75, 8: 0.98}.items()
}
"""The colour of each code width, dark for narrow."""

DOTS_PER_INCH = 120
_STYLE: Any = {
    "font.size": 9,
    "axes.titlesize": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "legend.frameon": False,
    "figure.dpi": DOTS_PER_INCH,
    "savefig.dpi": DOTS_PER_INCH,
}


@dataclass(frozen=True)
class Figure:
    """One figure of a report.

    Attributes:
        name: the name of its file without the suffix.
        title: what heads it.
        caption: what it shows, in which units, from which equation.
        alt: what a reader who cannot see it is told.
        png: the picture.
    """

    name: str
    title: str
    caption: str
    alt: str
    png: bytes


class Text(NamedTuple):
    """The words of a figure; see `Figure`."""

    name: str
    title: str
    caption: str
    alt: str


@contextmanager
def canvas(width: float, height: float) -> Iterator[Canvas]:
    """An empty picture of a size in inches, on which everything is drawn in the report's style."""
    with matplotlib.rc_context(_STYLE):
        yield Canvas(figsize=(width, height), layout="constrained")


def finish(picture: Canvas, text: Text) -> Figure:
    """Draws the picture; to be called inside its `canvas`."""
    data = io.BytesIO()
    picture.savefig(data, format="png", metadata={"Software": None})
    return Figure(*text, data.getvalue())


def grid(picture: Canvas, panels: int, columns: int, *, sharex: bool = False, sharey: bool = False) -> list[Axes]:
    """So many axes in rows of at most `columns`; places left over stay empty."""
    columns = min(columns, panels)
    rows = -(-panels // columns)
    axes = picture.subplots(rows, columns, squeeze=False, sharex=sharex, sharey=sharey).ravel()
    for unused in axes[panels:]:
        unused.set_axis_off()
    return list(axes[:panels])


def layer_labels(paths: Sequence[str]) -> list[str]:
    """Short names of MoE blocks: the layer's number in the path where that is different for each, else the position."""
    numbers = [re.findall(r"\d+", path) for path in paths]
    first = [found[0] if found else "" for found in numbers]
    return first if len(set(first)) == len(first) and all(first) else [str(i) for i in range(len(paths))]


def evenly(items: Sequence[str], count: int) -> list[str]:
    """At most `count` of the items, the first and the last among them, evenly spaced."""
    if len(items) <= count:
        return list(items)
    return [items[round(i * (len(items) - 1) / (count - 1))] for i in range(count)]


def layer_map(
    axes: Axes,
    values: Sequence[Matrix],
    labels: Sequence[str],
    *,
    title: str,
    cmap: str | Colormap = SEQUENTIAL,
    limits: tuple[float, float] | None = None,
) -> Any:
    """Draws one number per layer and expert as a map, layers from top to bottom, and returns the image.

    Args:
        axes: where to draw.
        values: by layer `(E,)`; layers with fewer experts than others leave cells empty.
        labels: the layers' names.
        title: above the map.
        cmap: the colour map.
        limits: the values at its ends; those of the data if `None`.
    """
    width = max(len(row) for row in values)
    matrix = np.full((len(values), width), np.nan)
    for i, row in enumerate(values):
        matrix[i, : len(row)] = row
    low, high = limits or (float(np.nanmin(matrix)), float(np.nanmax(matrix)))
    image = axes.imshow(matrix, aspect="auto", cmap=cmap, vmin=low, vmax=high, interpolation="nearest")
    axes.set_title(title)
    axes.set_xlabel("expert")
    axes.xaxis.set_major_locator(MaxNLocator(9, integer=True, steps=[1, 2, 4, 8, 10]))
    layer_ticks(axes.yaxis, labels)
    axes.set_ylabel("layer")
    return image


def series_map(
    axes: Axes,
    values: Matrix,
    names: Sequence[str],
    labels: Sequence[str],
    *,
    title: str,
    high: float,
    cmap: str = SEQUENTIAL,
) -> Any:
    """Draws one number per name and layer as a map, layers from left to right, and returns the image.

    Args:
        axes: where to draw.
        values: `(names, layers)`, not negative.
        names: of the rows.
        labels: the layers' names.
        title: above the map.
        high: the value at the end of the colours, which begin at 0.
        cmap: the colour map.
    """
    image = axes.imshow(values, aspect="auto", cmap=cmap, vmin=0, vmax=high, interpolation="nearest")
    axes.set_yticks(range(len(names)), labels=list(names))
    axes.set_title(title)
    axes.set_xlabel("layer")
    layer_ticks(axes.xaxis, labels)
    return image


def shown_of(shown: int, known: int, what: str) -> str:
    """A sentence for a caption, where not all is drawn."""
    return f" Drawn are {shown} of {known} {what}." if shown < known else ""


def layer_ticks(axis: Any, labels: Sequence[str], most: int = 17) -> None:
    """Names of layers at the positions 0, 1, ... of an axis, at most so many of them."""
    step = -(-len(labels) // most)
    axis.set_ticks(range(0, len(labels), step), labels=list(labels[::step]))


def map_height(layers: int) -> float:
    """The height in inches of a map of so many layers."""
    return 1.5 + min(4.4, 0.16 * layers + 0.5)


def columns_for(panels: int) -> int:
    """In how many columns to put maps: at most three, so that few places are left over."""
    return 2 if panels in (2, 4) else min(3, panels)


def width_legend(picture: Canvas, widths: Sequence[int]) -> None:
    """Says above the picture which colour is which width."""
    handles = [Patch(color=WIDTH_COLORS[width], label=f"INT{width}") for width in widths]
    picture.legend(handles=handles, loc="outside upper center", ncols=len(widths))


def styled(axes: Axes, axis: Literal["x", "y", "both"] = "y") -> None:
    """A light grid behind the data."""
    axes.grid(True, axis=axis, color="#dddddd", linewidth=0.6)
