"""Deciding the bits: one function for all allocation strategies, with its input checked."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import fields

from moe_compiler.passes.plan import PACKED_WIDTHS, PLAN_WIDTHS, Option, PrecisionPlan
from moe_compiler.passes.statistics import LayerEvidence
from moe_compiler.passes.strategies import STRATEGIES, AllocationOptions


def assign(
    evidence: Sequence[LayerEvidence],
    strategy: str,
    *,
    target_bits: float | None = None,
    widths: Sequence[int] | None = None,
    seed: int = 0,
    overlap: float = 0.2,
    insurance: float = 0.2,
    uniform_bits: int | None = None,
    pattern_threshold: float = 0.5,
    channel_fraction: float = 0.02,
) -> PrecisionPlan:
    """Choose the width of every expert linear of a model.

    Args:
        evidence: the evidence of each MoE block, in the model's order.
        strategy: one of `STRATEGIES`: `dynamo`, `moqa`, `uniform`, `random`, `pooled` or `budget`.
        target_bits: the most effective bits per weight (codes and overhead). `budget` holds it over the
            model, `uniform` takes the widest width that meets it over the model, the others hold it in every
            layer, and each comes as close to it as its granularity allows. Without a target the average falls
            out of the strategy.
        widths: the widths to choose from, among 2, 4, 6 and 8; by default the strategy's own: 2 and 4 for
            `moqa` and `random`, which need exactly two, and all four for the others.
        seed: of `random`.
        overlap: of `dynamo` and `pooled` without a target: an expert between two clusters whose memberships
            differ by less goes to the lower one.
        insurance: of `budget`: the share of a linear's mean error that is added to the error of each of its
            experts. More of it serves unseen data better and the calibration data worse.
        uniform_bits: of `uniform`: the width, among 2, 3, 4, 6 and 8. Three bits cannot be packed: such a
            plan is a baseline to be evaluated with dequantized weights.
        pattern_threshold: of `moqa`: the coefficient of variation of the significances above which experts
            "differ much" and the mean splits them; below it, Jenks natural breaks do.
        channel_fraction: of `moqa`: the share of INT8 channels in the most significant expert (`beta` of eq.
            9).

    Returns:
        The plan. MoQa's INT8 for shared experts is not part of it: a shared expert is no routed expert.

    Raises:
        ValueError: if an argument is out of its range, the evidence lacks what the strategy needs, or the
            target is below the smallest that is possible.
    """
    if strategy not in STRATEGIES:
        raise ValueError(f"`strategy` must be one of {sorted(STRATEGIES)}, got {strategy!r}")
    entry = STRATEGIES[strategy]
    paths = [layer.path for layer in evidence]
    if not paths or len(set(paths)) != len(paths):
        raise ValueError(f"`evidence` must hold at least one MoE block and each block once, got {paths}")
    chosen = entry.default_widths if widths is None else tuple(sorted(widths))
    if not chosen or len(set(chosen)) != len(chosen) or not set(chosen) <= set(PACKED_WIDTHS):
        raise ValueError(f"`widths` must be different widths among {PACKED_WIDTHS}, got {list(widths or ())}")
    if entry.two_levels and len(chosen) != 2:
        raise ValueError(f"`widths` of the strategy {strategy!r} must be two widths, got {list(chosen)}")
    if uniform_bits is not None and uniform_bits not in PLAN_WIDTHS:
        raise ValueError(f"`uniform_bits` must be among {PLAN_WIDTHS}, got {uniform_bits}")
    if target_bits is None and entry.needs_target:
        raise ValueError(f"`target_bits` is required by the strategy {strategy!r}")
    if target_bits is not None and not (math.isfinite(target_bits) and target_bits > 0):
        raise ValueError(f"`target_bits` must be a positive, finite number of bits, got {target_bits}")
    for name, value in (("overlap", overlap), ("channel_fraction", channel_fraction)):
        if not 0 <= value <= 1:
            raise ValueError(f"`{name}` must be in [0, 1], got {value}")
    for name, value in (("insurance", insurance), ("pattern_threshold", pattern_threshold)):
        if not (math.isfinite(value) and value >= 0):
            raise ValueError(f"`{name}` must be finite and at least 0, got {value}")
    options = AllocationOptions(
        target_bits=target_bits,
        widths=chosen,
        seed=seed,
        overlap=overlap,
        insurance=insurance,
        uniform_bits=uniform_bits,
        pattern_threshold=pattern_threshold,
        channel_fraction=channel_fraction,
    )
    layers = entry.allocate(evidence, options)
    recorded: dict[str, Option] = {f.name: getattr(options, f.name) for f in fields(options)}
    recorded.pop("target_bits")
    return PrecisionPlan(strategy, {layer.path: layer for layer in layers}, target_bits, recorded)
