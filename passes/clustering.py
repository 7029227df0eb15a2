"""Grouping the experts of a layer by significance: fuzzy c-means and its boundaries (DynaMo).

Symbols: `E` experts, `c` clusters. Values are significances: finite and not negative. Values that differ by
rounding only (`TIE`) are equal, so that a layer whose experts are alike is not split by noise.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Matrix = NDArray[np.float64]

TIE = 1e-12  # values closer than this share of the largest are equal


@dataclass(frozen=True)
class FuzzyClusters:
    """The clusters of one layer's experts (DynaMo, arXiv 2503.21135v3, algorithm 1).

    Attributes:
        values: `(E,)` float64, what was clustered, with ties made exact.
        centers: `(c,)` float64, ascending. Where there are fewer different values than clusters, the clusters
            left over are empty and repeat the largest value.
        memberships: `(E, c)` float64 in [0, 1], each row summing to 1.
        iterations: the updates that were made, 0 where the solution is known beforehand.
        converged: whether the memberships had settled within the tolerance.
    """

    values: Tensor
    centers: Tensor
    memberships: Tensor
    iterations: int
    converged: bool


def merge_ties(values: Tensor) -> Tensor:
    """Make ties exact: values that differ by no more than `TIE` of the largest become the smallest of them.

    Raises:
        ValueError: if the argument is not a non-empty vector of finite, non-negative numbers.
    """
    points = values.double()
    if points.dim() != 1 or points.numel() == 0 or not bool(points.isfinite().all()) or bool((points < 0).any()):
        raise ValueError(
            "`values` must be a non-empty vector of finite, non-negative significances, "
            f"got shape {tuple(values.shape)}"
        )
    ordered, order = points.sort()
    starts = torch.ones_like(ordered, dtype=torch.bool)
    starts[1:] = ordered.diff() > TIE * ordered[-1]
    merged = torch.empty_like(ordered)
    merged[order] = ordered[starts][starts.cumsum(0) - 1]
    return merged


def quantile_centers(values: Tensor, token_share: Tensor, num_clusters: int) -> Tensor:
    """Choose initial cluster centres: quantiles of the values, weighted by each expert's share of the tokens.

    Our decision: DynaMo (IV-A) initialises the memberships from the experts' token shares and gives no
    formula. The centres are the quantiles at `(i + 1/2)/c` of the values under that weight, interpolated, and
    the first memberships follow from them. Where one expert draws so many tokens that two of the quantiles
    coincide (equal centres would never part), the quantiles of the different values, all weighing the same,
    take their place.

    Args:
        values: `(E,)` significances.
        token_share: `(E,)` share or number of tokens routed to each expert; all zero counts as even.
        num_clusters: `c`.

    Returns:
        `(c,)` float64, ascending, all different if there are at least `c` different values; otherwise the
        different values, followed by the largest again.

    Raises:
        ValueError: if the two shapes differ, a share is negative or not finite, or `num_clusters` is not
            positive.
    """
    points = merge_ties(values)
    share = token_share.double()
    if share.shape != points.shape or not bool(share.isfinite().all()) or bool((share < 0).any()):
        raise ValueError(
            f"`token_share` must hold {points.numel()} finite, non-negative shares, one per expert, "
            f"got shape {tuple(token_share.shape)}"
        )
    distinct, group = _checked_groups(points, num_clusters)
    if distinct.numel() <= num_clusters:
        return _repeat_last(distinct, num_clusters)
    mass = torch.zeros_like(distinct).index_add(0, group, share)
    if bool((mass > 0).any()):
        centers = _quantiles(distinct[mass > 0], mass[mass > 0], num_clusters)
        if bool((centers.diff() > TIE * distinct[-1]).all()):
            return centers
    return _quantiles(distinct, torch.ones_like(distinct), num_clusters)


def fuzzy_c_means(
    values: Tensor,
    num_clusters: int = 4,
    fuzzifier: float = 2.0,
    tolerance: float = 1e-6,
    initial_centers: Tensor | None = None,
    max_iterations: int = 1000,
) -> FuzzyClusters:
    """Cluster significances by fuzzy c-means (DynaMo algorithm 1).

    Repeats `v_k = Σ_i u_ik^m·x_i / Σ_i u_ik^m` and `u_ik = 1 / Σ_j (|x_i − v_k| / |x_i − v_j|)^(2/(m−1))`
    until no membership moves by the tolerance. A point that coincides with a centre has membership 1 there
    (the lowest, if it coincides with several). With no more different values than clusters each value is a
    centre: all-equal values give one cluster, the lowest, and the others are empty. The experts' order does
    not matter.

    Args:
        values: `(E,)` significances.
        num_clusters: `c`.
        fuzzifier: `m`, greater than 1; 2 in the paper.
        tolerance: stop when no membership changes by this much.
        initial_centers: `(c,)` different centres to start from; by default `quantile_centers` with even
            shares.
        max_iterations: stop here at the latest; the result then says `converged=False`.

    Returns:
        The clusters, by ascending centre.

    Raises:
        ValueError: if an argument is out of its range.
    """
    points = merge_ties(values)
    distinct, group = _checked_groups(points, num_clusters)
    if not fuzzifier > 1:
        raise ValueError(f"`fuzzifier` must be greater than 1, got {fuzzifier}")
    if not (tolerance > 0 and max_iterations > 0):
        raise ValueError(f"`tolerance` and `max_iterations` must be positive, got {tolerance} and {max_iterations}")
    if distinct.numel() <= num_clusters:
        one_hot = torch.nn.functional.one_hot(group, num_clusters).double()
        return FuzzyClusters(points, _repeat_last(distinct, num_clusters), one_hot, 0, True)
    if initial_centers is None:
        initial_centers = quantile_centers(points, torch.ones_like(points), num_clusters)
    centers = initial_centers.double().sort().values.numpy()
    if centers.shape != (num_clusters,) or not bool((np.diff(centers) > 0).all()):
        raise ValueError(
            f"`initial_centers` must hold {num_clusters} different numbers, got {initial_centers.tolist()}"
        )
    order = points.argsort()
    x = points[order].numpy()[:, None]  # ascending: sums over experts are the same whatever their order
    memberships = _memberships(x, centers, fuzzifier)
    iterations, change = 0, math.inf
    while change >= tolerance and iterations < max_iterations:
        weight = memberships**fuzzifier
        total = weight.sum(axis=0)
        centers = np.where(total > 0, (weight * x).sum(axis=0) / np.where(total > 0, total, 1), centers)
        updated = _memberships(x, centers, fuzzifier)
        change = float(np.abs(updated - memberships).max())
        memberships = updated
        iterations += 1
    rank = np.argsort(centers, kind="stable")
    by_expert = torch.empty(len(points), num_clusters, dtype=torch.float64)
    by_expert[order] = torch.from_numpy(memberships[:, rank])
    return FuzzyClusters(points, torch.from_numpy(centers[rank]), by_expert, iterations, change < tolerance)


def boundary_scores(clusters: FuzzyClusters) -> Tensor:
    """Measure how far each value lies beyond each boundary between neighbouring clusters.

    For the boundary below cluster `j`: between the centres `v_(j−1)` and `v_j` the score is the difference of
    the memberships there, from -1 at the lower to 1 at the upper centre; above `v_j` it is `x / v_j`, below
    `v_(j−1)` it is `−v_(j−1) / x`. One number against which all scores are held therefore moves all
    boundaries monotonically: within (-1, 1) it is the overlap, beyond, it scales the boundaries by a common
    factor. Our decision: the papers have no boundaries that move.

    Returns:
        `(E, c − 1)`, increasing in the value and decreasing in `j`.
    """
    x = clusters.values[:, None]
    low, high = clusters.centers[:-1], clusters.centers[1:]
    between = clusters.memberships[:, 1:] - clusters.memberships[:, :-1]
    below = torch.where(x < low, -(low / x), -1.0)
    return torch.where(x <= low, below, torch.where(x >= high, x / high, between))


def assign_clusters(clusters: FuzzyClusters, overlap: float = 0.2) -> Tensor:
    """Assign each expert to a cluster, *low precision first* (DynaMo IV-A).

    An expert between two centres belongs to the upper one only if its membership there exceeds its membership
    in the lower one by at least `overlap`. Our decision: the paper gives no width of the overlapping region.

    Args:
        clusters: the result of `fuzzy_c_means`.
        overlap: from 0 (the larger membership decides) to 1 (everything between two centres goes to the
            lower).

    Returns:
        `(E,)` int64, from 0 (the lowest centre) to `c − 1`; it never falls as the value rises.

    Raises:
        ValueError: if `overlap` is not in [0, 1].
    """
    if not 0 <= overlap <= 1:
        raise ValueError(f"`overlap` must be in [0, 1], got {overlap}")
    return (boundary_scores(clusters) >= overlap).sum(dim=1)


def _checked_groups(points: Tensor, num_clusters: int) -> tuple[Tensor, Tensor]:
    """Return the different values, ascending, and the index of each point's value among them."""
    if num_clusters < 1:
        raise ValueError(f"`num_clusters` must be at least 1, got {num_clusters}")
    distinct, group = torch.unique(points, sorted=True, return_inverse=True)
    return distinct, group


def _repeat_last(distinct: Tensor, num_clusters: int) -> Tensor:
    return torch.cat([distinct, distinct[-1:].expand(num_clusters - distinct.numel())])


def _quantiles(ordered: Tensor, mass: Tensor, count: int) -> Tensor:
    share = mass / mass.sum()
    position = share.cumsum(0) - share / 2
    levels = (torch.arange(count, dtype=torch.float64) + 0.5) / count
    return torch.from_numpy(np.interp(levels.numpy(), position.numpy(), ordered.numpy()))


def _memberships(x: Matrix, centers: Matrix, fuzzifier: float) -> Matrix:
    """Return the memberships `(E, c)` of the values `(E, 1)` in clusters with the centres `(c,)`."""
    distance = np.abs(x - centers)
    nearest = distance.min(axis=1, keepdims=True)
    exact = distance == 0
    closeness = (nearest / np.where(exact, 1, distance)) ** (2 / (fuzzifier - 1))  # 1 for the nearest centre
    closeness = np.where(nearest == 0, exact & (exact.cumsum(axis=1) == 1), closeness)
    memberships: Matrix = closeness / closeness.sum(axis=1, keepdims=True)
    return memberships
