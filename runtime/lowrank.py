"""Rule `"lowrank"`: the pool's slots hold the directions in which the quantized base errs most on the new data."""

from __future__ import annotations

import torch
from torch import Tensor

from moe_compiler.kernels.experts import PackedExpertLinear
from moe_compiler.kernels.pool import ChannelPool
from moe_compiler.passes.moments import Gram, SecondMoments
from moe_compiler.runtime.master import LinearMaster
from moe_compiler.runtime.rules import DAMPING, damped_moments, weight_error

EXACT_ROWS = 128
"""Up to so many output features the singular vectors are computed exactly, above by subspace iteration."""

_LEAST_RANK = 16
_OVERSAMPLING = 8
_ITERATIONS = 5


def lowrank(
    master: LinearMaster,
    packed: PackedExpertLinear,
    moments: SecondMoments,
    damping: float = DAMPING,
    pseudo_rows: float = 0.0,
) -> ChannelPool:
    """Rule `"lowrank"`: the best correction of rank `r` under the new data's second moments.

    For an error `D = W − Ŵ` and second moments `Q`, `tr((D − L)·Q·(D − L)ᵀ)` is least over all `L` of rank `r` at
    `L = A·Aᵀ·D`, with `A` the leading left singular vectors of `D·Q^(1/2)` (Eckart and Young): a slot is an output
    `a_i` and a direction `a_iᵀ·D`, and gains `σ_i²`. The slots go to the largest gains over all experts of the layer.
    Our decision. `Q` is damped (see `Gram.damped`), but little: more of it, pseudo rows or a share of the layer's
    pooled second moments were no better on held-out text, as a direction that few rows show gains little anyway.

    Needs second moments of the new data, a pool with directions (`pool="lowrank"`) and a master that has whole weights,
    `"memory"` or `"checkpoint"`. Costs, for each expert that the new data used, its dequantized weight and its original
    (`8·N·K` bytes) and a dozen products of `N·K·q` and `n·K·q` multiplications with `n` rows of new data and `q` twice
    the slots per expert (at least 16), doubled for those experts that take them all; up to 128 output features one
    eigendecomposition of `(N, N)` instead.

    Args:
        master: the original weights.
        packed: the quantized base.
        moments: second moments of the new data.
        damping: see `Gram.damped`.
        pseudo_rows: see `Gram.damped`.

    Returns:
        The new contents, on the host. Slots that no direction needs stay idle.
    """
    slots = packed.pool.direction.shape[0]
    count = moments.count
    used = count.nonzero().squeeze(1).tolist() if slots else []
    if not used:
        nothing = torch.empty(0, packed.out_features)
        return ChannelPool.from_columns(count.new_zeros(0), count.new_zeros(0), nothing, packed.pool)
    most = min(slots, packed.out_features, packed.in_features)
    rank = min(most, max(_LEAST_RANK, 2 * slots // len(used)))
    found: dict[int, tuple[Tensor, Tensor, Tensor]] = {}
    wanting = used
    while wanting:
        for expert in wanting:
            error = weight_error(master, packed, expert)
            gram = damped_moments(moments, expert, error.device, damping, pseudo_rows)
            gain, outputs = leading_outputs(error, gram, rank)
            found[expert] = gain.cpu(), outputs.t().cpu(), (outputs.t() @ error).cpu()
        gains, columns, directions = (torch.cat(parts) for parts in zip(*found.values(), strict=True))
        owner = torch.repeat_interleave(
            torch.tensor(list(found)), torch.tensor([len(one[0]) for one in found.values()])
        )
        best = torch.topk(gains, min(slots, int((gains > 0).sum()))).indices
        taken = torch.bincount(owner[best], minlength=packed.num_experts)
        wanting = [expert for expert in wanting if int(taken[expert]) == rank < most]
        rank = min(2 * rank, most)
    return ChannelPool.from_directions(owner[best], directions[best], columns[best], packed.pool)


def leading_outputs(error: Tensor, gram: Gram, rank: int) -> tuple[Tensor, Tensor]:
    """The leading left singular vectors of `error · Q^(1/2)` and the squares of their singular values.

    Args:
        error: `(N, K)` float32.
        gram: `Q`.
        rank: how many, at most `min(N, K)` are given.

    Returns:
        `(r,)` and `(N, r)`, largest first; the same on every call.
    """
    rows = error.shape[0]
    rank = min(rank, *error.shape)
    if rows <= EXACT_ROWS:
        matrix = error @ gram.times(error.t().contiguous())
        values, vectors = torch.linalg.eigh((matrix + matrix.t()) / 2)
        return values.flip(0)[:rank].clamp(min=0), vectors.flip(1)[:, :rank]
    generator = torch.Generator().manual_seed(0)
    basis = torch.randn(rows, min(rank + _OVERSAMPLING, *error.shape), generator=generator).to(error.device)
    for _ in range(_ITERATIONS):  # Halko, Martinsson and Tropp, arXiv 0909.4061, algorithm 4.4
        basis = torch.linalg.qr(error @ gram.times(error.t() @ basis)).Q
    inside = error.t() @ basis
    values, vectors = torch.linalg.eigh(inside.t() @ gram.times(inside))
    return values.flip(0)[:rank].clamp(min=0), basis @ vectors.flip(1)[:, :rank]
