"""Raising the experts of one layer through the widths until a target is met, the most significant first."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

SLACK = 1e-9  # bits per weight that rounding may add to a target


def fill_levels(values: Tensor, scores: Tensor, widths: Sequence[int], mean_bits: float) -> Tensor:
    """Choose a level for every expert, as high as the target allows, monotone in the values.

    Each expert starts at level 0. The steps "expert `e` from level `j − 1` to `j`" are taken by descending
    score, as long as the mean width stays at most `mean_bits`. Experts of equal value move together, so that
    the result does not depend on their order; a group too large for what is left is passed over, and groups
    above it may still rise.

    With the scores of `boundary_scores` this moves all boundaries between clusters by one number: overlap
    first, then a common factor. Our decision: DynaMo (arXiv 2503.21135v3) has no target, its average falls
    out of the clustering.

    Args:
        values: `(E,)`, ties made exact. A higher value never gets a lower level.
        scores: `(E, c − 1)`, for each expert and level from 1 on; not falling as the value rises, not rising
            with the level, equal for equal values.
        widths: the `c` widths of the levels, ascending.
        mean_bits: the most bits per expert on average.

    Returns:
        `(E,)` int64 levels from 0 to `c − 1`. No group of equal experts could rise by one level more without
        exceeding the target or passing a more significant group.
    """
    distinct, group = torch.unique(values, sorted=True, return_inverse=True)
    size = torch.bincount(group).tolist()
    by_group = torch.zeros(distinct.numel(), len(widths) - 1, dtype=torch.float64)
    by_group[group] = scores.double()
    steps = sorted(
        (-score, -index, level)
        for index, row in enumerate(by_group.tolist())
        for level, score in enumerate(row, start=1)
    )
    levels = [0] * distinct.numel()
    left = (mean_bits - widths[0] + SLACK) * values.numel()
    for _, negative_index, level in steps:
        index = -negative_index
        cost = size[index] * (widths[level] - widths[level - 1])
        reachable = levels[index] == level - 1
        below_next = index + 1 == len(levels) or levels[index + 1] >= level
        if reachable and below_next and cost <= left:
            levels[index] = level
            left -= cost
    return torch.tensor(levels)[group]
