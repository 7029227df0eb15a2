"""The clusters of experts and the widths they got."""

from __future__ import annotations

from typing import Any

import numpy as np
from matplotlib.colors import ListedColormap

from moe_compiler.analysis import Analysis, LayerAnalysis
from moe_compiler.passes.plan import PLAN_WIDTHS
from moe_compiler.report.figure import (
    WIDTH_COLORS,
    Figure,
    Text,
    canvas,
    evenly,
    finish,
    grid,
    layer_labels,
    layer_map,
    map_height,
    styled,
    width_legend,
)

SHOWN_LAYERS = 4


def clusters(analysis: Analysis) -> Figure:
    """The baseline significance of some layers' experts in order, with their widths (DynaMo figure 5)."""
    paths = evenly(list(analysis.layers), SHOWN_LAYERS)
    label = dict(zip(analysis.layers, layer_labels(list(analysis.layers)), strict=True))
    columns = min(2, len(paths))
    with canvas(1 + 4.6 * columns, 0.7 + 2.5 * -(-len(paths) // columns)) as picture:
        for axes, path in zip(grid(picture, len(paths), columns), paths, strict=True):
            layer = analysis.layers[path]
            order = np.argsort(layer.baseline.numpy(), kind="stable")
            values = layer.baseline.numpy()[order]
            place = np.arange(len(order))
            axes.vlines(place, 0, values, color="#dddddd", linewidth=1, zorder=1)
            high = 1.12 * float(values.max())
            different = list(dict.fromkeys(layer.bits.values()))
            markers = [("o", 0.0)] if len(different) == 1 else [("^", 0.022), ("v", -0.022)]
            for widths, (marker, shift) in zip(different, markers, strict=True):
                colors = [WIDTH_COLORS[widths[expert]] for expert in order]
                style: dict[str, Any] = {"s": 30, "zorder": 2, "edgecolors": "#666666", "linewidths": 0.3}
                axes.scatter(place, values + shift * high, c=colors, marker=marker, **style)
            for center in layer.centers or ():
                axes.axhline(center, color="#888888", linewidth=0.8, linestyle="--", zorder=0)
            axes.set_title(f"layer {label[path]}", loc="left")
            axes.set_xlabel("experts by baseline X")
            axes.set_ylabel("baseline X")
            axes.set_ylim(-0.04 * high, high)
            axes.set_xlim(-0.8, layer.num_experts - 0.2)
            styled(axes)
        width_legend(picture, _widths(analysis))
        with_centers = any(layer.centers for layer in analysis.layers.values())
        two = any(len(set(layer.bits.values())) > 1 for layer in analysis.layers.values())
        return finish(
            picture,
            Text(
                "clusters",
                "Clusters of experts and their widths",
                "Experts in the order of their synthesized baseline significance X (no unit; DynaMo's equation 2), "
                f"coloured by the code width that the strategy '{analysis.strategy}' gave them"
                + (" (triangles up and down: the first and the second linear)" if two else "")
                + ". "
                + ("Dashed: the centres of the fuzzy clusters (DynaMo's algorithm 1). " if with_centers else "")
                + "The form of DynaMo's figure 5.",
                f"Experts sorted by significance and coloured by width in layers "
                f"{', '.join(label[path] for path in paths)}.",
            ),
        )


def width_map(analysis: Analysis) -> Figure:
    """The width of every expert of every layer, and how many have each."""
    paths = list(analysis.layers)
    layers = list(analysis.layers.values())
    groups = _panels(layers)
    widths = _widths(analysis)
    rank = {width: float(i) for i, width in enumerate(widths)}
    colors = ListedColormap([WIDTH_COLORS[width] for width in widths])
    with canvas(2.6 + 4.2 * len(groups), 0.4 + map_height(len(paths))) as picture:
        *maps, shares = picture.subplots(1, len(groups) + 1, width_ratios=[4] * len(groups) + [1.6])
        for axes, (title, linear) in zip(maps, groups, strict=True):
            values = [np.array([rank[width] for width in _bits(layer, linear)]) for layer in layers]
            limits = (-0.5, len(widths) - 0.5)
            layer_map(axes, values, layer_labels(paths), title=title, cmap=colors, limits=limits)
        count = {width: sum(bits.count(width) for x in layers for bits in x.bits.values()) for width in widths}
        total = sum(count.values())
        bars = shares.barh(
            [f"INT{width}" for width in widths],
            [100 * count[width] / total for width in widths],
            height=0.5,
            color=[WIDTH_COLORS[width] for width in widths],
        )
        shares.bar_label(bars, fmt="%.0f %%", padding=2)
        shares.set_xlim(0, 135 * max(count.values()) / total)
        shares.set_xlabel("% of expert linears")
        shares.set_title("share")
        return finish(
            picture,
            Text(
                "widths",
                "Width of every expert",
                "Code width (bits per weight, scales and pool not counted) of every expert of every layer, and the "
                "share of the expert linears at each width (as many for each expert).",
                f"A map of {len(paths)} layers by experts in {len(widths)} colours, one per width.",
            ),
        )


def _panels(layers: list[LayerAnalysis]) -> list[tuple[str, int]]:
    """What maps to draw: one for all linears where they have the same widths, else one per linear."""
    if all(len(set(layer.bits.values())) == 1 for layer in layers):
        return [("all linears", 0)]
    return [(name, i) for i, name in enumerate(layers[0].bits)]


def _bits(layer: LayerAnalysis, linear: int) -> tuple[int, ...]:
    return list(layer.bits.values())[linear]


def _widths(analysis: Analysis) -> list[int]:
    """The widths that occur, ascending."""
    found = {width for layer in analysis.layers.values() for bits in layer.bits.values() for width in bits}
    return [width for width in PLAN_WIDTHS if width in found]
