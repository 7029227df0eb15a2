"""The channel pool inside a Triton kernel: some slots are one more step of the matrix product.

Slot `s` of the program's expert adds `pool_scale[s] · pool_value[s, :] · x[:, pool_index[s]]`. The slots' columns are
the first operand of a dot and the channels of `x` that they name, gathered, the second one. For a low-rank slot the
channel is a product of `x` and a direction: `project` computes those of all directions before.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from moe_compiler.kernels.triton_digits import dot
from moe_compiler.kernels.triton_routing import program_block

_UNIT = tl.constexpr(2.0**-7)  # of a direction's INT8 values: keeps projections in the range of float16
_BLOCK_DIRECTIONS, _BLOCK_ROWS, _BLOCK_CHANNELS = 32, 16, 128


@triton.jit
def load_slots(
    first: tl.tensor,
    end: tl.tensor,
    x: tl.tensor,
    x_mask: tl.tensor,
    projected: tl.tensor,
    feature: tl.tensor,
    exists: tl.tensor,
    weight: tl.tuple,
    N: tl.constexpr,
    K: tl.constexpr,
    SLOTS: tl.constexpr,
) -> tl.tensor:
    """Slots `first` up to `first + SLOTS` as loaded, zeros from `end` on: the operands for `columns`.

    Args:
        first: number of a slot.
        end: the first slot that is another expert's.
        x: `(1, rows)` pointers to the rows of `x`.
        x_mask: `(1, rows)`, those that exist.
        projected: `(1, rows)` pointers to those of `project`, or `None` for a pool without directions.
        feature: `(features,)`, output features.
        exists: `(features,)`, those that exist.
        weight: `PackedTensors`.
        N: output features of an expert.
        K: input features.
        SLOTS: a multiple of 16.

    Returns:
        `(x_slots, value, scale)`: the slots' channels of `x` `(SLOTS, rows)`, `(features, SLOTS)` int8 and `(SLOTS,)`.
    """
    slot = first + tl.arange(0, SLOTS)
    used = slot < end
    value_mask = exists[:, None] & used[None, :]
    value = tl.load(weight.pool_value + slot.to(tl.int64)[None, :] * N + feature[:, None], mask=value_mask, other=0)
    scale = tl.load(weight.pool_scale + slot, mask=used, other=0.0)
    index = tl.load(weight.pool_index + slot, mask=used, other=0)
    x_slots = tl.load(x + index[:, None], mask=x_mask & (used & (index < K))[:, None], other=0.0)
    if projected is not None:
        low_rank = used & (index >= K)
        from_directions = tl.load(projected + (index - K)[:, None], mask=x_mask & low_rank[:, None], other=0.0)
        x_slots = tl.where(low_rank[:, None], from_directions, x_slots)
        scale = tl.where(low_rank, scale / _UNIT, scale)
    return x_slots, value, scale


@triton.jit
def columns(value: tl.tensor, scale: tl.tensor, DTYPE: tl.constexpr) -> tl.tensor:
    """The slots' columns `(features, SLOTS)` in `DTYPE`, of what `load_slots` returned."""
    return (value.to(tl.float32) * scale[None, :]).to(DTYPE)


@triton.jit(do_not_specialize=["num_rows"])
def project_kernel(
    x: tl.tensor,
    direction: tl.tensor,
    out: tl.tensor,
    num_rows: tl.tensor,
    D: tl.constexpr,
    K: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
) -> None:
    """A tile of `out = x · directionᵀ · 2**-7`."""
    block, first_direction = program_block(D, BLOCK_D)
    direction_id = first_direction + tl.arange(0, BLOCK_D)
    row = block * BLOCK_M + tl.arange(0, BLOCK_M)
    acc = tl.zeros((BLOCK_D, BLOCK_M), tl.float32)
    for first in tl.range(0, K, BLOCK_K):
        channel = first + tl.arange(0, BLOCK_K)
        inside = channel < K
        u = tl.load(
            direction + direction_id[:, None] * K + channel[None, :],
            mask=(direction_id < D)[:, None] & inside[None, :],
            other=0,
        )
        value = tl.load(
            x + row.to(tl.int64)[None, :] * K + channel[:, None],
            mask=(row < num_rows)[None, :] & inside[:, None],
            other=0.0,
        )
        acc = dot(u.to(tl.float32).to(x.dtype.element_ty), value, acc)
    target = out + row.to(tl.int64)[None, :] * D + direction_id[:, None]
    mask = (row < num_rows)[None, :] & (direction_id < D)[:, None]
    tl.store(target, (acc * _UNIT).to(out.dtype.element_ty), mask=mask)


def project(x: Tensor, direction: Tensor) -> Tensor | None:
    """Products of rows and directions, for `load_slots`.

    Args:
        x: `(rows, K)` float16 or bfloat16, contiguous.
        direction: `(D, K)` int8, `PackedTensors.pool_direction`.

    Returns:
        `(rows, D)` in the dtype of `x`, times `2**-7`, or `None` if there are no directions.
    """
    rows, directions = x.shape[0], direction.shape[0]
    if not directions:
        return None
    out = torch.empty(rows, directions, dtype=x.dtype, device=x.device)
    if rows:
        project_kernel[(triton.cdiv(directions, _BLOCK_DIRECTIONS) * triton.cdiv(rows, _BLOCK_ROWS),)](
            x,
            direction,
            out,
            rows,
            D=directions,
            K=x.shape[1],
            BLOCK_D=_BLOCK_DIRECTIONS,
            BLOCK_M=_BLOCK_ROWS,
            BLOCK_K=_BLOCK_CHANNELS,
            num_warps=2,
            num_stages=3,
        )
    return out
