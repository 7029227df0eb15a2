"""Launching the Triton kernels for few tokens per expert, see `moe_compiler.kernels.triton_decode_kernels`."""

from __future__ import annotations

from typing import Any

import torch
import triton
from torch import Tensor

from moe_compiler.kernels.activation import ACTIVATIONS
from moe_compiler.kernels.packed import PackedTensors
from moe_compiler.kernels.planes import TILE
from moe_compiler.kernels.tiles import Tile
from moe_compiler.kernels.triton_decode_kernels import gate_up_kernel, linear_kernel
from moe_compiler.kernels.triton_digits import inline_assembly
from moe_compiler.kernels.triton_epilogue import combine
from moe_compiler.kernels.triton_pool import project
from moe_compiler.kernels.triton_routing import Blocks

_SLOTS = 32  # of the pool, in one dot
_STORE, _WEIGHTED, _ATOMIC = 0, 1, 2  # what `linear_kernel` does with a row of its output


def gate_up(
    x: Tensor,
    expert_ids: Tensor,
    blocks: Blocks | None,
    weight: PackedTensors,
    bias: Tensor | None,
    activation: str,
    group_size: int,
    tile: Tile,
) -> Tensor:
    """`act(gate(x)) · up(x)` of each row's expert, in one launch.

    Args:
        x: `(T, H)` or `(R, H)`, float16 or bfloat16; row `r` reads `x[r // (R / x.shape[0])]`.
        expert_ids: `(R,)` int64; the rows of ids outside `0 .. E - 1` are 0.
        blocks: the rows by expert, in blocks of `tile.block_m`; `None` for a block per row.
        weight: packed linear `(2I, H)`, the gate's rows first.
        bias: `(E, 2I)` or `None`.
        activation: one of `moe_compiler.kernels.activation.ACTIVATIONS`.
        group_size: input channels of one scale: 16, 32, 64 or a multiple of 128.
        tile: `block_n` is in rows of the result.

    Returns:
        `(R, I)` in the dtype of `x`, rows in the order of `expert_ids`.

    Raises:
        TypeError: `x` is neither float16 nor bfloat16.
        ValueError: `activation` or `group_size` is not known, or `tile` differs from the one `blocks` were made for.
    """
    if activation not in ACTIVATIONS:
        raise ValueError(f"`activation` must be one of {', '.join(ACTIVATIONS)}, but is {activation!r}")
    rows, columns = expert_ids.shape[0], weight.out_features // 2
    h = torch.empty(rows, columns, dtype=x.dtype, device=x.device)
    args = launch_arguments(x, expert_ids, blocks, weight, bias, group_size, tile)
    if rows:
        gate_up_kernel[triton.cdiv(columns, tile.block_n), _num_blocks(rows, blocks)](
            **args, h=h, ACTIVATION=activation, ASM=inline_assembly()
        )
    return h


def linear(
    x: Tensor,
    expert_ids: Tensor,
    blocks: Blocks | None,
    weight: PackedTensors,
    bias: Tensor | None,
    group_size: int,
    tile: Tile,
) -> Tensor:
    """`W x + b` of each row's expert, in one launch.

    Args:
        x: `(T, K)` or `(R, K)`, as in `gate_up`.
        expert_ids: `(R,)` int64, as in `gate_up`.
        blocks: as in `gate_up`.
        weight: packed linear `(N, K)`.
        bias: `(E, N)` or `None`.
        group_size: as in `gate_up`.
        tile: of the launch.

    Returns:
        `(R, N)` in the dtype of `x`.

    Raises:
        TypeError: `x` is neither float16 nor bfloat16.
        ValueError: `group_size` is not known, or `tile` differs from the one `blocks` were made for.
    """
    out = torch.empty(expert_ids.shape[0], weight.out_features, dtype=x.dtype, device=x.device)
    _launch_linear(x, expert_ids, blocks, weight, bias, group_size, tile, out, None, 1, _STORE)
    return out


def down(
    h: Tensor,
    expert_ids: Tensor,
    blocks: Blocks | None,
    routing_weights: Tensor,
    weight: PackedTensors,
    bias: Tensor | None,
    group_size: int,
    tile: Tile,
    *,
    deterministic: bool,
) -> Tensor:
    """`Σ_k w_k · (W h_k + b)` over the experts of each token, summed in float32.

    Args:
        h: `(R, I)` float16 or bfloat16, as from `gate_up`.
        expert_ids: `(R,)` int64, as in `gate_up`.
        blocks: as in `gate_up`.
        routing_weights: `(T, k)`, any floating dtype.
        weight: packed linear `(H, I)`.
        bias: `(E, H)` or `None`.
        group_size: as in `gate_up`.
        tile: of the launch.
        deterministic: store each row and add up a token's rows in a second launch, the same bits on every run; else
            add to a cleared buffer as rows come, and round it: no fewer launches, but no `(R, H)` buffer.

    Returns:
        `(T, H)` in the dtype of `h`.

    Raises:
        TypeError: `h` is neither float16 nor bfloat16.
        ValueError: `group_size` is not known, or `tile` differs from the one `blocks` were made for.
    """
    tokens, top_k = routing_weights.shape
    routing_weights = routing_weights.contiguous()
    if deterministic:
        partial = torch.empty(tokens * top_k, weight.out_features, dtype=torch.float32, device=h.device)
        _launch_linear(
            h, expert_ids, blocks, weight, bias, group_size, tile, partial, routing_weights, top_k, _WEIGHTED
        )
        return combine(partial, expert_ids.contiguous(), weight.num_experts, top_k, h.dtype)
    total = torch.zeros(tokens, weight.out_features, dtype=torch.float32, device=h.device)
    _launch_linear(h, expert_ids, blocks, weight, bias, group_size, tile, total, routing_weights, top_k, _ATOMIC)
    return total.to(h.dtype)


def _launch_linear(
    x: Tensor,
    expert_ids: Tensor,
    blocks: Blocks | None,
    weight: PackedTensors,
    bias: Tensor | None,
    group_size: int,
    tile: Tile,
    out: Tensor,
    routing_weights: Tensor | None,
    top_k: int,
    epilogue: int,
) -> None:
    args = launch_arguments(x, expert_ids, blocks, weight, bias, group_size, tile)
    rows = expert_ids.shape[0]
    if rows:
        linear_kernel[triton.cdiv(weight.out_features, tile.block_n), _num_blocks(rows, blocks)](
            **args,
            routing_weights=routing_weights,
            out=out,
            EPILOGUE=epilogue,
            TOP_K=top_k,
            ASM=inline_assembly(),
        )


def launch_arguments(
    x: Tensor,
    expert_ids: Tensor,
    blocks: Blocks | None,
    weight: PackedTensors,
    bias: Tensor | None,
    group_size: int,
    tile: Tile,
) -> dict[str, Any]:
    """What both kernels take, checked."""
    if x.dtype not in (torch.float16, torch.bfloat16):
        raise TypeError(f"`x` must be float16 or bfloat16, but is {x.dtype}")
    if group_size not in (16, 32, 64) and (group_size < 1 or group_size % TILE):
        raise ValueError(f"`group_size` must be 16, 32, 64 or a multiple of {TILE}, but is {group_size}")
    if blocks is not None and blocks.block_m != tile.block_m:
        raise ValueError(f"`tile.block_m` is {tile.block_m}, but `blocks` were made for {blocks.block_m}")
    rows, x = expert_ids.shape[0], x.contiguous()
    return {
        "x": x,
        "projected": project(x, weight.pool_direction),
        "expert_ids": expert_ids.contiguous(),
        "record": None if blocks is None else blocks.record,
        "order": None if blocks is None else blocks.order,
        "offsets": None if blocks is None else blocks.offsets,
        "weight": weight,
        "bias": None if bias is None else bias.contiguous(),
        "num_rows": rows,
        "E": weight.num_experts,
        "N": weight.out_features,
        "K": x.shape[1],
        "D": weight.pool_direction.shape[0],
        "REPEAT": max(1, rows // max(1, x.shape[0])),
        "GROUP": group_size,
        "BLOCK_N": tile.block_n,
        "BLOCK_M": tile.block_m,
        "SLOTS": _SLOTS if weight.pool_index.shape[0] else 0,
        "num_warps": tile.num_warps,
        "num_stages": tile.num_stages,
    }


def _num_blocks(rows: int, blocks: Blocks | None) -> int:
    return rows if blocks is None else blocks.record.shape[0]
