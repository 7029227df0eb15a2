"""Random packed linears for tests."""

from collections.abc import Sequence

import torch
from torch import Tensor

from moe_compiler.kernels.affine import QuantizedWeight
from moe_compiler.kernels.experts import PackedExpertLinear
from moe_compiler.kernels.pool import ChannelPool


def random_packed(
    bits: Sequence[int],
    out_features: int,
    in_features: int,
    *,
    slots: int = 0,
    directions: int = 0,
    group_size: int = 32,
    seed: int = 0,
) -> PackedExpertLinear:
    """Experts with random codes, scales and zero points, and a pool in which `slots` random slots are used, or as many
    low-rank ones as `directions` says.
    """
    generator = torch.Generator().manual_seed(seed)
    experts, groups = len(bits), -(-in_features // group_size)
    shape = (experts, out_features, groups)
    codes, zero_points = [], []
    for width in bits:
        codes.append(torch.randint(0, 1 << width, (out_features, in_features), generator=generator))
        zero_points.append(torch.randint(0, 256, shape[1:], generator=generator) / 2 ** (8 - width))
    quantized = QuantizedWeight(
        codes=torch.stack(codes).to(torch.uint8),
        scale=(torch.rand(shape, generator=generator) * 0.1 + 0.01).half().float(),
        zero_point=torch.stack(zero_points),
        bits=tuple(bits),
        group_size=group_size,
    )
    packed = PackedExpertLinear.from_quantized(
        quantized, pool_capacity=max(slots, directions) + 2, pool_directions=directions
    )
    if slots:
        places = torch.randperm(experts * in_features, generator=generator)[:slots]
        columns = torch.randn(slots, out_features, generator=generator)
        packed.pool.copy_(ChannelPool.from_columns(places // in_features, places % in_features, columns, packed.pool))
    if directions:
        of = torch.randint(0, experts, (directions,), generator=generator)
        u, v = (torch.randn(directions, size, generator=generator) for size in (in_features, out_features))
        packed.pool.copy_(ChannelPool.from_directions(of, u / in_features**0.5, v, packed.pool))
    return packed


def op_arguments(packed: PackedExpertLinear, x: Tensor, ids: Tensor, bias: Tensor | None = None) -> tuple:
    """The arguments of `packed_expert_linear`."""
    return (x, ids, list(packed.tensors), bias, packed.group_size)
