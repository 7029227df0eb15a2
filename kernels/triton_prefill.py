"""Launching the Triton kernel for many tokens per expert, see `moe_compiler.kernels.triton_prefill_kernels`."""

from __future__ import annotations

import torch
import triton
from torch import Tensor
from triton.runtime import driver

from moe_compiler.kernels.activation import ACTIVATIONS
from moe_compiler.kernels.packed import PackedTensors
from moe_compiler.kernels.tiles import Tile
from moe_compiler.kernels.triton_decode import launch_arguments
from moe_compiler.kernels.triton_digits import INTERPRETED, inline_assembly
from moe_compiler.kernels.triton_epilogue import combine
from moe_compiler.kernels.triton_prefill_kernels import block_kernel
from moe_compiler.kernels.triton_routing import Blocks

_TWO_PROGRAMS = 128  # registers of a thread with which two programs of eight warps share a multiprocessor


def gate_up(
    x: Tensor,
    expert_ids: Tensor,
    blocks: Blocks,
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
        blocks: the rows by expert, in blocks of `tile.block_m`.
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
    out = torch.empty(expert_ids.shape[0], weight.out_features // 2, dtype=x.dtype, device=x.device)
    _launch(x, expert_ids, blocks, weight, bias, group_size, tile, out, activation=activation)
    return out


def linear(
    x: Tensor,
    expert_ids: Tensor,
    blocks: Blocks,
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
    _launch(x, expert_ids, blocks, weight, bias, group_size, tile, out)
    return out


def down(
    h: Tensor,
    expert_ids: Tensor,
    blocks: Blocks,
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
            add to a cleared buffer as rows come, and round it: no `(R, H)` buffer.

    Returns:
        `(T, H)` in the dtype of `h`.

    Raises:
        TypeError: `h` is neither float16 nor bfloat16.
        ValueError: `group_size` is not known, or `tile` differs from the one `blocks` were made for.
    """
    tokens, top_k = routing_weights.shape
    factors = routing_weights.contiguous()
    if deterministic:
        partial = torch.empty(tokens * top_k, weight.out_features, dtype=torch.float32, device=h.device)
        _launch(h, expert_ids, blocks, weight, bias, group_size, tile, partial, routing_weights=factors)
        return combine(partial, expert_ids.contiguous(), weight.num_experts, top_k, h.dtype)
    total = torch.zeros(tokens, weight.out_features, dtype=torch.float32, device=h.device)
    _launch(h, expert_ids, blocks, weight, bias, group_size, tile, total, routing_weights=factors, atomic=True)
    return total.to(h.dtype)


def _launch(
    x: Tensor,
    expert_ids: Tensor,
    blocks: Blocks,
    weight: PackedTensors,
    bias: Tensor | None,
    group_size: int,
    tile: Tile,
    out: Tensor,
    *,
    activation: str | None = None,
    routing_weights: Tensor | None = None,
    atomic: bool = False,
) -> None:
    arguments = launch_arguments(x, expert_ids, blocks, weight, bias, group_size, tile)
    if expert_ids.shape[0] == 0:
        return
    halves = 1 if activation is None else 2
    features, assembly = weight.out_features // halves, inline_assembly()
    accumulators = halves * tile.block_n * tile.block_m // (32 * tile.num_warps)
    limit = {"maxnreg": _TWO_PROGRAMS} if assembly and tile.num_warps == 8 and accumulators <= 32 else {}
    block_kernel[triton.cdiv(features, tile.block_n), blocks.record.shape[0]](
        **arguments,
        routing_weights=routing_weights,
        out=out,
        ACTIVATION=activation,
        ATOMIC=atomic,
        TOP_K=1 if routing_weights is None else routing_weights.shape[1],
        WHOLE_TILE=_dots_are_awaited(),
        ASM=assembly,
        **limit,
    )


def _dots_are_awaited() -> bool:
    """Whether dots run asynchronously, so that few long ones are better: Hopper, and Blackwell's data-center chips."""
    if INTERPRETED.value:
        return False
    target = driver.active.get_current_target()
    return bool(target.backend == "cuda" and 90 <= target.arch < 120)
