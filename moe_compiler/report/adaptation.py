"""What adapting moved: slots of the pools, the expected error, and how far the routing is between profiles."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch

from moe_compiler.report.figure import (
    DIVERGING,
    Figure,
    Matrix,
    Text,
    canvas,
    columns_for,
    finish,
    grid,
    layer_labels,
    layer_map,
    map_height,
    series_map,
    shown_of,
)
from moe_compiler.runtime.profile import Profile
from moe_compiler.runtime.report import AdaptReport, LinearChange, jensen_shannon

SHOWN_PROFILES = 5


def slots_by_expert(profile: Profile) -> dict[str, Matrix]:
    """By MoE block `(E,)`: the slots of all linears that correct each expert."""
    found: dict[str, Matrix] = {}
    for (path, _), pool in profile.pools.items():
        used = pool.offset.cpu().double().diff().clamp(min=0).numpy()
        found[path] = found[path] + used if path in found else used
    return found


def slots_moved(profiles: Mapping[str, Profile], reference: str) -> Figure:
    """The slots of each expert in one profile, and how many more or fewer the others have.

    Args:
        profiles: by name, the reference among them.
        reference: the profile that others are compared with.
    """
    others = [name for name in profiles if name != reference]
    shown = others[:SHOWN_PROFILES]
    first = slots_by_expert(profiles[reference])
    labels = layer_labels(list(first))
    changes = {
        name: [values - first[path] for path, values in slots_by_expert(profiles[name]).items()] for name in shown
    }
    extreme = max(float(np.abs(rows).max()) for one in changes.values() for rows in one) or 1.0
    columns = columns_for(len(shown) + 1)
    rows = -(-(len(shown) + 1) // columns)
    with canvas(0.5 + 4.1 * columns, rows * (0.3 + map_height(len(first)))) as picture:
        axes = grid(picture, len(shown) + 1, columns)
        image = layer_map(axes[0], list(first.values()), labels, title=f"{reference}: slots")
        picture.colorbar(image, ax=axes[0], label="slots", location="bottom", aspect=40)
        for one, name in zip(axes[1:], shown, strict=True):
            limits = (-extreme, extreme)
            image = layer_map(one, changes[name], labels, title=f"{name}: change", cmap=DIVERGING, limits=limits)
            picture.colorbar(image, ax=one, label="slots more or fewer", location="bottom", aspect=40)
        return finish(
            picture,
            Text(
                "slots-moved",
                "Slots that adapting moved",
                f"Slots of the correction pools by layer and expert, all linears together: as many as the profile "
                f"{reference!r} has, and how many more or fewer each other profile has, on one scale. The pools' "
                "capacity is fixed, so what one expert gains others of its layer lose (DynaMo, section V-A)."
                + shown_of(len(shown), len(others), "other profiles"),
                f"Maps of {len(first)} layers by experts for {reference} and {', '.join(shown)}.",
            ),
        )


def expected_errors(adaptations: Sequence[AdaptReport]) -> Figure:
    """The expected error that adapting left in each layer."""
    labels = layer_labels([layer.path for layer in adaptations[0].layers])
    linears = [change.linear for change in adaptations[0].layers[0].linears]
    names = [f"{report.name} ({report.rule})" for report in adaptations]
    left = errors_left(adaptations)
    with canvas(2.2 + 4.2 * len(linears), 1.6 + 0.32 * len(names)) as picture:
        panels = grid(picture, len(linears), len(linears), sharey=True)
        for number, (axes, linear) in enumerate(zip(panels, linears, strict=True)):
            image = series_map(axes, left[:, :, number], names, labels, title=linear, high=max(100.0, left.max()))
        picture.colorbar(image, ax=panels, label="error left, %")
        return finish(
            picture,
            Text(
                "expected-error",
                "Expected error after adapting",
                "Expected squared error of each linear's output on the new data after adapting, in per cent of that "
                "with the pools' contents before: Σ ‖(W − Ŵ)·x‖² with the second moments of the new data (of the "
                "channels alone for rules that collect no more). More than 100 is a loss.",
                f"Maps of per cent over the layers for {', '.join(names)}.",
            ),
        )


def errors_left(adaptations: Sequence[AdaptReport]) -> Matrix:
    """`(adaptations, layers, linears)`: the expected error after adapting in per cent of that before."""
    layers = [[[_left(change) for change in layer.linears] for layer in report.layers] for report in adaptations]
    return np.array(layers)


def _left(change: LinearChange) -> float:
    return 100 * change.error_after / change.error_before if change.error_before else 100.0


def divergence_matrix(profiles: Mapping[str, Profile]) -> tuple[Matrix, Matrix]:
    """Jensen-Shannon divergence in bits between the routing of profiles.

    Returns:
        `(layers, profiles)`, each profile from the first, and `(profiles, profiles)`, the mean over the layers.
    """
    names = list(profiles)
    paths = list(profiles[names[0]].histograms)
    table = np.zeros((len(paths), len(names), len(names)))
    for row, path in enumerate(paths):
        stacked = torch.stack([profiles[name].histograms[path].double().cpu() for name in names])
        size = len(names)
        pairs = jensen_shannon(
            stacked[:, None].expand(size, size, -1).reshape(size * size, -1), stacked.repeat(size, 1)
        )
        table[row] = pairs.view(size, size).numpy()
    return table[:, 0], table.mean(axis=0)


def routing_divergence(profiles: Mapping[str, Profile]) -> Figure:
    """How far the routing of each profile's data is from that of the others."""
    names = list(profiles)
    by_layer, mean = divergence_matrix(profiles)
    labels = layer_labels(list(profiles[names[0]].histograms))
    size = 2.4 + 0.5 * len(names)
    with canvas(size + 6.4, max(3.2, size)) as picture:
        left, right = picture.subplots(1, 2, width_ratios=[size, 5])
        high = max(float(mean.max()), 1e-9)
        image = left.imshow(mean, cmap="viridis_r", vmin=0, vmax=high)
        left.set_xticks(range(len(names)), labels=names, rotation=30, ha="right")
        left.set_yticks(range(len(names)), labels=names)
        left.set_title("mean over the layers")
        for (row, column), value in np.ndenumerate(mean):
            shade = "white" if value > 0.5 * high else "black"
            left.text(column, row, f"{value:.3f}", ha="center", va="center", color=shade, fontsize=8)
        picture.colorbar(image, ax=left, shrink=0.8, label="bits")
        most, title = max(float(by_layer.max()), 1e-9), f"from {names[0]!r}, by layer"
        others = by_layer[:, 1:].T
        image = series_map(right, others, names[1:], labels, title=title, high=most, cmap="viridis_r")
        picture.colorbar(image, ax=right, shrink=0.8, label="bits")
        return finish(
            picture,
            Text(
                "routing-divergence",
                "Divergence of the profiles' routing",
                "Jensen-Shannon divergence in bits (0: the same, 1: nothing in common; Lin 1991, equation 4.1) "
                "between the shares of tokens that each profile's data send to the experts: between all profiles, "
                "mean over the layers, and of each from the first in every layer. The drift guard compares the "
                "serving histograms with these.",
                f"A {len(names)} by {len(names)} matrix and a map of the profiles over the layers.",
            ),
        )
