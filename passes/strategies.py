"""The allocation strategies: the evidence of all MoE blocks in, the bits of every expert linear out.

Each is a pure function of the evidence and the options. The experts' order permutes the bits and the
datasets' order does not matter (`random` apart, which draws); no plan exceeds a target.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import reduce
from operator import add
from types import MappingProxyType

import numpy as np
import torch
from torch import Tensor

from moe_compiler.passes.budget import relative_errors, solve_budget
from moe_compiler.passes.clustering import (
    assign_clusters,
    boundary_scores,
    fuzzy_c_means,
    merge_ties,
    quantile_centers,
)
from moe_compiler.passes.levels import SLACK, fill_levels
from moe_compiler.passes.partition import moqa_partition
from moe_compiler.passes.plan import LayerPlan, Note
from moe_compiler.passes.significance import (
    expert_significance,
    fit_joint_distribution,
    layer_significance,
    token_expert_significance,
)
from moe_compiler.passes.statistics import BlockStatistics, LayerEvidence


@dataclass(frozen=True)
class AllocationOptions:
    """What a strategy is asked for; each reads what concerns it. See `assign` for the meaning."""

    target_bits: float | None
    widths: tuple[int, ...]
    seed: int
    overlap: float
    insurance: float
    uniform_bits: int | None
    pattern_threshold: float
    channel_fraction: float


@dataclass(frozen=True)
class Strategy:
    """An allocation strategy.

    Attributes:
        summary: what it does, with its source.
        default_widths: the widths it uses unless told otherwise.
        allocate: the function; it may count on checked options.
        two_levels: whether it needs exactly two widths.
        needs_target: whether it cannot do without `target_bits`.
    """

    summary: str
    default_widths: tuple[int, ...]
    allocate: Callable[[Sequence[LayerEvidence], AllocationOptions], list[LayerPlan]]
    two_levels: bool = False
    needs_target: bool = False


def pool_statistics(evidence: LayerEvidence) -> BlockStatistics:
    """Add up the statistics of all datasets of a layer, Hessians left out, as if they were one dataset."""
    return reduce(add, (_without_hessians(statistics) for statistics in evidence.statistics.values()))


def _dynamo(evidence: Sequence[LayerEvidence], options: AllocationOptions) -> list[LayerPlan]:
    """Cluster the baseline significance, starting from the token shares under the datasets' weights."""
    plans = []
    for layer in evidence:
        joint = fit_joint_distribution(layer_significance(layer))
        counts = layer.counts()
        share = joint.weights @ (counts / counts.sum(dim=1, keepdim=True).clamp(min=1))
        notes: dict[str, Note] = {"dataset_weights": tuple(joint.weights.tolist())}
        plans.append(_clustered(layer, joint.baseline, share, options, notes))
    return plans


def _pooled(evidence: Sequence[LayerEvidence], options: AllocationOptions) -> list[LayerPlan]:
    """Cluster the significance on all datasets concatenated: a dataset weighs as much as it has tokens."""
    plans = []
    for layer in evidence:
        pooled = pool_statistics(layer)
        significance = expert_significance(pooled, layer.column_norm)
        plans.append(_clustered(layer, significance, pooled.count.double(), options, {}))
    return plans


def _clustered(
    layer: LayerEvidence,
    significance: Tensor,
    token_share: Tensor,
    options: AllocationOptions,
    notes: Mapping[str, Note],
) -> LayerPlan:
    count = len(options.widths)
    initial = quantile_centers(significance, token_share, count)
    clusters = fuzzy_c_means(significance, count, initial_centers=initial)
    if options.target_bits is None:
        levels = assign_clusters(clusters, options.overlap)
    else:
        mean_bits = _mean_code_bits(layer, options.target_bits, options.widths[0])
        levels = fill_levels(clusters.values, boundary_scores(clusters), options.widths, mean_bits)
    notes = {**notes, "centers": tuple(clusters.centers.tolist()), "iterations": clusters.iterations}
    return _leveled_plan(layer, levels, options.widths, notes)


def _moqa(evidence: Sequence[LayerEvidence], options: AllocationOptions) -> list[LayerPlan]:
    """Split the experts in two by token significance; INT8 channels in the upper group (MoQa eq. 7 to 9).

    Our decisions: the paper analyses one dataset at a time, here several are pooled; `norm` of eq. 9 divides
    by the largest significance; a target shifts the threshold; an upper group that is INT8 itself needs no
    INT8 channels.
    """
    plans = []
    for layer in evidence:
        significance = merge_ties(token_expert_significance(pool_statistics(layer)))
        partition = moqa_partition(significance, options.pattern_threshold)
        levels = partition.high.long()
        if options.target_bits is not None:
            mean_bits = _mean_code_bits(layer, options.target_bits, options.widths[0])
            levels = fill_levels(significance, significance[:, None], options.widths, mean_bits)
        largest = significance.max().item()
        fraction = options.channel_fraction * significance / largest if largest > 0 else torch.zeros(len(levels))
        channels = {
            name: tuple((fraction * levels * K).round().long().tolist())
            for name, (_, K) in layer.shapes.items()
            if options.widths[1] < 8
        }
        notes: dict[str, Note] = {
            "pattern": partition.pattern,
            "partition_threshold": partition.threshold,
            "coefficient_of_variation": partition.coefficient_of_variation,
        }
        plans.append(_leveled_plan(layer, levels, options.widths, notes, channels or None))
    return plans


def _uniform(evidence: Sequence[LayerEvidence], options: AllocationOptions) -> list[LayerPlan]:
    """Give all experts one width: the one asked for, or the widest that meets the target over the model."""
    width = options.uniform_bits
    if width is None and options.target_bits is None:
        raise ValueError("the strategy 'uniform' needs `uniform_bits` or `target_bits`, got neither")
    candidates = options.widths if width is None else (width,)
    plans = [[_uniform_plan(layer, candidate) for layer in evidence] for candidate in candidates]
    if options.target_bits is None:
        return plans[0]
    weights = sum(layer.num_weights for layer in plans[0])
    average = [sum(p.effective_bits * p.num_weights for p in plan) / weights for plan in plans]
    fitting = [plan for plan, bits in zip(plans, average, strict=True) if bits <= options.target_bits + SLACK]
    if not fitting:
        raise ValueError(
            f"`target_bits` must be at least {average[0]:.6g} effective bits for {candidates[0]} bits "
            f"everywhere, got {options.target_bits}"
        )
    return fitting[-1]


def _random(evidence: Sequence[LayerEvidence], options: AllocationOptions) -> list[LayerPlan]:
    """Draw the experts of the higher width, half without a target; no layer's draw depends on another."""
    plans = []
    for layer in evidence:
        generator = random.Random(f"{options.seed}/{layer.path}")
        draw = torch.tensor([generator.random() for _ in range(layer.num_experts)], dtype=torch.float64)
        if options.target_bits is None:
            mean_bits = options.widths[0] + (options.widths[1] - options.widths[0]) / 2
        else:
            mean_bits = _mean_code_bits(layer, options.target_bits, options.widths[0])
        levels = fill_levels(draw, draw[:, None], options.widths, mean_bits)
        plans.append(_leveled_plan(layer, levels, options.widths, {}))
    return plans


def _budget(evidence: Sequence[LayerEvidence], options: AllocationOptions) -> list[LayerPlan]:
    """Spend a budget over all layers, experts and linears where it saves the most relative error."""
    assert options.target_bits is not None
    items = [(layer, name) for layer in evidence for name in layer.shapes]
    errors = [relative_errors(layer, name, options.widths, options.insurance) for layer, name in items]
    sizes = [N * K for layer, name in items for N, K in [layer.shapes[name]]]
    experts = [layer.num_experts for layer, _ in items]
    weights = np.repeat(np.asarray(sizes, dtype=np.int64), experts)
    num_weights = int(weights.sum())
    overhead = sum(
        layer.overhead_bits[name] * size * count
        for (layer, name), size, count in zip(items, sizes, experts, strict=True)
    )
    least = options.widths[0] + overhead / num_weights
    if least > options.target_bits + SLACK:
        raise ValueError(_too_low(options.target_bits, least, options.widths[0], "over the model"))
    total_bits = max((options.target_bits + SLACK) * num_weights - overhead, options.widths[0] * num_weights)
    choice = torch.from_numpy(solve_budget(torch.cat(errors).numpy(), weights, options.widths, total_bits))
    chosen = dict(zip(((layer.path, name) for layer, name in items), torch.split(choice, experts), strict=True))
    plans = []
    for layer in evidence:
        bits = {name: _to_widths(chosen[layer.path, name], options.widths) for name in layer.shapes}
        plans.append(LayerPlan(layer.path, bits, dict(layer.shapes), dict(layer.overhead_bits)))
    return plans


def _without_hessians(statistics: BlockStatistics) -> BlockStatistics:
    return replace(
        statistics,
        linears={name: replace(linear, hessian=None) for name, linear in statistics.linears.items()},
    )


def _uniform_plan(layer: LayerEvidence, width: int) -> LayerPlan:
    return _leveled_plan(layer, torch.zeros(layer.num_experts, dtype=torch.int64), (width,), {}, clustered=False)


def _leveled_plan(
    layer: LayerEvidence,
    levels: Tensor,
    widths: Sequence[int],
    notes: Mapping[str, Note],
    channels: Mapping[str, tuple[int, ...]] | None = None,
    clustered: bool = True,
) -> LayerPlan:
    """Build a plan in which the linears of an expert share its width."""
    return LayerPlan(
        path=layer.path,
        bits={name: _to_widths(levels, widths) for name in layer.shapes},
        shapes=dict(layer.shapes),
        overhead_bits=dict(layer.overhead_bits),
        clusters=tuple(levels.tolist()) if clustered else None,
        channels=channels,
        notes=notes,
    )


def _to_widths(levels: Tensor, widths: Sequence[int]) -> tuple[int, ...]:
    return tuple(widths[level] for level in levels.tolist())


def _mean_code_bits(layer: LayerEvidence, target_bits: float, narrowest: int) -> float:
    """Return the code bits per weight that a layer may spend where every layer holds the target."""
    weights = sum(N * K for N, K in layer.shapes.values())
    overhead = sum(layer.overhead_bits[name] * N * K for name, (N, K) in layer.shapes.items()) / weights
    if narrowest + overhead > target_bits + SLACK:
        raise ValueError(_too_low(target_bits, narrowest + overhead, narrowest, f"in layer {layer.path!r}"))
    return target_bits - overhead


def _too_low(target_bits: float, least: float, narrowest: int, where: str) -> str:
    return (
        f"`target_bits` must be at least {least:.6g} effective bits {where} (codes of {narrowest} bits and "
        f"{least - narrowest:.6g} bits of overhead per weight), got {target_bits}"
    )


STRATEGIES: Mapping[str, Strategy] = MappingProxyType(
    {
        "dynamo": Strategy(
            "fuzzy c-means on the baseline significance over datasets (DynaMo, arXiv 2503.21135v3)",
            (2, 4, 6, 8),
            _dynamo,
        ),
        "moqa": Strategy("two groups by token significance (MoQa, arXiv 2503.21135v1)", (2, 4), _moqa, two_levels=True),
        "uniform": Strategy("the same width everywhere (the papers' GPTQ baseline)", (2, 4, 6, 8), _uniform),
        "random": Strategy(
            "a random half of the experts at the higher width (the papers' MoEPTQ baseline)",
            (2, 4),
            _random,
            two_levels=True,
        ),
        "pooled": Strategy("as dynamo, on the statistics of all datasets pooled", (2, 4, 6, 8), _pooled),
        "budget": Strategy(
            "least measured output error under a global bit budget (our own)",
            (2, 4, 6, 8),
            _budget,
            needs_target=True,
        ),
    }
)
