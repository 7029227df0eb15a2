"""How unevenly an expert's input channels matter."""

from __future__ import annotations

from typing import Any

import matplotlib
import numpy as np
from matplotlib.colors import Normalize
from matplotlib.ticker import MaxNLocator

from moe_compiler.analysis import QUANTILES, Analysis
from moe_compiler.report.figure import SEQUENTIAL, Figure, Text, canvas, finish, grid, styled

_MIDDLE = QUANTILES.index(0.5)


def channel_significance(analysis: Analysis) -> Figure:
    """Quantiles of the channels' significance in every layer, by linear."""
    layers = list(analysis.layers.values())
    linears = list(layers[0].channel_quantiles)
    scale: Any = matplotlib.cm.ScalarMappable(Normalize(0, max(1, len(layers) - 1)), SEQUENTIAL)
    place = range(len(QUANTILES))
    with canvas(1.4 + 4.2 * len(linears), 3.4) as picture:
        panels = grid(picture, len(linears), len(linears), sharey=True)
        for axes, linear in zip(panels, linears, strict=True):
            for number, layer in enumerate(layers):
                values = layer.channel_quantiles[linear].double().numpy()
                own = values / np.where(values[:, _MIDDLE : _MIDDLE + 1] > 0, values[:, _MIDDLE : _MIDDLE + 1], np.nan)
                if not np.isfinite(own).any():
                    continue
                axes.plot(place, np.nanmedian(own, axis=0), color=scale.to_rgba(number), linewidth=1.3)
            axes.set_yscale("log")
            axes.set_xticks(place, labels=[f"{100 * one:.0f}" for one in QUANTILES])
            axes.set_title(linear)
            axes.set_xlabel("channels that matter less, %")
            axes.set_ylabel("significance / that of the median channel")
            styled(axes, "both")
        bar = picture.colorbar(scale, ax=panels, label="layer (first to last)", aspect=30)
        bar.ax.yaxis.set_major_locator(MaxNLocator(8, integer=True))
        return finish(
            picture,
            Text(
                "channel-significance",
                "Significance of input channels",
                "The significance of an expert's input channels, S = Σ g·|x_c| · ‖W[:, c]‖₂ (DynaMo, section III-A), "
                "in the order of its size and as a multiple of the median channel's; the median over the experts of "
                "each layer, on all calibration data together. How steeply a line ends says how much a pool of few "
                "channels can hold.",
                f"Rising curves for {', '.join(linears)}, one per layer.",
            ),
        )
