"""The joint distribution of expert significance over datasets."""

from __future__ import annotations

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.patches import Ellipse
from matplotlib.ticker import MaxNLocator

from moe_compiler.analysis import Analysis, LayerAnalysis
from moe_compiler.report.figure import (
    DIVERGING,
    OKABE_ITO,
    Figure,
    Matrix,
    Text,
    canvas,
    finish,
    layer_labels,
    series_map,
    shown_of,
)

SHOWN_PAIRS = 4
_SIGMAS = (1, 2)


def joint_distribution(analysis: Analysis) -> Figure:
    """One layer's significance on each pair of datasets, with the fitted Gaussian (DynaMo figure 4)."""
    label = dict(zip(analysis.layers, layer_labels(list(analysis.layers)), strict=True))
    path = min(analysis.layers, key=lambda one: float(analysis.layers[one].correlation.mean()))
    layer = analysis.layers[path]
    names = analysis.datasets[:SHOWN_PAIRS]
    count = len(names)
    with canvas(max(4.2, 0.5 + 2.4 * count), max(3.2, 0.6 + 2.1 * count)) as picture:
        axes = picture.subplots(count, count, squeeze=False)
        for row in range(count):
            for column in range(count):
                one = axes[row, column]
                if row == column:
                    _histogram(one, layer, row)
                else:
                    _pair(one, layer, row, column)
                one.tick_params(labelsize=7)
                one.set_xlabel(f"S on {names[column]}", fontsize=8)
                one.set_ylabel("experts" if row == column else f"S on {names[row]}", fontsize=8)
        handles, words = axes[0, 0].get_legend_handles_labels()
        picture.legend(handles, words, loc="outside upper center", ncols=2)
        return finish(
            picture,
            Text(
                "joint-distribution",
                "Joint distribution of expert significance over datasets",
                f"Expert significance S (no unit) in layer {label[path]}, the layer whose datasets correlate least. "
                "Diagonal: how many experts have which significance on that dataset, and in black the synthesized "
                "baseline X (DynaMo's equation 2). Elsewhere: one dot per expert on a pair of datasets, the ellipses "
                "at 1 and 2 standard deviations of the fitted Gaussian, and its correlation C; experts off the "
                "diagonal line change with the data. The content of DynaMo's figure 4."
                + shown_of(count, len(analysis.datasets), "datasets"),
                f"Histograms and scatter plots of the experts' significance on {', '.join(names)} in layer "
                f"{label[path]}.",
            ),
        )


def dataset_correlation(analysis: Analysis) -> Figure:
    """The correlation between datasets, and the weight that each has in the baseline of each layer."""
    names = list(analysis.datasets)
    labels = layer_labels(list(analysis.layers))
    layers = list(analysis.layers.values())
    mean = torch.stack([layer.correlation for layer in layers]).mean(dim=0).numpy()
    weights = torch.stack([layer.dataset_weights for layer in layers]).numpy()
    size = 2.2 + 0.5 * len(names)
    with canvas(size + 5.2, max(3.2, size)) as picture:
        left, right = picture.subplots(1, 2, width_ratios=[size, 5])
        image = left.imshow(mean, cmap=DIVERGING, vmin=-1, vmax=1)
        left.set_xticks(range(len(names)), labels=names, rotation=30, ha="right")
        left.set_yticks(range(len(names)), labels=names)
        left.set_title("mean correlation C")
        for row in range(len(names)):
            for column in range(len(names)):
                shade = "white" if abs(mean[row, column]) > 0.6 else "black"
                left.text(column, row, f"{mean[row, column]:.2f}", ha="center", va="center", color=shade)
        picture.colorbar(image, ax=left, shrink=0.8, label="correlation")
        high = max(1e-9, float(weights.max()))
        image = series_map(right, weights.T, names, labels, title="dataset weight in the baseline", high=high)
        picture.colorbar(image, ax=right, shrink=0.8, label="weight (a layer's sum to 1)")
        return finish(
            picture,
            Text(
                "dataset-correlation",
                "Correlation between datasets and their weights",
                "Left: correlation C (from -1 to 1) of the experts' significance between datasets, the covariance of "
                "DynaMo's equation 2 normalised, mean over the layers. Right: the weight of each dataset in the "
                "baseline significance X of each layer, in proportion to its correlations with all datasets, where "
                "that sum is positive.",
                f"A {len(names)} by {len(names)} correlation matrix and a map of the datasets' weights over "
                f"{len(layers)} layers.",
            ),
        )


def _histogram(axes: Axes, layer: LayerAnalysis, dataset: int) -> None:
    values, baseline = layer.significance[dataset].numpy(), layer.baseline.numpy()
    high = max(float(values.max()), float(baseline.max()), 1e-9)
    edges = np.linspace(0, high, 13).tolist()
    axes.yaxis.set_major_locator(MaxNLocator(5, integer=True))
    axes.hist(values, bins=edges, color=OKABE_ITO[5], label="S")
    axes.hist(baseline, bins=edges, histtype="step", color="black", label="baseline X")


def _pair(axes: Axes, layer: LayerAnalysis, row: int, column: int) -> None:
    """The experts on two datasets and the Gaussian's ellipses."""
    x, y = layer.significance[column].numpy(), layer.significance[row].numpy()
    high = max(float(x.max()), float(y.max()), 1e-9) * 1.1
    axes.plot([0, high], [0, high], color="#bbbbbb", linewidth=0.8, zorder=1)
    axes.scatter(x, y, s=8, color=OKABE_ITO[0], zorder=2)
    covariance: Matrix = np.cov(np.stack([x, y]), bias=True)
    spread, directions = np.linalg.eigh(covariance)
    angle = float(np.degrees(np.arctan2(directions[1, 1], directions[0, 1])))
    for sigma in _SIGMAS:
        wide, narrow = (2 * sigma * float(np.sqrt(max(spread[i], 0))) for i in (1, 0))
        axes.add_patch(
            Ellipse((float(x.mean()), float(y.mean())), wide, narrow, angle=angle, fill=False, color=OKABE_ITO[4])
        )
    axes.set_xlim(-0.03 * high, high)
    axes.set_ylim(-0.03 * high, high)
    axes.set_title(f"C = {float(layer.correlation[row, column]):.2f}", fontsize=8, pad=2)
