"""Building the analysis of a model from what the compilation observed and decided."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from moe_compiler.analysis import QUANTILES, Analysis, LayerAnalysis, frequencies
from moe_compiler.passes.base import NoProgress, Progress
from moe_compiler.passes.calibrate import Dataset
from moe_compiler.passes.capture import MoEBlock, expert_weight
from moe_compiler.passes.plan import LayerPlan, PrecisionPlan
from moe_compiler.passes.significance import channel_significance, fit_joint_distribution, layer_significance
from moe_compiler.passes.similarity import cosine_similarity
from moe_compiler.passes.statistics import LayerEvidence

DEFAULT_ALPHA = 0.3
"""The exponent of the token weights where none was chosen; see `moe_compiler.passes.significance.token_weights`."""


def analyze(
    evidence: Sequence[LayerEvidence],
    plan: PrecisionPlan,
    blocks: Mapping[str, MoEBlock],
    datasets: Mapping[str, Dataset],
    *,
    alpha: float | None = None,
    similarity: bool = True,
    progress: Progress | None = None,
) -> Analysis:
    """Sums up what is known of each MoE block and dataset, while the original experts are still there.

    Args:
        evidence: what the allocation saw.
        plan: what it decided.
        blocks: the captured blocks by path.
        datasets: the calibration samples.
        alpha: the exponent of the token weights that the statistics were collected with; `None` for no weights.
        similarity: whether to compute the cosine similarity of the experts' weights. It reads every weight once and
            takes `E` products for each; the rest costs next to nothing.
        progress: shows how far it is.
    """
    layers = {}
    with (progress or NoProgress()).task("analysing experts", len(evidence)) as advance:
        for one in evidence:
            layers[one.path] = _layer(one, plan.layers[one.path], blocks[one.path], similarity)
            advance()
    return Analysis(
        strategy=plan.strategy,
        datasets=tuple(datasets),
        layers=layers,
        tokens={name: frequencies(list(samples)) for name, samples in datasets.items()},
        alpha=DEFAULT_ALPHA if alpha is None else alpha,
        reweighted=alpha is not None,
        graphs=(),
    )


def channel_quantiles(evidence: LayerEvidence) -> dict[str, Tensor]:
    """By linear, quantiles of the significance of each expert's input channels on all datasets together.

    Args:
        evidence: of one block.

    Returns:
        `(E, Q)` float32 at `moe_compiler.analysis.QUANTILES`, as a share of the linear's mean.
    """
    levels = torch.tensor(QUANTILES, dtype=torch.float64)
    result = {}
    for linear, norm in evidence.column_norm.items():
        parts = [channel_significance(one.linears[linear], norm) for one in evidence.statistics.values()]
        total = torch.stack(parts).sum(dim=0).cpu()
        mean = total.mean().clamp(min=torch.finfo(torch.float64).tiny)
        result[linear] = torch.quantile(total / mean, levels, dim=1).T.float().contiguous()
    return result


@torch.no_grad()
def _layer(evidence: LayerEvidence, plan: LayerPlan, block: MoEBlock, similarity: bool) -> LayerAnalysis:
    joint = fit_joint_distribution(layer_significance(evidence))
    statistics = list(evidence.statistics.values())
    centers = plan.notes.get("centers")
    pairs = [one.coactivation for one in statistics if one.coactivation is not None]
    alike = None
    if similarity:
        weights = [expert_weight(block.experts, block.spec, p.name) for p in block.spec.projections]
        alike = cosine_similarity(weights).float().cpu()
    return LayerAnalysis(
        path=evidence.path,
        top_k=evidence.top_k,
        significance=joint.significance.cpu(),
        counts=torch.stack([one.count for one in statistics]).cpu(),
        gate_mass=torch.stack([one.gate_mass for one in statistics]).cpu(),
        baseline=joint.baseline.cpu(),
        dynamics=joint.dynamics.cpu(),
        correlation=joint.correlation.cpu(),
        dataset_weights=joint.weights.cpu(),
        bits=dict(plan.bits),
        clusters=plan.clusters,
        centers=centers if isinstance(centers, tuple) else None,
        channel_quantiles=channel_quantiles(evidence),
        coactivation=torch.stack(pairs).sum(dim=0).cpu() if len(pairs) == len(statistics) else None,
        similarity=alike,
        stages={},
    )
