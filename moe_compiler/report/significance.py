"""How much each expert matters: by layer, by dataset, and how much that changes between datasets."""

from __future__ import annotations

from typing import Any

import numpy as np

from moe_compiler.analysis import Analysis
from moe_compiler.report.figure import (
    MARKERS,
    OKABE_ITO,
    Figure,
    Text,
    canvas,
    columns_for,
    evenly,
    finish,
    grid,
    layer_labels,
    layer_map,
    map_height,
    shown_of,
    styled,
)

SHOWN_LAYERS = 4
SHOWN_DATASETS = 8
_MARKED_DATASETS = 7  # the eighth colour is black, that of the baseline


def significance_by_dataset(analysis: Analysis) -> Figure:
    """The expert significance of some layers on each dataset (DynaMo, arXiv 2503.21135v3, figure 3)."""
    paths = evenly(list(analysis.layers), SHOWN_LAYERS)
    label = dict(zip(analysis.layers, layer_labels(list(analysis.layers)), strict=True))
    datasets = analysis.datasets[:_MARKED_DATASETS]
    widest = max(analysis.layers[path].num_experts for path in paths)
    with canvas(min(13, 4.5 + 0.11 * widest), 0.6 + 1.9 * len(paths)) as picture:
        for axes, path in zip(grid(picture, len(paths), 1), paths, strict=True):
            layer = analysis.layers[path]
            experts = np.arange(layer.num_experts)
            values = layer.significance.numpy()
            axes.vlines(experts, values.min(axis=0), values.max(axis=0), color="#bbbbbb", linewidth=2, zorder=1)
            for d, name in enumerate(datasets):
                style: dict[str, Any] = {
                    "color": OKABE_ITO[d],
                    "marker": MARKERS[d],
                    "edgecolors": "#555555",
                    "linewidths": 0.3,
                }
                axes.scatter(experts, values[d], s=18, label=name, zorder=2, **style)
            axes.scatter(experts, layer.baseline.numpy(), s=45, color="black", marker="_", label="baseline X", zorder=3)
            axes.axhline(layer.top_k / layer.num_experts, color="#888888", linewidth=0.8, linestyle=":")
            axes.set_title(f"layer {label[path]}", loc="left")
            axes.set_ylabel("significance")
            axes.set_ylim(-0.02 * float(values.max()), 1.08 * float(values.max()))
            axes.set_xlim(-0.8, layer.num_experts - 0.2)
            styled(axes)
            axes.set_xlabel("expert")
        handles, names = axes.get_legend_handles_labels()
        picture.legend(handles, names, loc="outside upper center", ncols=min(len(names), 5))
        return finish(
            picture,
            Text(
                "significance-by-dataset",
                "Expert significance by dataset",
                "Expert significance S (no unit; a layer's experts sum to k) of DynaMo's equation 1, one marker per "
                "dataset; the grey line spans the datasets, the black dash is the synthesized baseline X of equation "
                "2, the dotted line is even routing, k/E. The form of DynaMo's figure 3."
                + shown_of(len(datasets), len(analysis.datasets), "datasets"),
                f"Dots for the significance of each expert on {', '.join(datasets)}, in layers "
                f"{', '.join(label[path] for path in paths)}.",
            ),
        )


def significance_map(analysis: Analysis) -> Figure:
    """The expert significance of every layer, one map per dataset."""
    paths = list(analysis.layers)
    labels = layer_labels(paths)
    layers = list(analysis.layers.values())
    names = analysis.datasets[:SHOWN_DATASETS]
    relative = [
        [layer.significance[d].numpy() * (layer.num_experts / layer.top_k) for layer in layers]
        for d in range(len(names))
    ]
    high = max(float(row.max()) for rows in relative for row in rows)
    columns = columns_for(len(names))
    with canvas(1 + 3.7 * columns, -(-len(names) // columns) * map_height(len(paths))) as picture:
        axes = grid(picture, len(names), columns)
        for one, name, values in zip(axes, names, relative, strict=True):
            image = layer_map(one, values, labels, title=name, limits=(0, high))
        label = "significance / (k/E)"
        picture.colorbar(image, ax=axes, label=label, location="bottom", shrink=0.7, aspect=60)
        return finish(
            picture,
            Text(
                "significance-map",
                "Expert significance in every layer",
                "Expert significance S (DynaMo's equation 1) of every expert as a multiple of even routing, k/E, one "
                "map per dataset on one scale." + shown_of(len(names), len(analysis.datasets), "datasets"),
                f"Maps of {len(paths)} layers by experts on {', '.join(names)}.",
            ),
        )


def dynamics_map(analysis: Analysis) -> Figure:
    """How much the significance of every expert changes between datasets."""
    paths = list(analysis.layers)
    values = [layer.dynamics.numpy() for layer in analysis.layers.values()]
    with canvas(6.5, map_height(len(paths))) as picture:
        axes = picture.subplots()
        image = layer_map(axes, values, layer_labels(paths), title="dynamics D", cmap="viridis")
        picture.colorbar(image, ax=axes, label="std / mean over datasets", shrink=0.9, aspect=30)
        return finish(
            picture,
            Text(
                "dynamics",
                "Dynamics of every expert",
                "Dynamics D of every expert: the standard deviation of its significance S over the datasets divided "
                "by its mean (no unit; 0: it matters equally everywhere), from the joint distribution of DynaMo's "
                "equation 2.",
                f"A map of {len(paths)} layers by experts.",
            ),
        )
