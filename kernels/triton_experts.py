"""The experts' linears over packed weights on a GPU, each in one launch and for every width.

They run on one of two *paths*: `"decode"`, for few tokens per expert (`moe_compiler.kernels.triton_decode_kernels`),
or `"prefill"`, for many (`moe_compiler.kernels.triton_prefill_kernels`).
"""

from __future__ import annotations

from typing import Any, Literal

import torch
import triton
from torch import Tensor
from triton.runtime import driver

from moe_compiler.kernels.activation import ACTIVATIONS
from moe_compiler.kernels.packed import PackedTensors
from moe_compiler.kernels.planes import TILE
from moe_compiler.kernels.tiles import Tile
from moe_compiler.kernels.triton_decode_kernels import decode_kernel
from moe_compiler.kernels.triton_digits import INTERPRETED, inline_assembly
from moe_compiler.kernels.triton_epilogue import combine
from moe_compiler.kernels.triton_pool import project
from moe_compiler.kernels.triton_prefill_kernels import prefill_kernel
from moe_compiler.kernels.triton_routing import Blocks

Path = Literal["decode", "prefill"]

_SLOTS = 32  # of the pool, in one dot
_TWO_PROGRAMS = 128  # registers of a thread with which two programs of eight warps share a multiprocessor


def gate_up(
    path: Path,
    x: Tensor,
    expert_ids: Tensor,
    blocks: Blocks | None,
    weight: PackedTensors,
    bias: Tensor | None,
    activation: str,
    group_size: int,
    tile: Tile,
) -> Tensor:
    """`act(gate(x)) · up(x)` of each row's expert.

    Args:
        path: which kernel.
        x: `(T, H)` or `(R, H)`, float16 or bfloat16; row `r` reads `x[r // (R / x.shape[0])]`.
        expert_ids: `(R,)` int64; the rows of ids outside `0 .. E - 1` are 0.
        blocks: the rows by expert, in blocks of `tile.block_m`; on the path `"decode"` `None` for a block per row.
        weight: packed linear `(2I, H)`, the gate's rows first.
        bias: `(E, 2I)` or `None`.
        activation: one of `moe_compiler.kernels.activation.ACTIVATIONS`.
        group_size: input channels of one scale: 16, 32, 64 or a multiple of 128.
        tile: `block_n` is in rows of the result.

    Returns:
        `(R, I)` in the dtype of `x`, rows in the order of `expert_ids`.

    Raises:
        TypeError: `x` is neither float16 nor bfloat16.
        ValueError: `activation` or `group_size` is not known, `tile` differs from the one `blocks` were made for, or
            there are no blocks on the path `"prefill"`.
    """
    if activation not in ACTIVATIONS:
        raise ValueError(f"`activation` must be one of {', '.join(ACTIVATIONS)}, but is {activation!r}")
    h = torch.empty(expert_ids.shape[0], weight.out_features // 2, dtype=x.dtype, device=x.device)
    _launch(path, x, expert_ids, blocks, weight, bias, group_size, tile, h, activation=activation)
    return h


def linear(
    path: Path,
    x: Tensor,
    expert_ids: Tensor,
    blocks: Blocks | None,
    weight: PackedTensors,
    bias: Tensor | None,
    group_size: int,
    tile: Tile,
) -> Tensor:
    """`W x + b` of each row's expert.

    Args:
        path: which kernel.
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
        TypeError: as in `gate_up`.
        ValueError: as in `gate_up`.
    """
    out = torch.empty(expert_ids.shape[0], weight.out_features, dtype=x.dtype, device=x.device)
    _launch(path, x, expert_ids, blocks, weight, bias, group_size, tile, out)
    return out


def down(
    path: Path,
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
        path: which kernel.
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
        ValueError: as in `gate_up`.
    """
    (tokens, top_k), features = routing_weights.shape, weight.out_features
    factors = routing_weights.contiguous()
    if deterministic:
        rows = torch.empty(tokens * top_k, features, dtype=torch.float32, device=h.device)
        _launch(path, h, expert_ids, blocks, weight, bias, group_size, tile, rows, routing_weights=factors)
        return combine(rows, expert_ids.contiguous(), weight.num_experts, top_k, h.dtype)
    total = torch.zeros(tokens, features, dtype=torch.float32, device=h.device)
    _launch(path, h, expert_ids, blocks, weight, bias, group_size, tile, total, routing_weights=factors, atomic=True)
    return total.to(h.dtype)


def _launch(
    path: Path,
    x: Tensor,
    expert_ids: Tensor,
    blocks: Blocks | None,
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
    """Checks the arguments and fills `out`."""
    if x.dtype not in (torch.float16, torch.bfloat16):
        raise TypeError(f"`x` must be float16 or bfloat16, but is {x.dtype}")
    if group_size not in (16, 32, 64) and (group_size < 1 or group_size % TILE):
        raise ValueError(f"`group_size` must be 16, 32, 64 or a multiple of {TILE}, but is {group_size}")
    if blocks is None and path == "prefill":
        raise ValueError("`blocks` must be given on the path 'prefill', but is None")
    if blocks is not None and blocks.block_m != tile.block_m:
        raise ValueError(f"`tile.block_m` is {tile.block_m}, but `blocks` were made for {blocks.block_m}")
    rows, x = expert_ids.shape[0], x.contiguous()
    if rows == 0:
        return
    num_blocks = rows if blocks is None else blocks.record.shape[0]
    kernel = decode_kernel if path == "decode" else prefill_kernel
    kernel[(triton.cdiv(out.shape[1], tile.block_n) * num_blocks,)](
        x=x,
        projected=project(x, weight.pool_direction),
        expert_ids=expert_ids.contiguous(),
        record=None if blocks is None else blocks.record,
        order=None if blocks is None else blocks.order,
        offsets=None if blocks is None else blocks.offsets,
        weight=weight,
        bias=None if bias is None else bias.contiguous(),
        routing_weights=routing_weights,
        out=out,
        num_rows=rows,
        E=weight.num_experts,
        N=weight.out_features,
        K=x.shape[1],
        D=weight.pool_direction.shape[0],
        REPEAT=max(1, rows // max(1, x.shape[0])),
        GROUP=group_size,
        ACTIVATION=activation,
        ATOMIC=atomic,
        TOP_K=1 if routing_weights is None else routing_weights.shape[1],
        BLOCK_N=tile.block_n,
        BLOCK_M=tile.block_m,
        SLOTS=_SLOTS if weight.pool_index.shape[0] else 0,
        ASM=inline_assembly(),
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
        **({} if path == "decode" else _prefill_options(tile, 1 if activation is None else 2)),
    )


def _prefill_options(tile: Tile, halves: int) -> dict[str, Any]:
    """What only the kernel for many tokens takes; `halves` of a linear share one accumulator."""
    accumulators = halves * tile.block_n * tile.block_m // (32 * tile.num_warps)
    limited = inline_assembly() and tile.num_warps == 8 and accumulators <= 32
    return {"WHOLE_TILE": _dots_are_awaited()} | ({"maxnreg": _TWO_PROGRAMS} if limited else {})


def _dots_are_awaited() -> bool:
    """Whether dots run asynchronously, so that few long ones are better: Hopper, and Blackwell's data-center chips."""
    if INTERPRETED.value:
        return False
    target = driver.active.get_current_target()
    return bool(target.backend == "cuda" and 90 <= target.arch < 120)
