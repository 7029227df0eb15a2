"""Experts over dense weights: for so many rows per expert that writing out its weights once more pays.

Each linear is dequantized to a workspace and multiplied by PyTorch's grouped matrix product. Rows stay sorted by expert
from the first product to the last: gather, product, activation, product, weighted sum over each token's experts.
Nothing is read on the host.

`torch.nn.functional.grouped_mm` is one kernel for bfloat16 on Hopper and on Blackwell's data-center chips. For other
dtypes and chips torch 2.11 to 2.13 copies the offsets to the host and runs one product per expert, which a CUDA graph
cannot capture, so a plain Triton kernel takes its place there.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from moe_compiler.kernels.activation import ACTIVATIONS
from moe_compiler.kernels.packed import PackedTensors
from moe_compiler.kernels.triton_digits import dot
from moe_compiler.kernels.triton_epilogue import activate
from moe_compiler.kernels.triton_routing import Blocks, program_block
from moe_compiler.kernels.triton_workspace import dequantize_experts

_COLUMNS = 256  # of a program that copies rows
_BLOCK_N, _BLOCK_K, _STAGES = 128, 64, 3  # of the Triton product
_LIBRARY_ALIGNMENT = 16  # bytes, of the rows of both operands


def workspace_bytes(weight: PackedTensors, in_features: int, dtype: torch.dtype) -> int:
    """Bytes of the dense weight of one linear, which exists while it is multiplied.

    Args:
        weight: packed linear `(N, K)` of `E` experts.
        in_features: `K`.
        dtype: of the activations.
    """
    return weight.num_experts * weight.out_features * in_features * dtype.itemsize


def gate_up_dense(
    x: Tensor,
    blocks: Blocks,
    weight: PackedTensors,
    bias: Tensor | None,
    activation: str,
    group_size: int,
    top_k: int,
) -> Tensor:
    """`act(gate(x)) · up(x)` of each row's expert, sorted by expert.

    Args:
        x: `(T, H)` float16 or bfloat16.
        blocks: the `T·k` rows by expert.
        weight: packed linear `(2I, H)`, the gate's rows first.
        bias: `(E, 2I)` or `None`.
        activation: one of `moe_compiler.kernels.activation.ACTIVATIONS`.
        group_size: input channels of one scale: 16, 32, 64 or a multiple of 128.
        top_k: rows of one token `k`.

    Returns:
        `(T·k, I)` in the dtype of `x`; row `i` is row `blocks.order[i]` of the batch. Those of foreign experts, which
        come last, are undefined.

    Raises:
        TypeError: `x` is neither float16 nor bfloat16.
        ValueError: `activation` is not known.
    """
    if activation not in ACTIVATIONS:
        raise ValueError(f"`activation` must be one of {', '.join(ACTIVATIONS)}, but is {activation!r}")
    z = _sorted_product(x, blocks, weight, group_size, top_k)
    h = torch.empty(z.shape[0], z.shape[1] // 2, dtype=x.dtype, device=x.device)
    _finish(z, blocks, bias, h, activation)
    return h


def down_dense(
    h: Tensor,
    blocks: Blocks,
    routing_weights: Tensor,
    weight: PackedTensors,
    bias: Tensor | None,
    group_size: int,
) -> Tensor:
    """`Σ_k w_k · (W h_k + b)` over the experts of each token, in their order: the same bits on every run.

    `W h_k` is rounded to the dtype of `h`, as the library's product stores it; the sum is float32.

    Args:
        h: `(T·k, I)` sorted by expert, as from `gate_up_dense`.
        blocks: the rows by expert.
        routing_weights: `(T, k)`, any floating dtype.
        weight: packed linear `(H, I)`.
        bias: `(E, H)` or `None`.
        group_size: input channels of one scale: 16, 32, 64 or a multiple of 128.

    Returns:
        `(T, H)` in the dtype of `h`.

    Raises:
        TypeError: `h` is neither float16 nor bfloat16.
    """
    (tokens, top_k), columns = routing_weights.shape, weight.out_features
    out = torch.empty(tokens, columns, dtype=h.dtype, device=h.device)
    if tokens == 0:
        return out
    dense = dequantize_experts(weight, h.shape[1], group_size, h.dtype, blocks.offsets)
    y = grouped_linear(h, blocks, dense)
    place = torch.full((tokens * top_k, 2), -1, dtype=torch.int32, device=h.device)
    _invert_kernel[(blocks.record.shape[0],)](
        blocks.record, blocks.order, place, BLOCK_M=triton.next_power_of_2(blocks.block_m)
    )
    _combine_kernel[tokens, triton.cdiv(columns, _COLUMNS)](
        y,
        place,
        routing_weights.contiguous(),
        None if bias is None else bias.contiguous(),
        out,
        WIDTH=columns,
        TOP_K=top_k,
        COLUMNS=_COLUMNS,
    )
    return out


def linear_dense(
    x: Tensor, expert_ids: Tensor, blocks: Blocks, weight: PackedTensors, bias: Tensor | None, group_size: int
) -> Tensor:
    """`W x + b` of each row's expert.

    Args:
        x: `(T, K)` or `(R, K)`, float16 or bfloat16; row `r` reads `x[r // (R / x.shape[0])]`.
        expert_ids: `(R,)` int64.
        blocks: the rows by expert.
        weight: packed linear `(N, K)`.
        bias: `(E, N)` or `None`.
        group_size: input channels of one scale: 16, 32, 64 or a multiple of 128.

    Returns:
        `(R, N)` in the dtype of `x`, in the order of `expert_ids`; the rows of foreign experts are 0.

    Raises:
        TypeError: `x` is neither float16 nor bfloat16.
    """
    y = _sorted_product(x, blocks, weight, group_size, max(1, expert_ids.shape[0] // max(1, x.shape[0])))
    out = torch.zeros_like(y)
    _finish(y, blocks, bias, out, None)
    return out


def grouped_linear(x: Tensor, blocks: Blocks, weight: Tensor) -> Tensor:
    """Each expert's rows times its weight.

    Args:
        x: `(R, K)`, sorted by expert.
        blocks: the rows by expert.
        weight: `(E, N, K)` in the dtype of `x`; not read for experts without rows.

    Returns:
        `(R, N)` in the dtype of `x`. Rows of foreign experts, which come last, are undefined.
    """
    if library_runs_on_device(x, weight):
        return F.grouped_mm(x, weight.transpose(1, 2), offs=blocks.offsets[1:])
    (rows, in_features), out_features = x.shape, weight.shape[1]
    out = torch.empty(rows, out_features, dtype=x.dtype, device=x.device)
    if rows:
        block_m = max(16, triton.next_power_of_2(blocks.block_m))
        _grouped_kernel[(triton.cdiv(out_features, _BLOCK_N) * blocks.record.shape[0],)](
            x.contiguous(),
            weight,
            blocks.record,
            out,
            N=out_features,
            K=in_features,
            BLOCK_N=_BLOCK_N,
            BLOCK_M=block_m,
            BLOCK_K=_BLOCK_K,
            num_warps=8 if block_m >= 128 else 4,
            num_stages=_STAGES,
        )
    return out


def library_runs_on_device(x: Tensor, weight: Tensor) -> bool:
    """Whether PyTorch's grouped product is one kernel for these operands, which reads its offsets on the device.

    Args:
        x: `(R, K)`.
        weight: `(E, N, K)`.
    """
    if x.device.type != "cuda" or torch.version.hip is not None or x.dtype != torch.bfloat16 or x.shape[0] == 0:
        return False
    if torch.cuda.get_device_capability(x.device)[0] not in (9, 10):
        return False
    return all(size * x.element_size() % _LIBRARY_ALIGNMENT == 0 for size in (x.shape[1], weight.shape[1]))


def _sorted_product(x: Tensor, blocks: Blocks, weight: PackedTensors, group_size: int, repeat: int) -> Tensor:
    """`W x` of each row's expert, sorted by expert; `repeat` rows share a row of `x`."""
    dense = dequantize_experts(weight, x.shape[1], group_size, x.dtype, blocks.offsets)
    return grouped_linear(x[blocks.order // repeat], blocks, dense)


def _finish(z: Tensor, blocks: Blocks, bias: Tensor | None, out: Tensor, activation: str | None) -> None:
    """Adds the bias to sorted rows `z` and writes them, activated in their order or plain in that of the batch."""
    columns = out.shape[1]
    if out.shape[0]:
        _finish_kernel[blocks.record.shape[0], triton.cdiv(columns, _COLUMNS)](
            z,
            blocks.record,
            blocks.order,
            None if bias is None else bias.contiguous(),
            out,
            WIDTH=columns,
            ACTIVATION=activation,
            COLUMNS=_COLUMNS,
        )


@triton.jit
def _grouped_kernel(
    x: tl.tensor,
    weight: tl.tensor,
    record: tl.tensor,
    out: tl.tensor,
    N: tl.constexpr,
    K: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
) -> None:
    number, first_column = program_block(N, BLOCK_N)
    block = record + 4 * number
    expert = tl.load(block)
    if expert < 0:
        return
    lane = tl.arange(0, BLOCK_M)
    size = tl.load(block + 2)
    row = (tl.load(block + 1) + tl.minimum(lane, size - 1)).to(tl.int64)[:, None]
    column = first_column + tl.arange(0, BLOCK_N)
    exists = column < N
    step = tl.arange(0, BLOCK_K)
    x += row * K + step[None, :]
    weight += expert.to(tl.int64) * N * K + tl.where(exists, column, 0)[None, :] * K + step[:, None]
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for first in tl.range(0, K, BLOCK_K):
        if K % BLOCK_K == 0:
            a, b = tl.load(x + first), tl.load(weight + first)
        else:
            inside = step < K - first
            a = tl.load(x + first, mask=inside[None, :], other=0.0)
            b = tl.load(weight + first, mask=inside[:, None], other=0.0)
        acc = dot(a, b, acc)
    mask = (lane < size)[:, None] & exists[None, :]
    tl.store(out + row * N + column[None, :], acc.to(out.dtype.element_ty), mask=mask)


@triton.jit
def _finish_kernel(
    z: tl.tensor,
    record: tl.tensor,
    order: tl.tensor,
    bias: tl.tensor,
    out: tl.tensor,
    WIDTH: tl.constexpr,
    ACTIVATION: tl.constexpr,
    COLUMNS: tl.constexpr,
) -> None:
    """One block of rows, `COLUMNS` columns of `out`."""
    expert = tl.load(record + 4 * tl.program_id(0)).to(tl.int64)
    first = tl.load(record + 4 * tl.program_id(0) + 1).to(tl.int64)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    exists = column < WIDTH
    for lane in tl.range(0, tl.load(record + 4 * tl.program_id(0) + 2)):
        position = first + lane
        if ACTIVATION is None:
            value = tl.load(z + position * WIDTH + column, mask=exists, other=0.0).to(tl.float32)
            if bias is not None:
                value += tl.load(bias + expert * WIDTH + column, mask=exists, other=0.0).to(tl.float32)
            target = tl.load(order + position).to(tl.int64)
        else:
            half = z + position * (2 * WIDTH) + column
            gate = tl.load(half, mask=exists, other=0.0).to(tl.float32)
            up = tl.load(half + WIDTH, mask=exists, other=0.0).to(tl.float32)
            if bias is not None:
                own = bias + expert * (2 * WIDTH) + column
                gate += tl.load(own, mask=exists, other=0.0).to(tl.float32)
                up += tl.load(own + WIDTH, mask=exists, other=0.0).to(tl.float32)
            value = activate(gate, ACTIVATION) * up
            target = position
        tl.store(out + target * WIDTH + column, value.to(out.dtype.element_ty), mask=exists)


@triton.jit
def _invert_kernel(record: tl.tensor, order: tl.tensor, place: tl.tensor, BLOCK_M: tl.constexpr) -> None:
    """For each row of a block its position in `order` and its expert, `place` `(R, 2)`."""
    block = record + 4 * tl.program_id(0)
    expert, first, size = tl.load(block), tl.load(block + 1), tl.load(block + 2)
    lane = tl.arange(0, BLOCK_M)
    row = tl.load(order + first + lane, mask=lane < size, other=0)
    tl.store(place + 2 * row, first + lane, mask=lane < size)
    tl.store(place + 2 * row + 1, expert + lane * 0, mask=lane < size)


@triton.jit
def _combine_kernel(
    y: tl.tensor,
    place: tl.tensor,
    routing_weights: tl.tensor,
    bias: tl.tensor,
    out: tl.tensor,
    WIDTH: tl.constexpr,
    TOP_K: tl.constexpr,
    COLUMNS: tl.constexpr,
) -> None:
    """One token, `COLUMNS` columns of `out`."""
    token = tl.program_id(0)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    total = tl.zeros((COLUMNS,), tl.float32)
    for choice in tl.static_range(TOP_K):
        row = token * TOP_K + choice
        position, expert = tl.load(place + 2 * row).to(tl.int64), tl.load(place + 2 * row + 1).to(tl.int64)
        mask = column < tl.where(expert >= 0, WIDTH, 0)
        value = tl.load(y + position * WIDTH + column, mask=mask, other=0.0).to(tl.float32)
        if bias is not None:
            value += tl.load(bias + expert * WIDTH + column, mask=mask, other=0.0).to(tl.float32)
        total += tl.load(routing_weights + row).to(tl.float32) * value
    tl.store(out + token.to(tl.int64) * WIDTH + column, total.to(out.dtype.element_ty), mask=column < WIDTH)
