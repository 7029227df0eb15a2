"""The Triton launches whose compilation is tested, on tensors without memory. Add a kernel by adding it to `CASES`."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from moe_compiler.kernels import triton_experts
from moe_compiler.kernels.packed import PackedTensors
from moe_compiler.kernels.tiles import Tile
from moe_compiler.kernels.triton_routing import Blocks

E, TOP_K, TOKENS, HIDDEN, INTERMEDIATE, GROUP = 64, 8, 16, 2048, 1024, 128
ROWS = TOKENS * TOP_K


@dataclass(frozen=True)
class Case:
    """A launch to compile.

    Attributes:
        name: of the case.
        kernel: name of the Triton kernel that is measured.
        launch: calls the launcher with tensors of a dtype and a tile.
        tile: of the launch.
        weights: how many weights one iteration of the kernel's loops reads.
        builds: pairs of a target and a dtype for which the tests compile it; the table can show all.
    """

    name: str
    kernel: str
    launch: Callable[[torch.dtype, Tile], object]
    tile: Tile
    weights: int
    builds: tuple[tuple[str, str], ...] = ()


def meta(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def packed(out_features: int, in_features: int, slots: int, directions: int = 0) -> PackedTensors:
    """The shapes of `E` packed experts at 8 bits."""
    groups = -(-in_features // GROUP)
    return PackedTensors(
        planes=meta(E * out_features * in_features // 2, dtype=torch.int16),
        table=meta(E, 2, dtype=torch.int32),
        scale=meta(E, out_features, groups, dtype=torch.float16),
        zero_point=meta(E, out_features, groups, dtype=torch.uint8),
        pool_offset=meta(E + 1, dtype=torch.int32),
        pool_index=meta(slots, dtype=torch.int32),
        pool_value=meta(slots, out_features, dtype=torch.int8),
        pool_scale=meta(slots, dtype=torch.float32),
        pool_direction=meta(directions, in_features, dtype=torch.int8),
    )


def blocks(block_m: int) -> Blocks:
    return Blocks(
        record=meta(E, 4, dtype=torch.int32),
        order=meta(ROWS, dtype=torch.int32),
        offsets=meta(E + 1, dtype=torch.int32),
        block_m=block_m,
    )


def decode_gate_up(dtype: torch.dtype, tile: Tile, *, blocked: bool = True) -> None:
    x, ids = meta(TOKENS, HIDDEN, dtype=dtype), meta(ROWS, dtype=torch.int64)
    weight = packed(2 * INTERMEDIATE, HIDDEN, slots=1024)
    rows = blocks(tile.block_m) if blocked else None
    triton_experts.gate_up("decode", x, ids, rows, weight, None, "silu", GROUP, tile)


def decode_down(
    dtype: torch.dtype, tile: Tile, *, blocked: bool = True, deterministic: bool = True, directions: int = 0
) -> None:
    h, ids = meta(ROWS, INTERMEDIATE, dtype=dtype), meta(ROWS, dtype=torch.int64)
    routing_weights = meta(TOKENS, TOP_K, dtype=torch.float32)
    weight = packed(HIDDEN, INTERMEDIATE, slots=512, directions=directions)
    rows = blocks(tile.block_m) if blocked else None
    triton_experts.down("decode", h, ids, rows, routing_weights, weight, None, GROUP, tile, deterministic=deterministic)


def prefill_gate_up(dtype: torch.dtype, tile: Tile) -> None:
    x, ids = meta(TOKENS, HIDDEN, dtype=dtype), meta(ROWS, dtype=torch.int64)
    weight = packed(2 * INTERMEDIATE, HIDDEN, slots=1024)
    triton_experts.gate_up("prefill", x, ids, blocks(tile.block_m), weight, None, "silu", GROUP, tile)


def prefill_down(dtype: torch.dtype, tile: Tile, *, deterministic: bool = True) -> None:
    h, ids = meta(ROWS, INTERMEDIATE, dtype=dtype), meta(ROWS, dtype=torch.int64)
    routing_weights = meta(TOKENS, TOP_K, dtype=torch.float32)
    weight = packed(HIDDEN, INTERMEDIATE, slots=512, directions=64)
    triton_experts.down(
        "prefill", h, ids, blocks(tile.block_m), routing_weights, weight, None, GROUP, tile, deterministic=deterministic
    )


CASES = (
    Case(
        "decode gate_up",
        "decode_kernel",
        decode_gate_up,
        Tile(32, 8, 1, 3),
        2 * 32 * 128,
        (("sm_90", "float16"),),
    ),
    Case(
        "decode gate_up, block per row",
        "decode_kernel",
        partial(decode_gate_up, blocked=False),
        Tile(16, 8, 1, 3),
        2 * 16 * 128,
    ),
    Case(
        "decode down",
        "decode_kernel",
        partial(decode_down, directions=64),
        Tile(64, 8, 1, 3),
        64 * 128,
        (("sm_90", "float16"),),
    ),
    Case(
        "decode down, atomic",
        "decode_kernel",
        partial(decode_down, blocked=False, deterministic=False),
        Tile(64, 8, 2, 3),
        64 * 128,
        (("sm_80", "bfloat16"),),
    ),
    Case(
        "decode down, 16 rows",
        "decode_kernel",
        decode_down,
        Tile(32, 16, 1, 2),
        32 * 128,
        (("gfx942", "bfloat16"),),
    ),
    Case(
        "prefill gate_up",
        "prefill_kernel",
        prefill_gate_up,
        Tile(64, 64, 8, 3),
        2 * 64 * 128,
        (("sm_90", "float16"),),
    ),
    Case("prefill down", "prefill_kernel", prefill_down, Tile(128, 64, 8, 3), 128 * 128),
    Case(
        "prefill down, 4 warps",
        "prefill_kernel",
        partial(prefill_down, deterministic=False),
        Tile(128, 64, 4, 3),
        128 * 128,
        (("sm_100", "float16"),),
    ),
    Case("prefill down, 128 rows", "prefill_kernel", prefill_down, Tile(128, 128, 8, 3), 128 * 128),
)
