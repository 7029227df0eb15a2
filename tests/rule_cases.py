"""Small quantized linears and second moments for the tests of rules and masters."""

import torch
from torch import Tensor

from moe_compiler.kernels.experts import PackedExpertLinear
from moe_compiler.passes.moments import HessianMoments, RowMoments
from moe_compiler.passes.quantize import quantize_experts
from moe_compiler.runtime.master import MemoryMaster, channel_error

EXPERTS, ROWS, COLUMNS = 4, 24, 128


def quantized_pair(capacity: int = 6, directions: int = 0, seed: int = 1) -> tuple[Tensor, PackedExpertLinear, Tensor]:
    """A weight `(4, 24, 128)`, its quantized form with a pool, and the energy of its channels."""
    weight = torch.randn(EXPERTS, ROWS, COLUMNS, generator=torch.Generator().manual_seed(seed))
    quantized = quantize_experts("rtn", weight, None, [2, 4, 2, 8], 128)
    packed = PackedExpertLinear.from_quantized(quantized, capacity, directions)
    energy = torch.rand(EXPERTS, COLUMNS, dtype=torch.float64, generator=torch.Generator().manual_seed(seed + 1))
    return weight, packed, energy


def whole_master(weight: Tensor, packed: PackedExpertLinear) -> MemoryMaster:
    """A master that has all of `weight`."""
    return MemoryMaster.of(weight, channel_error(weight, packed))


def row_moments(tokens: int = 100, seed: int = 0, top_k: int = 2) -> RowMoments:
    """Rows of which each goes to `top_k` experts; their channels correlate."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(COLUMNS, COLUMNS, generator=generator) / COLUMNS**0.5
    rows = torch.randn(tokens, COLUMNS, generator=generator) @ (mixing + torch.eye(COLUMNS))
    ids = torch.stack([torch.randperm(EXPERTS + 1, generator=generator)[:top_k] for _ in range(tokens)])
    gate = torch.rand(tokens * top_k, generator=generator)
    return RowMoments(rows, ids.flatten(), gate, EXPERTS)


def hessian_moments(rows: RowMoments) -> HessianMoments:
    """The same second moments as Hessians."""
    grams = []
    for expert in range(EXPERTS):
        pairs = rows.expert_ids == expert
        mine = rows.rows.repeat_interleave(pairs.shape[0] // rows.rows.shape[0], 0)[pairs] * rows.gate[pairs][:, None]
        grams.append(mine.T @ mine)
    return HessianMoments(torch.stack(grams), rows.count)


def energy_of(moments: HessianMoments) -> Tensor:
    """The energy of each channel, `(E, K)` float64."""
    return moments.hessian.diagonal(dim1=1, dim2=2).double()
