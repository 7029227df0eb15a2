"""How alike experts are: in their weights, and in the tokens they are given."""

from __future__ import annotations

from typing import Any

import matplotlib
import networkx as nx
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import ListedColormap, Normalize
from matplotlib.ticker import MaxNLocator
from torch import Tensor

from moe_compiler.analysis import Analysis, LayerAnalysis
from moe_compiler.passes.similarity import coactivation_graph, expert_graph
from moe_compiler.report.figure import (
    SEQUENTIAL,
    WIDTH_COLORS,
    Figure,
    Matrix,
    Text,
    canvas,
    evenly,
    finish,
    grid,
    layer_labels,
    layer_ticks,
    styled,
    width_legend,
)

SHOWN_LAYERS = 4
EDGES_PER_EXPERT = 2
_EDGES = "Blues"
_TOKENS = "tokens in common"


def cosine_similarity_map(analysis: Analysis) -> Figure:
    """Cosine similarity between the experts' weights in some layers (MoQa, arXiv 2503.21135v1, figure 5)."""
    label = dict(zip(analysis.layers, layer_labels(list(analysis.layers)), strict=True))
    found = {path: one for path, layer in analysis.layers.items() if (one := _off_diagonal(layer)) is not None}
    paths = evenly(list(found), SHOWN_LAYERS)
    values = {path: found[path] for path in paths}
    low = min(float(np.nanmin(one)) for one in values.values())
    high = max(float(np.nanmax(one)) for one in values.values())
    columns = min(2, len(paths))
    with canvas(1.2 + 3.9 * columns, 0.3 + 3.6 * -(-len(paths) // columns)) as picture:
        axes = grid(picture, len(paths), columns)
        for panel, path in zip(axes, paths, strict=True):
            image = panel.imshow(values[path], cmap=_with_gaps(), vmin=low, vmax=high, interpolation="nearest")
            panel.set_title(f"layer {label[path]}")
            panel.set_xlabel("expert")
            panel.set_ylabel("expert")
        picture.colorbar(image, ax=axes, label="cosine similarity", shrink=0.8, aspect=30)
        return finish(
            picture,
            Text(
                "cosine-similarity",
                "Cosine similarity of the experts' weights",
                "Cosine similarity (from -1 to 1) between the original weights of each pair of experts, all linears "
                "of an expert as one vector; the diagonal, 1 everywhere, is white. MoQa's section 3.3 and figure 5.",
                f"Matrices of experts by experts in layers {', '.join(label[path] for path in paths)}.",
            ),
        )


def similarity_by_layer(analysis: Analysis) -> Figure:
    """The distribution of the pairs' similarity over the layers."""
    layers = list(analysis.layers.values())
    pairs = [_pairs(one) for layer in layers if (one := _off_diagonal(layer)) is not None]
    labels = [
        name
        for name, layer in zip(layer_labels(list(analysis.layers)), layers, strict=True)
        if _off_diagonal(layer) is not None
    ]
    place = np.arange(len(pairs))
    with canvas(7.5, 3.1) as picture:
        axes = picture.subplots()
        for low, high, shade in ((5, 95, "#c6d8e8"), (25, 75, "#7ea6c9")):
            bounds = [[float(np.percentile(one, level)) for one in pairs] for level in (low, high)]
            name = f"{low} to {high} % of the pairs"
            axes.bar(place, np.subtract(bounds[1], bounds[0]), 0.75, bottom=bounds[0], color=shade, label=name)
        axes.plot(place, [float(np.median(one)) for one in pairs], "k_", markersize=8, label="median")
        axes.plot(place, [float(one.max()) for one in pairs], "^", color="#D55E00", markersize=4, label="most alike")
        axes.use_sticky_edges = False
        axes.set_xlabel("layer")
        axes.set_ylabel("cosine similarity")
        layer_ticks(axes.xaxis, labels)
        axes.margins(y=0.08)
        styled(axes)
        picture.legend(loc="outside upper center", ncols=4)
        return finish(
            picture,
            Text(
                "similarity-by-layer",
                "Cosine similarity of experts in every layer",
                "Cosine similarity (from -1 to 1) between the weights of all pairs of different experts of a layer "
                "(MoQa's section 3.3): how the pairs are distributed, and the pair that is most alike.",
                f"Ranges and medians of the pairs' similarity over {len(pairs)} layers.",
            ),
        )


def expert_graphs(analysis: Analysis) -> Figure:
    """Two graphs of one layer's experts: by similarity of their weights and by common tokens (MoQa 3.3)."""
    label = dict(zip(analysis.layers, layer_labels(list(analysis.layers)), strict=True))
    path = next(p for p, x in analysis.layers.items() if x.similarity is not None or x.coactivation is not None)
    layer = analysis.layers[path]
    drawn: list[tuple[str, str, nx.Graph]] = []
    if layer.similarity is not None:
        least = _strongest(layer.similarity, layer.num_experts)
        drawn.append(("weights", "cosine similarity", expert_graph(layer.similarity, least)))
    if layer.coactivation is not None:
        least = max(1.0, _strongest(layer.coactivation, layer.num_experts))
        drawn.append(("routing", _TOKENS, coactivation_graph(layer.coactivation, int(least))))
    with canvas(1 + 5.2 * len(drawn), 5.0) as picture:
        axes = grid(picture, len(drawn), 2)
        for one, (title, unit, graph) in zip(axes, drawn, strict=True):
            one.set_title(f"layer {label[path]}: by {title}")
            edges = _draw(one, graph, layer)
            if edges is not None:
                bar = picture.colorbar(edges, ax=one, label=unit, shrink=0.6, orientation="horizontal", aspect=40)
                bar.ax.xaxis.set_major_locator(MaxNLocator(6, integer=unit == _TOKENS))
        width_legend(picture, sorted(set(_first(layer))))
        return finish(
            picture,
            Text(
                "expert-graphs",
                "Experts as graphs",
                f"The experts of layer {label[path]} on a circle, coloured by width; edges join the pairs of most "
                "similar weights (cosine similarity, MoQa's section 3.3) and those that were most often chosen for "
                f"the same token (tokens of all calibration data), about {EDGES_PER_EXPERT} edges per expert.",
                f"Circles of {layer.num_experts} experts, joined where they are alike.",
            ),
        )


def _draw(axes: Axes, graph: nx.Graph, layer: LayerAnalysis) -> Any:
    """Draws a graph on a circle; returns what a colour bar needs, or `None` where there is no edge."""
    place = nx.circular_layout(graph)
    edges = sorted(graph.edges(data="weight"), key=lambda edge: float(edge[2]))
    size = 6 if layer.num_experts > 40 else 7
    mappable: Any = None
    if edges:
        weights = [float(weight) for _, _, weight in edges]
        pale = ListedColormap(matplotlib.colormaps[_EDGES](np.linspace(0.3, 1, 128)))
        mappable = matplotlib.cm.ScalarMappable(Normalize(min(weights), max(weights)), pale)
        for first, second, weight in edges:
            x, y = zip(place[first], place[second], strict=True)
            axes.plot(x, y, color=mappable.to_rgba(float(weight)), linewidth=1.1, zorder=1)
    for expert, width in enumerate(_first(layer)):
        x, y = place[expert]
        axes.scatter(x, y, s=70, color=WIDTH_COLORS[width], edgecolors="white", linewidth=0.5, zorder=2)
        axes.text(1.09 * x, 1.09 * y, str(expert), ha="center", va="center", fontsize=size)
    axes.set_aspect("equal")
    axes.set_axis_off()
    axes.margins(0.08)
    return mappable


def _first(layer: LayerAnalysis) -> tuple[int, ...]:
    return next(iter(layer.bits.values()))


def _strongest(matrix: Tensor, experts: int) -> float:
    """The weight that about `EDGES_PER_EXPERT` pairs per expert reach."""
    pairs = np.sort(_pairs(matrix.double().numpy()))
    return float(pairs[max(0, len(pairs) - EDGES_PER_EXPERT * experts)]) if len(pairs) else 0.0


def _pairs(matrix: Matrix) -> Matrix:
    """The entries above the diagonal."""
    upper: Matrix = matrix[np.triu_indices(len(matrix), 1)]
    return upper


def _off_diagonal(layer: LayerAnalysis) -> Matrix | None:
    """The similarity with an empty diagonal, where it is known and there are pairs."""
    if layer.similarity is None or layer.num_experts < 2:
        return None
    values: Matrix = layer.similarity.double().numpy().copy()
    np.fill_diagonal(values, np.nan)
    return values


def _with_gaps() -> Any:
    return matplotlib.colormaps[SEQUENTIAL].with_extremes(bad="white")
