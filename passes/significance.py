"""How much each token, channel and expert matters, on one dataset and on several together.

Symbols: `E` experts, `K` input channels of one expert linear, `k` experts per token, `n` datasets, `V` tokens
of the vocabulary. All results are float64. Sums over experts and datasets are taken in the order of size, so
that renumbering the experts or naming the datasets in another order permutes the results and changes no bit
of them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from moe_compiler.passes.statistics import BlockStatistics, LayerEvidence, LinearStatistics

CONSTANT_ROW = 1e-12  # a spread below this share of the mean is rounding: the row is constant
NO_CORRELATION = 1e-9  # a sum of dataset correlations below this is rounding: no dataset stands out


@dataclass(frozen=True)
class PowerLaw:
    """The law `f(rank) = C·rank^(-beta)` of ranked token frequencies (MoQa, arXiv 2503.21135v1, eq. 1).

    Attributes:
        C: the frequency at rank 1, in the unit of the frequencies that were fitted.
        beta: the exponent, 0 where every token is as frequent as the next.
    """

    C: float
    beta: float

    def __call__(self, rank: Tensor) -> Tensor:
        """Return the fitted frequency at each rank (1 is the most frequent token)."""
        return self.C * rank.double() ** -self.beta


@dataclass(frozen=True)
class JointDistribution:
    """One layer's expert significance over `n` datasets as one Gaussian (DynaMo, arXiv 2503.21135v3, eq. 2).

    Attributes:
        significance: `(n, E)`, what was fitted: row `d` is the expert significance on dataset `d`.
        mean: `(n,)`, mean over experts.
        covariance: `(n, n)`, covariance over experts.
        correlation: `(n, n)`, the same normalised; a constant row correlates with itself only.
        weights: `(n,)`, the weight of each dataset in the baseline, summing to 1.
        baseline: `(E,)`, the synthesized baseline significance `X`.
        dynamics: `(E,)`, standard deviation over datasets / mean over datasets, 0 where the mean is 0.
    """

    significance: Tensor
    mean: Tensor
    covariance: Tensor
    correlation: Tensor
    weights: Tensor
    baseline: Tensor
    dynamics: Tensor


def ordered_sum(values: Tensor) -> Tensor:
    """Sum over the last dimension, smallest first: the same bits whatever the order of the summands."""
    return values.contiguous().sort(dim=-1).values.sum(dim=-1)


def fit_power_law(frequencies: Tensor) -> PowerLaw:
    """Fit `f(rank) = C·rank^(-beta)` by least squares on `log f` over `log rank` (MoQa eq. 1).

    Args:
        frequencies: `(V,)` counts or frequencies of the tokens, in any order. Zeros have no rank and are left
            out.

    Returns:
        The fitted law. A single token gives `beta = 0` and its own frequency as `C`.

    Raises:
        ValueError: if the argument is not a vector of finite, non-negative numbers with a positive one.
    """
    ranked = _checked_counts("frequencies", frequencies).sort(descending=True).values
    log_frequency = ranked[ranked > 0].log()
    log_rank = torch.arange(1, log_frequency.numel() + 1, dtype=torch.float64).log()
    centred = log_rank - log_rank.mean()
    square = centred.square().sum().item()
    slope = (centred * log_frequency).sum().item() / square if square > 0 else 0.0
    beta = max(0.0, -slope)  # frequencies fall with the rank; only rounding can make the slope positive
    return PowerLaw(C=math.exp(log_frequency.mean().item() + beta * log_rank.mean().item()), beta=beta)


def token_utilization(frequency: Tensor, top_k: int) -> Tensor:
    """Token utilization `U = k·f`: how often a token is processed by some expert (MoQa eq. 1)."""
    return top_k * frequency.double()


def token_weights(token_counts: Tensor, alpha: float = 0.3) -> Tensor:
    """Weigh every token of the vocabulary, so that rare tokens count less (MoQa eq. 2).

    Our decision: the paper's text asks for a function that decreases with the rank and weakens the tail, its
    formula `U^(-alpha)` does the opposite. This is `w = (f(rank)/f(1))^alpha` with the fitted power law,
    which is 1 at the head and falls to the tail. Tokens that are equally frequent share the best of their
    ranks, so all weights are 1 where all counts are equal; a token that was never seen gets the weight of the
    last rank.

    Args:
        token_counts: `(V,)` how often each token id occurs in the dataset.
        alpha: the exponent, 0 for equal weights.

    Returns:
        `(V,)` float64 weights in (0, 1].

    Raises:
        ValueError: if the counts are not a vector of non-negative numbers with a positive one, or `alpha` is
            negative.
    """
    counts = _checked_counts("token_counts", token_counts)
    if not (math.isfinite(alpha) and alpha >= 0):
        raise ValueError(f"`alpha` must be a finite number of at least 0, got {alpha}")
    law = fit_power_law(counts)
    ranked = counts[counts > 0].sort().values
    rank = ranked.numel() - torch.searchsorted(ranked, counts, right=True) + 1
    return rank.clamp(max=ranked.numel()).double() ** (-law.beta * alpha)


def channel_significance(linear: LinearStatistics, column_norm: Tensor) -> Tensor:
    """Return the summed size of each input channel's contribution to the output (DynaMo III-A).

    `S_ch[e, c] = abs_sum[e, c]·‖W_e[:, c]‖₂`. Our decision: the paper speaks of "the output logits of each
    channel weight"; a channel adds `x_c·W[:, c]` to the output, and this is the sum of the L2 norms of what
    it added.

    Args:
        linear: the sums of one expert linear.
        column_norm: `(E, K)`, the L2 norm of each input channel of the weights.

    Returns:
        `(E, K)` float64.

    Raises:
        ValueError: if the two shapes differ.
    """
    if linear.abs_sum.shape != column_norm.shape:
        raise ValueError(
            f"`column_norm` must have the shape of the statistics {tuple(linear.abs_sum.shape)}, "
            f"got {tuple(column_norm.shape)}"
        )
    return linear.abs_sum.double() * column_norm.double()


def expert_significance(block: BlockStatistics, column_norm: Mapping[str, Tensor]) -> Tensor:
    """Expert significance on one dataset (DynaMo eq. 1).

    `S_exp[e] = Σ_c S_ch[e, c] / ((1/k)·Σ_e' Σ_c S_ch[e', c])`. Our decisions: the factor `1/k` keeps the
    paper's range, so that the significances of a layer sum to `k` and even routing gives `k/E`; and the
    linears of an expert, whose outputs have different units, are each normalised to the same total before
    they are averaged. A linear that saw nothing is left out; a block that saw nothing gives `k/E` to every
    expert.

    Args:
        block: the statistics of one dataset.
        column_norm: by linear, `(E, K)`.

    Returns:
        `(E,)` float64, not negative, summing to `k`.

    Raises:
        ValueError: if a linear has no column norms, or their shape differs from the statistics'.
    """
    shares = []
    for name, linear in block.linears.items():
        if name not in column_norm:
            raise ValueError(f"`column_norm` must hold the linear {name!r}, got {sorted(column_norm)}")
        per_expert = channel_significance(linear, column_norm[name]).sum(dim=1)
        total = ordered_sum(per_expert)
        if total > 0:
            shares.append(per_expert / total)
    if not shares:
        return _even(block)
    return block.top_k * torch.stack(shares).mean(dim=0)


def token_expert_significance(block: BlockStatistics) -> Tensor:
    """MoQa's expert significance, from token weights alone (MoQa eq. 5).

    `S_E[e] = Σ_{tokens routed to e} w / Σ_{all tokens} w`. A block that saw nothing gives `k/E` to every
    expert.

    Args:
        block: the statistics of one dataset, or the sum of several.

    Returns:
        `(E,)` float64 in [0, 1], summing to `k`.
    """
    if block.token_weight_sum <= 0:
        return _even(block)
    return block.token_mass.double() / block.token_weight_sum


def layer_significance(evidence: LayerEvidence) -> Tensor:
    """Return the `expert_significance` of one layer on each of its datasets, `(n, E)` float64."""
    return torch.stack([expert_significance(s, evidence.column_norm) for s in evidence.statistics.values()])


def fit_joint_distribution(significance: Tensor) -> JointDistribution:
    """Fit the joint distribution of a layer's expert significance over datasets (DynaMo eq. 2 and figure 4).

    A Gaussian is fitted to the `E` columns of the significance. Our decisions, as the paper gives no
    formulas: the weight of a dataset is `max(0, Σ_d' C[d, d'])`, normalised to 1, with `C` the datasets'
    correlation; the baseline is `X[e] = Σ_d weight_d·S[d, e]` ("the product of dataset correlation and expert
    significance"); the dynamics are the standard deviation over datasets divided by the mean. With one
    dataset `X = S`. A dataset whose experts are all alike correlates with itself only, and if no dataset has
    a positive weight all weigh the same.

    Args:
        significance: `(n, E)`, finite and not negative.

    Returns:
        The distribution, its baseline and its dynamics.

    Raises:
        ValueError: if the argument is not a non-empty matrix of finite, non-negative numbers.
    """
    S = significance.double()
    if S.dim() != 2 or S.numel() == 0 or not bool(S.isfinite().all()) or bool((S < 0).any()):
        raise ValueError(
            "`significance` must be a non-empty (datasets, experts) matrix of finite, non-negative numbers, "
            f"got shape {tuple(significance.shape)}"
        )
    num_datasets, num_experts = S.shape
    mean = ordered_sum(S) / num_experts
    centred = S - mean[:, None]
    covariance = ordered_sum(centred[:, None, :] * centred[None, :, :]) / num_experts
    deviation = covariance.diagonal().sqrt()
    constant = deviation <= CONSTANT_ROW * mean
    scale = torch.where(constant, 1.0, deviation)
    correlation = (covariance / (scale[:, None] * scale[None, :])).clamp(-1, 1)
    correlation[constant, :] = 0
    correlation[:, constant] = 0
    correlation.fill_diagonal_(1)
    raw = ordered_sum(correlation).clamp(min=0)
    total = ordered_sum(raw)
    weights = raw / total if total > NO_CORRELATION else torch.full_like(raw, 1 / num_datasets)
    over_datasets = S.T.contiguous()  # (E, n)
    centre = ordered_sum(over_datasets) / num_datasets
    spread = (ordered_sum((over_datasets - centre[:, None]).square()) / num_datasets).sqrt()
    return JointDistribution(
        significance=S,
        mean=mean,
        covariance=covariance,
        correlation=correlation,
        weights=weights,
        baseline=ordered_sum(over_datasets * weights),
        dynamics=torch.where(centre > 0, spread / torch.where(centre > 0, centre, 1.0), 0.0),
    )


def _even(block: BlockStatistics) -> Tensor:
    return torch.full((block.num_experts,), block.top_k / block.num_experts, dtype=torch.float64)


def _checked_counts(argument: str, counts: Tensor) -> Tensor:
    values = counts.double()
    if values.dim() != 1 or not bool(values.isfinite().all()) or bool((values < 0).any()):
        raise ValueError(
            f"`{argument}` must be a vector of finite, non-negative numbers, got shape {tuple(counts.shape)} "
            f"and dtype {counts.dtype}"
        )
    if not bool((values > 0).any()):
        raise ValueError(f"`{argument}` must count at least one token, got {values.numel()} zeros")
    return values
