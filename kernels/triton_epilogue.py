"""What the experts' Triton kernels do after their matrix product: activation, writing, the sum over experts."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

_COMBINE_COLUMNS = 512


@triton.jit
def _sigmoid(x: tl.tensor) -> tl.tensor:
    """Without overflow: `exp` sees no positive number."""
    small = tl.exp(-tl.abs(x))
    return tl.where(x < 0.0, small, 1.0) / (1.0 + small)


@triton.jit
def activate(x: tl.tensor, ACTIVATION: tl.constexpr) -> tl.tensor:
    """`x` float32 through one of `moe_compiler.kernels.activation.ACTIVATIONS`."""
    if ACTIVATION == "silu":
        return x * _sigmoid(x)
    elif ACTIVATION == "gelu":
        return 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))
    elif ACTIVATION == "gelu_tanh":
        return x * _sigmoid(1.5957691216057308 * (x + 0.044715 * x * x * x))  # tanh(u) = 2·sigmoid(2u) - 1
    else:
        tl.static_assert(ACTIVATION == "relu", "unknown activation")
        return tl.where(x < 0.0, 0.0, x)


@triton.jit
def clear_foreign_rows(
    out: tl.tensor,
    order: tl.tensor,
    offsets: tl.tensor,
    num_rows: tl.tensor,
    block: tl.tensor,
    columns: tl.tensor,
    column_mask: tl.tensor,
    E: tl.constexpr,
    N: tl.constexpr,
    BLOCK_M: tl.constexpr,
) -> None:
    """Writes zeros to rows that no expert here computes: the share of one block, which may be an unused one.

    They are the last ones of `order`. A grid of `max_blocks` blocks covers all rows, so these too.

    Args:
        out: pointer to `(R, N)`.
        order: pointer to `Blocks.order`.
        offsets: pointer to `Blocks.offsets`.
        num_rows: `R`.
        block: number of the block.
        columns: `(columns,)` columns of the program.
        column_mask: those that exist.
        E: experts.
        N: columns of `out`.
        BLOCK_M: rows of a block.
    """
    first = tl.load(offsets + E) + block * BLOCK_M
    if first < num_rows:
        position = first + tl.arange(0, BLOCK_M)
        row = tl.load(order + position, mask=position < num_rows, other=0).to(tl.int64)
        mask = (position < num_rows)[None, :] & column_mask[:, None]
        zeros = tl.zeros((columns.shape[0], BLOCK_M), out.dtype.element_ty)
        tl.store(out + row[None, :] * N + columns[:, None], zeros, mask=mask)


@triton.jit
def write_block(
    acc: tl.tensor,
    out: tl.tensor,
    routing_weights: tl.tensor,
    row: tl.tensor,
    valid: tl.tensor,
    column: tl.tensor,
    exists: tl.tensor,
    WIDTH: tl.constexpr,
    ACTIVATION: tl.constexpr,
    ATOMIC: tl.constexpr,
    TOP_K: tl.constexpr,
) -> None:
    """Writes what a block's rows make of some columns, in the dtype of `out`.

    Args:
        acc: `(columns, rows)` float32; with an activation `(2·columns, rows)`, the gate's rows first.
        out: pointer to `(R, WIDTH)`, or `(R / TOP_K, WIDTH)` float32 if `ATOMIC`.
        routing_weights: pointer to `(R,)`, to multiply rows with, or `None`.
        row: `(rows,)`.
        valid: `(rows,)`, those that exist.
        column: `(columns,)`.
        exists: `(columns,)`, those that exist.
        WIDTH: columns of `out`.
        ACTIVATION: see `activate`; `None` for none.
        ATOMIC: adds rows to their tokens instead of storing them.
        TOP_K: rows of one token.
    """
    if ACTIVATION is not None:
        gate, up = acc.reshape(2, column.shape[0], row.shape[0]).permute(1, 2, 0).split()
        acc = activate(gate, ACTIVATION) * up
    if routing_weights is not None:
        acc *= tl.load(routing_weights + row, mask=valid, other=0.0).to(tl.float32)[None, :]
    mask = exists[:, None] & valid[None, :]
    if ATOMIC:
        target = out + (row // TOP_K).to(tl.int64)[None, :] * WIDTH + column[:, None]
        tl.atomic_add(target, acc, mask=mask, sem="relaxed")
    else:
        target = out + row.to(tl.int64)[None, :] * WIDTH + column[:, None]
        tl.store(target, acc.to(out.dtype.element_ty), mask=mask)


@triton.jit
def _combine_kernel(
    partial: tl.tensor,
    expert_ids: tl.tensor,
    out: tl.tensor,
    N: tl.constexpr,
    E: tl.constexpr,
    TOP_K: tl.constexpr,
    BLOCK_N: tl.constexpr,
) -> None:
    token = tl.program_id(0)
    columns = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    total = tl.zeros((BLOCK_N,), tl.float32)
    for i in tl.static_range(TOP_K):
        row = token * TOP_K + i
        expert = tl.load(expert_ids + row)
        if (expert >= 0) & (expert < E):
            total += tl.load(partial + row.to(tl.int64) * N + columns, mask=columns < N, other=0.0)
    tl.store(out + token.to(tl.int64) * N + columns, total.to(out.dtype.element_ty), mask=columns < N)


def combine(partial: Tensor, expert_ids: Tensor, num_experts: int, top_k: int, dtype: torch.dtype) -> Tensor:
    """Sums the outputs of each token's experts, in their order: the same bits on every run.

    Args:
        partial: `(R, N)` float32, outputs times routing weights; rows of foreign experts are not read.
        expert_ids: `(R,)` integers, contiguous.
        num_experts: `E`.
        top_k: rows of one token `k`.
        dtype: of the result.

    Returns:
        `(R / k, N)` in `dtype`.
    """
    tokens, columns = partial.shape[0] // top_k, partial.shape[1]
    out = torch.empty(tokens, columns, dtype=dtype, device=partial.device)
    if tokens:
        grid = (tokens, triton.cdiv(columns, _COMBINE_COLUMNS))
        _combine_kernel[grid](
            partial, expert_ids, out, N=columns, E=num_experts, TOP_K=top_k, BLOCK_N=_COMBINE_COLUMNS, num_warps=4
        )
    return out
