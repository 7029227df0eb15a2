"""Splitting the experts of a layer in two by significance, by the mean or by natural breaks (MoQa).

Symbols: `E` experts. Values are significances: finite and not negative.
"""

from __future__ import annotations

from dataclasses import dataclass

import jenkspy
import torch
from torch import Tensor

from moe_compiler.passes.clustering import merge_ties


@dataclass(frozen=True)
class MoqaPartition:
    """MoQa's two groups of experts (MoQa, arXiv 2503.21135v1, eq. 6 to 8).

    Attributes:
        high: `(E,)` bool, the experts of the more significant group: `S_E >= threshold`.
        pattern: 1 where experts differ much (the threshold is the mean), 2 where they are alike (Jenks).
        threshold: the smallest significance of the higher group's rule.
        mean: mean of the Gaussian fitted to the significances.
        std: its standard deviation.
        coefficient_of_variation: `std / mean`, which decided the pattern.
    """

    high: Tensor
    pattern: int
    threshold: float
    mean: float
    std: float
    coefficient_of_variation: float


def gaussian_threshold(values: Tensor) -> float:
    """Return the threshold of MoQa's first pattern: the mean of the fitted Gaussian (MoQa eq. 6 and 7)."""
    ordered = merge_ties(values).sort().values
    return min(ordered.mean().item(), ordered[-1].item())  # the mean of equal values may round above them


def jenks_split(values: Tensor) -> float:
    """Return the threshold of MoQa's second pattern: Jenks natural breaks with two classes (MoQa eq. 8).

    Returns:
        The smallest value of the upper class; the value itself where all values are equal.
    """
    points = merge_ties(values)
    distinct = torch.unique(points)
    if distinct.numel() < 2:
        return float(distinct[0])
    scaled = points / distinct[-1]
    last_low = jenkspy.jenks_breaks(scaled.tolist(), n_classes=2)[1]
    return points[scaled > last_low].min().item()


def moqa_partition(significance: Tensor, pattern_threshold: float = 0.5) -> MoqaPartition:
    """Split the experts of a layer in two by significance (MoQa 3.3 and 4.2).

    Our decision: the paper tells its two patterns apart by eye. Pattern 1, "experts differ much", is taken
    where the coefficient of variation of the significances exceeds `pattern_threshold`.

    Args:
        significance: `(E,)`, `S_E` of `token_expert_significance`.
        pattern_threshold: the coefficient of variation above which pattern 1 holds.

    Returns:
        The partition. Experts that are all alike are all in the higher group.

    Raises:
        ValueError: if `pattern_threshold` is negative.
    """
    if not pattern_threshold >= 0:
        raise ValueError(f"`pattern_threshold` must be at least 0, got {pattern_threshold}")
    points = merge_ties(significance)
    mean = gaussian_threshold(points)
    std = (points.sort().values - mean).square().mean().sqrt().item()
    variation = std / mean if mean > 0 else 0.0
    pattern = 1 if variation > pattern_threshold else 2
    threshold = mean if pattern == 1 else jenks_split(points)
    return MoqaPartition(points >= threshold, pattern, threshold, mean, std, variation)
