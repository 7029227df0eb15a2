"""Rule `"lowrank"`: the pool's slots hold the directions in which the quantized base errs most on the new data."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from moe_compiler.kernels.experts import PackedExpertLinear
from moe_compiler.kernels.pool import ChannelPool
from moe_compiler.passes.moments import Gram, SecondMoments
from moe_compiler.runtime.errors import precision, weight_error
from moe_compiler.runtime.master import LinearMaster
from moe_compiler.runtime.rules import checked_moments
from moe_compiler.runtime.sketch import OutputSketch, expected_outputs, sketch

EXACT_ROWS = 128
"""Up to so many rows or output features the singular vectors are computed exactly, above by subspace iteration."""

_LEAST_RANK = 8
_OVERSAMPLING = 8
_ITERATIONS = 4
_CAUTION = 2.0


@dataclass(frozen=True, eq=False)
class _Found:
    """Directions of one expert, the best first: gains `(r,)`, outputs `(r, N)` and directions `(r, K)`, on the host."""

    gain: Tensor
    outputs: Tensor
    directions: Tensor


def lowrank(
    master: LinearMaster,
    packed: PackedExpertLinear,
    moments: SecondMoments,
    sketches: dict[int, OutputSketch] | None = None,
) -> ChannelPool:
    """Rule `"lowrank"`: the best correction of rank `r` under the new data's second moments.

    For an error `D = W − Ŵ` and second moments `Q = XᵀX`, `tr((D − L)·Q·(D − L)ᵀ)` is least over all `L` of rank `r` at
    `L = A·Aᵀ·D`, with `A` the leading left singular vectors of the output error `D·Xᵀ` (Eckart and Young): a slot is an
    output `a_i` and a direction `a_iᵀ·D`, and gains `σ_i²`. The slots go to the largest gains over all experts of the
    layer. Our decision. `Q` is not damped: pseudo rows, a share of the layer's pooled second moments or a ridge were no
    better on held-out text, as a direction that few rows show gains little anyway.

    What each expert's directions should gain is foretold from the rows and the channels' errors, as if the errors of
    single weights were independent (see `expected_outputs`). Experts are taken in the order of their best foretold
    gain, and are searched for twice as many directions as would win slots; once an expert's best would win none even if
    it were twice as much more than foretold as that of any expert before, it and the rest are left out. Experts that
    win slots with all that was searched for are searched again, for twice as many.

    Needs second moments of the new data, a pool with directions (`pool="lowrank"`) and a master that has whole weights,
    `"memory"` or `"checkpoint"`. Costs four products of `n·K·q` multiplications for each expert, with `n` rows of new
    data and `q` about twice its slots (at least 16), and for each expert taken its dequantized weight, its original,
    and four products of `N·K·q` (see `sketch`); up to 128 rows or output features, products of `N·K·n` and `N·n·n` and
    one eigendecomposition instead. Where second moments are Hessians (more rows than `K`), a dozen products of `N·K·q`
    and `K·K·q`.

    Args:
        master: the original weights.
        packed: the quantized base.
        moments: second moments of the new data.
        sketches: where the output errors of the experts taken are put, as far as they were computed, for
            `output_errors`.

    Returns:
        The new contents, on the host. Slots that no direction needs stay idle.

    Raises:
        FloatingPointError: the second moments are not finite.
    """
    slots = packed.pool.direction.shape[0]
    count = moments.count
    used = count.nonzero().squeeze(1).tolist() if slots else []
    if not used:
        nothing = torch.empty(0, packed.out_features)
        return ChannelPool.from_columns(count.new_zeros(0), count.new_zeros(0), nothing, packed.pool)
    most = min(slots, packed.out_features, packed.in_features)
    foretold = _foretold(master, packed, moments, used, min(most, max(_LEAST_RANK, 2 * slots // len(used))))
    wins = _wins({expert: gain for expert, (gain, _) in foretold.items()}, slots)
    rank = {expert: min(most, max(_LEAST_RANK, 2 * won)) for expert, won in wins.items()}
    wanting = sorted(used, key=lambda expert: -float(foretold[expert][0][0]))
    found: dict[int, _Found] = {}
    excess = 0.0
    while wanting:
        for expert in wanting:
            best = float(foretold[expert][0][0])
            least = _least_gain([one.gain for one in found.values()], slots)
            if expert not in found and _CAUTION * excess * best < least:
                break
            gram = moments.expert(expert, packed.planes.device)
            found[expert], known = _search(master, packed, expert, gram, foretold[expert][1], rank[expert], moments)
            if sketches is not None and known is not None:
                sketches[expert] = known
            if best > 0:
                excess = max(excess, float(found[expert].gain[0]) / best)
        wins = _wins({expert: one.gain for expert, one in found.items()}, slots)
        wanting = [expert for expert in found if wins[expert] == rank[expert] < most]
        rank.update({expert: min(2 * rank[expert], most) for expert in wanting})
    gains, columns, directions = (
        torch.cat([getattr(one, field) for one in found.values()]) for field in ("gain", "outputs", "directions")
    )
    owner = torch.cat([torch.full_like(one.gain, expert, dtype=torch.int64) for expert, one in found.items()])
    chosen = torch.topk(gains, min(slots, int((gains > 0).sum()))).indices
    return ChannelPool.from_directions(owner[chosen], directions[chosen], columns[chosen], packed.pool)


def _foretold(
    master: LinearMaster, packed: PackedExpertLinear, moments: SecondMoments, used: Sequence[int], rank: int
) -> dict[int, tuple[Tensor, Tensor]]:
    """By expert, what `expected_outputs` says of its best directions; the gains on the host."""
    device, dtype = packed.planes.device, precision(packed, moments)
    block = _random(packed.in_features, rank + _OVERSAMPLING, device)
    result = {}
    for expert in used:
        gram = checked_moments(moments, expert, device)
        gain, start = expected_outputs(gram, master.error[expert].to(device), block, dtype)
        result[expert] = gain[:rank].cpu(), start
    return result


def _search(
    master: LinearMaster,
    packed: PackedExpertLinear,
    expert: int,
    gram: Gram,
    start: Tensor,
    rank: int,
    moments: SecondMoments,
) -> tuple[_Found, OutputSketch | None]:
    """The best `rank` directions of one expert, and its output error where that was computed."""
    dtype = precision(packed, moments)
    error = weight_error(master, packed, expert, dtype)
    known = None
    if gram.is_hessian:
        gain, outputs = leading_outputs(error.float(), gram, rank)
        directions = outputs.t().to(dtype) @ error
    elif min(gram.factor.shape[0], error.shape[0]) <= max(EXACT_ROWS, 2 * rank):
        image = F.linear(error, gram.factor.to(dtype))
        gain, outputs = leading_vectors(image, rank)
        directions = outputs.t().to(dtype) @ error
        known = OutputSketch.whole(image)
    else:
        rows = gram.factor.to(dtype)
        missing = _random(rows.shape[0], max(0, rank + _OVERSAMPLING - start.shape[1]), rows.device)
        start = torch.cat([start, (rows.t() @ missing.to(dtype)).float()], dim=1)[:, : rank + _OVERSAMPLING]
        gain, outputs, directions, known = sketch(error, rows, start, expert + 1)
        gain, outputs, directions = gain[:rank], outputs[:, :rank], directions[:rank]
    return _Found(gain.cpu(), outputs.t().cpu(), directions.float().cpu()), known


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
    return _random(matrix.shape[0], min(rank + _OVERSAMPLING, *matrix.shape), matrix.device)


def _random(size: int, width: int, device: torch.device) -> Tensor:
    """A random block `(size, width)`, the same on every call; no wider than long."""
    return torch.randn(size, min(size, width), generator=torch.Generator().manual_seed(0)).to(device)


def _leading(inside: Tensor, basis: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Eigenvalues and vectors of `basis · inside · basisᵀ`, the largest first."""
    values, vectors = torch.linalg.eigh((inside + inside.t()) / 2)
    return values.flip(0)[:rank].clamp(min=0), basis @ vectors.flip(1)[:, :rank]


def _least_gain(gains: Sequence[Tensor], slots: int) -> float:
    """What a direction must gain to win one of the slots, as far as is known."""
    known = torch.cat(list(gains)) if gains else torch.empty(0)
    return float(torch.topk(known, slots).values[-1]) if known.numel() >= slots else 0.0


def _wins(gains: Mapping[int, Tensor], slots: int) -> dict[int, int]:
    """How many of the slots the directions of each expert win."""
    least = _least_gain(list(gains.values()), slots)
    return {expert: int(((gain >= least) & (gain > 0)).sum()) for expert, gain in gains.items()}
