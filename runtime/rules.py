"""The rules of `adapt`: what a pool should hold for new data (DynaMo IV-B, V-A)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from moe_compiler.kernels.affine import choose_qparams, dequantize, quantize
from moe_compiler.kernels.experts import PackedExpertLinear
from moe_compiler.kernels.pool import ChannelPool
from moe_compiler.passes.moments import Gram, SecondMoments
from moe_compiler.runtime.errors import base_columns, precision, weight_error
from moe_compiler.runtime.master import LinearMaster

RULES = ("restore", "cluster", "compensate", "lowrank")

DAMPING = 0.01
"""Fraction of the mean of the diagonal that is added to second moments."""
PSEUDO_ROWS = 64.0
"""Rows without correlation that are added to second moments for `compensate`, see `Gram.damped`. Measured on two small
OLMoE: 64 to 512 gave the least loss on held-out text of the new data, none a twentieth more."""


def needs(rule: str) -> Literal["sums", "hessian"]:
    """What a rule must know of the new data: sums by channel, or second moments of each expert's inputs.

    Raises:
        ValueError: there is no such rule.
    """
    if rule not in RULES:
        raise ValueError(f"`rule` must be one of {', '.join(map(repr, RULES))}, but is {rule!r}")
    return "hessian" if rule in ("compensate", "lowrank") else "sums"


def worst_channels(error: Tensor, energy: Tensor, count: int) -> Tensor:
    """The `count` channels with the largest expected error, those without any left out; see `restore`.

    Args:
        error: `(E, K)`.
        energy: `(E, K)`.
        count: at most so many.

    Returns:
        Their places `e · K + c`, int64.
    """
    score = (error * energy.float().cpu()).view(-1)
    return torch.topk(score, min(count, int((score > 0).sum()))).indices


def assigned_channels(energy: Tensor, per_expert: Sequence[int], count: int) -> Tensor:
    """The channels that a plan wants at INT8: of each expert those with the largest energy (MoQa, section 3.3: by the
    diagonal of the Hessian); if they are more than `count`, those with the largest energy of all.

    Args:
        energy: `(E, K)`.
        per_expert: channels of each expert.
        count: at most so many in all.

    Returns:
        Their places `e · K + c`, int64.
    """
    energy = energy.float().cpu()
    rank = energy.argsort(dim=1, descending=True).argsort(dim=1)
    wanted = rank < torch.tensor(per_expert)[:, None]
    score = torch.where(wanted, energy, -1.0).view(-1)
    return torch.topk(score, min(count, int(wanted.sum()))).indices


def hold(master: LinearMaster, packed: PackedExpertLinear, places: Tensor) -> ChannelPool:
    """Pool contents that restore the channels at `places` (`e · K + c`), which the master must have, on the host."""
    return _contents(packed, places, master.columns(places) - base_columns(packed, places))


def restore(master: LinearMaster, packed: PackedExpertLinear, energy: Tensor) -> ChannelPool:
    """Rule `"restore"`: the slots go to the channels with the largest expected error on the new data.

    The expected squared error of channel `c` of expert `e` is `‖W[:, c] − Ŵ[:, c]‖² · Σ g² x_c²`; the slot holds the
    difference, so the channel is restored to INT8 precision of its residual. Our decision.

    Needs sums by channel of the new data and any master; it can only draw on the columns that the master has. Costs
    the columns that get slots, of the master and of the base, and `4·E·K` bytes for the scores.

    Args:
        master: the original columns to choose from.
        packed: the quantized base.
        energy: `(E, K)`, the sum of `g²·x_c²` on the new data.

    Returns:
        The new contents, on the host. Slots that no channel needs stay idle.
    """
    return hold(master, packed, worst_channels(master.kept_error, energy, packed.pool.capacity))


def recluster(
    master: LinearMaster, packed: PackedExpertLinear, significance: Tensor, bits: Sequence[int], energy: Tensor
) -> ChannelPool:
    """Rule `"cluster"`: cached channels are requantized to the width of their expert's new cluster (DynaMo V-A).

    Every kept channel of an expert whose cluster changed is a candidate; the most significant ones on the new data
    take the slots. A slot holds the difference between the channel requantized from the original to the new width, up
    or down, and the base. Our decisions, where the paper says nothing: requantizing uses one scale per group of 128
    outputs of the column, and slots that are left over restore channels of the other experts as rule `"restore"` does.

    Needs and costs what `"restore"` does.

    Args:
        master: the original columns to choose from.
        packed: the quantized base.
        significance: `(E, K)`, the channels' significance on the new data.
        bits: the experts' widths by their new clusters.
        energy: `(E, K)`, the sum of `g²·x_c²` on the new data.

    Returns:
        The new contents, on the host.
    """
    changed = torch.tensor([new != old for new, old in zip(bits, packed.bits, strict=True)])
    kept = master.places
    candidate = changed[kept // packed.in_features]
    score = torch.where(candidate, significance.cpu().float().view(-1)[kept], 0.0)
    places = kept[torch.topk(score, min(packed.pool.capacity, int((score > 0).sum()))).indices]
    wanted = master.columns(places)
    new_bits = [bits[expert] for expert in (places // packed.in_features).tolist()]
    for one in set(new_bits):
        these = torch.tensor([width == one for width in new_bits])
        scale, zero_point = choose_qparams(wanted[these], one, 128)
        wanted[these] = dequantize(quantize(wanted[these], scale, zero_point, one, 128), scale, zero_point, 128)
    others = master.kept_error.masked_fill(changed[:, None], 0)
    left = worst_channels(others, energy, packed.pool.capacity - places.numel())
    places = torch.cat([places, left])
    wanted = torch.cat([wanted, master.columns(left)])
    return _contents(packed, places, wanted - base_columns(packed, places))


def compensate(
    master: LinearMaster,
    packed: PackedExpertLinear,
    energy: Tensor,
    moments: SecondMoments,
    damping: float = DAMPING,
    pseudo_rows: float = PSEUDO_ROWS,
) -> ChannelPool:
    """Rule `"compensate"`: as `"restore"`, and each slot also absorbs errors of the channels that stay quantized.

    With slots `S`, rest `R`, error `D = W − Ŵ` and second moments `Q` of the new data, the columns of the slots become
    `W_S + D_R · Q_RS · Q_SS⁻¹`: the least squares fit of what the rest gets wrong by what the slots' channels know (the
    step of GPTQ, arXiv 2210.17323, for all of `S` at once). Our decision. The fit never raises the error on the second
    moments it was made with; these are damped (see `Gram.damped`), so that a few rows are not taken too seriously.

    Needs second moments of the new data and a master that has whole weights, `"memory"` or `"checkpoint"`. Costs, for
    each expert that gets `s` slots, its dequantized weight and its original (`8·N·K` bytes) and two products of `N·K·s`
    and `n·K·s` multiplications with `n` rows of new data.

    Args:
        master: the original weights.
        packed: the quantized base.
        energy: `(E, K)`, the sum of `g²·x_c²` on the new data.
        moments: second moments of the new data.
        damping: see `Gram.damped`.
        pseudo_rows: see `Gram.damped`.

    Returns:
        The new contents, on the host.
    """
    places = worst_channels(master.error, energy, packed.pool.capacity).sort().values
    experts, channels = places // packed.in_features, places % packed.in_features
    delta = torch.empty(places.shape[0], packed.out_features)
    dtype = precision(packed, moments)
    for expert in experts.unique().tolist():
        mine = experts == expert
        slots = channels[mine].to(packed.planes.device)
        error = weight_error(master, packed, expert, dtype)
        gram = checked_moments(moments, expert, error.device)
        gram = gram.damped(damping, pseudo_rows, int(moments.count[expert]))
        chosen = torch.zeros(packed.in_features, slots.numel(), device=error.device)
        chosen[slots, torch.arange(slots.numel(), device=error.device)] = 1
        correlation = gram.times(chosen)
        own = error[:, slots].float()
        error[:, slots] = 0
        target = (error @ correlation.to(dtype)).float()
        delta[mine] = (own + solve(correlation[slots], target)).t().cpu()
    return _contents(packed, places, delta)


def checked_moments(moments: SecondMoments, expert: int, device: torch.device) -> Gram:
    """Second moments of one expert.

    Raises:
        FloatingPointError: they are not finite.
    """
    gram = moments.expert(expert, device)
    if not all(math.isfinite(bound) for bound in gram.factor.aminmax()):
        raise FloatingPointError(f"second moments must be finite, but those of expert {expert} hold NaN or infinity")
    return gram


def solve(matrix: Tensor, target: Tensor) -> Tensor:
    """`target · matrix⁻¹` in float64 for a matrix that is positive definite but for rounding, as float32."""
    matrix = matrix.double()
    matrix = (matrix + matrix.t()) / 2
    matrix.diagonal().add_(1e-9 * matrix.diagonal().mean().clamp(min=1e-300))
    solution: Tensor = torch.linalg.solve(matrix, target.double().t())
    return solution.t().float()


def _contents(packed: PackedExpertLinear, places: Tensor, delta: Tensor) -> ChannelPool:
    return ChannelPool.from_columns(places // packed.in_features, places % packed.in_features, delta, packed.pool)
