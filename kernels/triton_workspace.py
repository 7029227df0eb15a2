"""All experts of a packed linear as one dense weight in device memory, for a library's grouped matrix product.

Worth it where a weight is used by so many rows that reading and writing it once more costs less than unpacking it for
every block of them. One launch; nothing is read on the host, and experts without rows are skipped on the device.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from moe_compiler.kernels.packed import PackedTensors
from moe_compiler.kernels.triton_digits import dot

_BLOCK_N = 32
_SLOTS = 32  # of the pool, in one dot


def dequantize_experts(
    weight: PackedTensors, in_features: int, group_size: int, dtype: torch.dtype, offsets: Tensor | None = None
) -> Tensor:
    """`scale · (code - zero_point)` plus the pool's corrections, summed in float32 and rounded once.

    Args:
        weight: packed linear `(N, K)` of `E` experts.
        in_features: `K`.
        group_size: input channels of one scale: 16, 32, 64 or a multiple of 128.
        dtype: float16 or bfloat16.
        offsets: `(E + 1,)` int32, `Blocks.offsets`: experts without rows are skipped, and what the result holds for
            them is undefined. `None` dequantizes all.

    Returns:
        `(E, N, K)` in `dtype`.

    Raises:
        TypeError: `dtype` is neither float16 nor bfloat16.
    """
    if dtype not in (torch.float16, torch.bfloat16):
        raise TypeError(f"`dtype` must be float16 or bfloat16 to dequantize to, but is {dtype}")
    experts, features = weight.num_experts, weight.out_features
    out = torch.empty(experts, features, in_features, dtype=dtype, device=weight.planes.device)
    grid = (triton.cdiv(features, _BLOCK_N), triton.cdiv(in_features, 128), experts)
    _dequantize_kernel[grid](
        weight,
        offsets,
        out,
        N=features,
        K=in_features,
        GROUP=group_size,
        POOL=weight.pool_index.shape[0] > 0,
        DIRECTIONS=weight.pool_direction.shape[0] > 0,
        BLOCK_N=_BLOCK_N,
        SLOTS=_SLOTS,
        num_warps=4,
    )
    return out


@triton.jit
def _dequantize_kernel(
    weight: tl.tuple,
    offsets: tl.tensor,
    out: tl.tensor,
    N: tl.constexpr,
    K: tl.constexpr,
    GROUP: tl.constexpr,
    POOL: tl.constexpr,
    DIRECTIONS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    SLOTS: tl.constexpr,
) -> None:
    """`BLOCK_N` rows of one tile of 128 input channels of one expert.

    The shape `(BLOCK_N, 8, 16)` is the tile's own: digit position by half word. Writing the result takes most of the
    time, so the digits are unpacked by plain shifts, and by one loop for any number of planes.
    """
    DTYPE: tl.constexpr = out.dtype.element_ty
    GROUPS: tl.constexpr = (K + GROUP - 1) // GROUP
    tile = tl.program_id(1)
    expert = tl.program_id(2).to(tl.int64)
    if offsets is not None:  # noqa: SIM102
        if tl.load(offsets + expert) == tl.load(offsets + expert + 1):
            return
    feature = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    exists = feature < N
    row = tl.where(exists, feature, 0)
    P = tl.load(weight.table + 2 * expert)
    words = weight.planes + tl.load(weight.table + 2 * expert + 1).to(tl.int64) * 128 + tile * P * (N * 16)
    words += row[:, None, None] * 16 + tl.arange(0, 16)[None, None, :]
    position = tl.arange(0, 8)[None, :]
    code = tl.zeros((BLOCK_N, 8, 16), tl.int32)
    for plane in tl.range(0, P):
        word = tl.load(words + plane * (N * 16)).to(tl.int32)
        code = code * 4 + ((word >> (2 * position[:, :, None])) & 3)
    group = tl.minimum((tile * 128 + position * 16) // GROUP, GROUPS - 1)
    own = (expert * N + row[:, None]) * GROUPS + group
    scale = tl.load(weight.scale + own).to(tl.float32)
    unit = tl.where(P == 4, 1.0, tl.where(P == 3, 0.25, tl.where(P == 2, 0.0625, 0.015625)))
    zero_point = tl.load(weight.zero_point + own).to(tl.float32) * unit
    value = (code.to(tl.float32) - zero_point[:, :, None]) * scale[:, :, None]
    acc = value.reshape(BLOCK_N, 128)
    channel = tile * 128 + tl.arange(0, 128)[None, :]
    if POOL:
        end = tl.load(weight.pool_offset + expert + 1)
        for start in tl.range(tl.load(weight.pool_offset + expert), end, SLOTS, num_stages=1):
            slot = start + tl.arange(0, SLOTS)
            index = tl.load(weight.pool_index + slot, mask=slot < end, other=-1)
            factor = tl.load(weight.pool_scale + slot, mask=slot < end, other=0.0)
            inputs = (index[:, None] == channel).to(tl.float32)
            if DIRECTIONS:  # in units of 1/128, so that the columns, which hold the rest, are no subnormal numbers
                low_rank = index >= K
                direction = weight.pool_direction + (index - K)[:, None].to(tl.int64) * K + channel
                steps = tl.load(direction, mask=low_rank[:, None] & (channel < K), other=0).to(tl.float32)
                inputs = tl.where(low_rank[:, None], steps * 0.0078125, inputs)
                factor = tl.where(low_rank, factor * 128, factor)
            column = weight.pool_value + slot.to(tl.int64)[None, :] * N + row[:, None]
            delta = tl.load(column, mask=(slot < end)[None, :], other=0).to(tl.float32) * factor[None, :]
            acc = dot(delta.to(DTYPE), inputs.to(DTYPE), acc)
    target = out + (expert * N + feature[:, None]) * K + channel
    tl.store(target, acc.to(DTYPE), mask=exists[:, None] & (channel < K))
