"""The plot of an accuracy run: loss against effective bits, on seen and on new domains."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
from accuracy_rows import ORIGINAL, Row

matplotlib.use("Agg")
from matplotlib import pyplot
from matplotlib.ticker import FuncFormatter

OKABE_ITO = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
"""Colours that people with any colour vision can tell apart (Okabe and Ito 2008)."""
_COLOURS = {"quantizers": ("0.25", "0.45", "0.65"), "peers": ("black",)}
_MARKERS = {"quantizers": "osD", "peers": "*Xdp<>h"}
_OTHER_MARKERS = "o^vsPD"
_MOST_BITS = 6.0  # rows that leave most of the weights alone would push the others into a corner
_LINEAR_BELOW = 0.5  # losses below it are drawn to scale, above it on a logarithm
_TICKS = (0, 0.25, 0.5, 1, 2, 5, 10, 20, 50, 100, 200, 500)


@dataclass(frozen=True)
class Series:
    """Rows that belong together, by ascending effective bits.

    Attributes:
        name: as in the legend.
        rows: as compiled.
        adapted: the same after adapting.
    """

    name: str
    rows: tuple[Row, ...]
    adapted: tuple[Row, ...] = ()


def series_of(rows: Sequence[Row], rules: bool = False) -> list[Series]:
    """The rows that differ in bits only, together.

    Args:
        rows: any.
        rules: those of the suite `"rules"`, by rule, over the sizes of the pool; else those of quantizers, allocations
            and peers.
    """
    groups: dict[str, list[Row]] = {}
    for row in rows:
        bits = row.effective_bits
        if row.status == "ok" and row.name != ORIGINAL and row.nll and bits is not None and bits <= _MOST_BITS:
            name = _rule_name(row) if rules else _series_name(row)
            if name:
                groups.setdefault(name, []).append(row)

    def sort(members: list[Row], adapted: bool) -> tuple[Row, ...]:
        chosen = (one for one in members if one.adapted == adapted)
        return tuple(sorted(chosen, key=lambda one: one.effective_bits or 0))

    return [Series(name, sort(members, False), sort(members, True)) for name, members in groups.items()]


def _series_name(row: Row) -> str:
    if row.suite == "allocation":
        return row.name.partition(" @ ")[0].removesuffix(", adapted")
    if row.suite in ("rules", "single"):
        return ""
    return re.sub(r"-\d+$", "", row.name)


def _rule_name(row: Row) -> str:
    if row.suite != "rules":
        return ""
    return row.name.rpartition(", ")[2] if row.adapted else "not adapted" if "lowrank" in row.name else ""


def draw(rows: Sequence[Row], original: Row, path: str | os.PathLike[str], conditions: str = "") -> list[Path]:
    """Draws seen and new domains side by side, with a legend, into an image file; the rules of `adapt` into a second.

    Args:
        rows: all rows.
        original: the original model's row.
        path: a file that ends in `.png`, `.svg` or `.pdf`. The second file has `_rules` before that.
        conditions: a line below the panels.

    Returns:
        The files; there is none for rows that were not measured.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    files = {path: series_of(rows), path.with_stem(f"{path.stem}_rules"): series_of(rows, rules=True)}
    for file, series in files.items():
        if series:
            _draw(series, original, file, conditions)
    return [file for file, series in files.items() if series]


def _draw(series: Sequence[Series], original: Row, path: Path, conditions: str) -> None:
    figure, axes = pyplot.subplots(1, 2, figsize=(11, 5.6), sharey=True, layout="constrained")
    handles: dict[str, Any] = {}
    for one, style in zip(series, _styles(series), strict=True):
        for panel, kind in zip(axes, ("seen", "new"), strict=True):
            later = one.adapted if kind == "new" else ()
            before = {"linestyle": ":", "markerfacecolor": "white"} if later else {"linestyle": "-"}
            lines = [
                _line(panel, one.rows, original, kind, **style, **before),
                _line(panel, later, original, kind, **style, linestyle="-"),
            ]
            for line in lines:
                if line is not None:
                    handles[one.name] = line
    for panel in axes:
        panel.axhline(0, color="0.6", linewidth=0.8)
        panel.set_yscale("symlog", linthresh=_LINEAR_BELOW, linscale=1)
        panel.set_xlabel("effective bits per expert weight")
        panel.grid(alpha=0.3)
    _, high = axes[0].get_ylim()
    low = min(-0.05, *(1.1 * panel.dataLim.ymin for panel in axes))
    axes[0].set_ylim(bottom=low)
    axes[0].set_yticks([tick for tick in _TICKS if low <= tick <= high])
    axes[0].yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes[0].minorticks_off()
    axes[0].set_ylabel("loss: 100 · ln(perplexity / original)")
    axes[0].set_title(f"seen: {', '.join(original.seen)}", fontsize=10)
    note = "\nhollow, dotted: as compiled; filled: adapted" if any(one.rows and one.adapted for one in series) else ""
    axes[1].set_title(f"new: {', '.join(original.new)}{note}", fontsize=10)
    figure.legend(handles.values(), handles.keys(), loc="outside right upper", frameon=False)
    bars = f"bars: 95 % intervals; rows of more than {_MOST_BITS:g} bits are not drawn"
    figure.supxlabel(f"{conditions}\n{bars}".strip(), fontsize=7, wrap=True)
    figure.savefig(path, dpi=150)
    pyplot.close(figure)


def _styles(series: Sequence[Series]) -> list[dict[str, Any]]:
    """Quantizers in grey, peers in black, the others in colours; each with a marker of its own."""
    found, numbers = [], dict.fromkeys((*_COLOURS, ""), 0)
    for one in series:
        suite = (one.rows or one.adapted)[0].suite
        kind = suite if suite in _COLOURS else ""
        colours, markers = _COLOURS.get(kind, OKABE_ITO), _MARKERS.get(kind, _OTHER_MARKERS)
        number = numbers[kind]
        numbers[kind] += 1
        turned = (number + number // len(OKABE_ITO)) % len(markers)
        found.append({"color": colours[number % len(colours)], "marker": markers[turned], "linewidth": 1.2})
    return found


def _line(panel: Any, rows: Sequence[Row], original: Row, kind: str, **style: Any) -> Any:
    points = [(row.effective_bits, found) for row in rows if (found := row.loss(original, kind)) is not None]
    if not points:
        return None
    below = [max(0.0, one.mean - one.low) for _, one in points]
    above = [max(0.0, one.high - one.mean) for _, one in points]
    return panel.errorbar([x for x, _ in points], [one.mean for _, one in points], (below, above), capsize=2, **style)
