"""Rule `"lowrank"`: the pool's slots hold the directions in which the quantized base errs most on the new data."""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from moe_compiler.kernels.experts import PackedExpertLinear
from moe_compiler.kernels.pool import ChannelPool
from moe_compiler.passes.moments import Gram, SecondMoments
from moe_compiler.runtime.errors import precision, weight_error
from moe_compiler.runtime.master import LinearMaster
from moe_compiler.runtime.rules import checked_moments

EXACT_ROWS = 128
"""Up to so many output features the singular vectors are computed exactly, above by subspace iteration."""

_LEAST_RANK = 16
_OVERSAMPLING = 8
_ITERATIONS = 4
_CAUTION = 2.0


def lowrank(
    master: LinearMaster,
    packed: PackedExpertLinear,
    moments: SecondMoments,
    energy: Tensor | None = None,
    images: dict[int, Tensor] | None = None,
) -> ChannelPool:
    """Rule `"lowrank"`: the best correction of rank `r` under the new data's second moments.

    For an error `D = W − Ŵ` and second moments `Q = XᵀX`, `tr((D − L)·Q·(D − L)ᵀ)` is least over all `L` of rank `r` at
    `L = A·Aᵀ·D`, with `A` the leading left singular vectors of the output error `D·Xᵀ` (Eckart and Young): a slot is an
    output `a_i` and a direction `a_iᵀ·D`, and gains `σ_i²`. The slots go to the largest gains over all experts of the
    layer. Our decision. `Q` is not damped: pseudo rows, a share of the layer's pooled second moments or a ridge were no
    better on held-out text, as a direction that few rows show gains little anyway.

    Experts are taken in the order of the error that they are expected to make, channel by channel; once even twice the
    largest share of its error that one direction had in any expert would win no slot, the rest are left out.

    Needs second moments of the new data, a pool with directions (`pool="lowrank"`) and a master that has whole weights,
    `"memory"` or `"checkpoint"`. Costs, for each expert taken, its dequantized weight and its original, products of
    `N·K·n` and `N·n·n` multiplications with `n` rows of new data and one of `N·K·q`, with `q` four times the slots per
    expert (at least 16), doubled for those experts that take them all. Where second moments are Hessians (more rows
    than `K`), a dozen products of `N·K·q` and `K·K·q`; up to 128 output features one eigendecomposition of `(N, N)`.

    Args:
        master: the original weights.
        packed: the quantized base.
        moments: second moments of the new data.
        energy: `(E, K)`, the sum of `g²·x_c²` on the new data, to leave out experts by; `None` takes all that have
            rows.
        images: where the output errors `(N, n)` of the experts taken are put, for `output_errors`.

    Returns:
        The new contents, on the host. Slots that no direction needs stay idle.
    """
    slots = packed.pool.direction.shape[0]
    count = moments.count
    used = count.nonzero().squeeze(1) if slots else count.new_zeros(0)
    if not used.numel():
        nothing = torch.empty(0, packed.out_features)
        return ChannelPool.from_columns(count.new_zeros(0), count.new_zeros(0), nothing, packed.pool)
    expected = (master.error * energy.float().cpu()).sum(dim=1) if energy is not None else None
    if expected is not None:
        used = used[expected[used].argsort(descending=True, stable=True)]
    most = min(slots, packed.out_features, packed.in_features)
    rank = min(most, max(_LEAST_RANK, 4 * slots // used.numel()))
    dtype = precision(packed, moments)
    found: dict[int, tuple[Tensor, Tensor, Tensor]] = {}
    wanting = used.tolist()
    share = 0.0
    while wanting:
        for expert in wanting:
            if expected is not None and expert not in found:
                least = _least_gain(found, slots)
                if _CAUTION * share * float(expected[expert]) < least:
                    break
            error = weight_error(master, packed, expert, dtype)
            gram = checked_moments(moments, expert, error.device)
            if gram.is_hessian:
                gain, outputs = leading_outputs(error.float(), gram, rank)
            else:
                image = F.linear(error, gram.factor.to(dtype))
                gain, outputs = leading_vectors(image, rank)
                if images is not None:
                    images[expert] = image
            if expected is not None and expected[expert] > 0:
                share = max(share, float(gain[0] / expected[expert]))
            directions = outputs.t().to(dtype) @ error
            found[expert] = gain.cpu(), outputs.t().cpu(), directions.float().cpu()
        gains, columns, directions = (torch.cat(parts) for parts in zip(*found.values(), strict=True))
        owner = torch.repeat_interleave(
            torch.tensor(list(found)), torch.tensor([len(one[0]) for one in found.values()])
        )
        best = torch.topk(gains, min(slots, int((gains > 0).sum()))).indices
        taken = torch.bincount(owner[best], minlength=packed.num_experts)
        wanting = [expert for expert in found if int(taken[expert]) == rank < most]
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
        return _leading(error @ gram.times(error.t().contiguous()), torch.eye(rows, device=error.device), rank)
    basis = _start(error, rank)
    for _ in range(_ITERATIONS):  # Halko, Martinsson and Tropp, arXiv 0909.4061, algorithm 4.4
        basis = torch.linalg.qr(error @ gram.times(error.t() @ basis)).Q
    inside = error.t() @ basis
    return _leading(inside.t() @ gram.times(inside), basis, rank)


def leading_vectors(image: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """The leading left singular vectors of a matrix and the squares of their singular values.

    Args:
        image: `(N, n)` float32 or bfloat16.
        rank: how many, at most `min(N, n)` are given.

    Returns:
        `(r,)` and `(N, r)` float32, largest first; the same on every call. Vectors whose singular value is nearly 0
        have no meaning.
    """
    rank = min(rank, *image.shape)
    tall = image.shape[0] > image.shape[1]
    full = image.float()
    small = full.t() @ full if tall else full @ full.t()
    basis = torch.eye(small.shape[0], device=image.device)
    if small.shape[0] > EXACT_ROWS:
        basis = _start(small, rank)
        for _ in range(_ITERATIONS):  # as above
            basis = torch.linalg.qr(small @ basis).Q
    gain, vectors = _leading(basis.t() @ (small @ basis), basis, rank)
    if tall:
        vectors = F.normalize((image @ vectors.to(image.dtype)).float(), dim=0)
    return gain, vectors


def _start(matrix: Tensor, rank: int) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    width = min(rank + _OVERSAMPLING, *matrix.shape)
    return torch.randn(matrix.shape[0], width, generator=generator).to(matrix.device)


def _leading(inside: Tensor, basis: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Eigenvalues and vectors of `basis · inside · basisᵀ`, the largest first."""
    values, vectors = torch.linalg.eigh((inside + inside.t()) / 2)
    return values.flip(0)[:rank].clamp(min=0), basis @ vectors.flip(1)[:, :rank]


def _least_gain(found: Mapping[int, tuple[Tensor, Tensor, Tensor]], slots: int) -> float:
    """What a direction must gain to win one of the slots, as far as is known."""
    gains = torch.cat([one[0] for one in found.values()]) if found else torch.empty(0)
    return float(torch.topk(gains, slots).values[-1]) if gains.numel() >= slots else 0.0
