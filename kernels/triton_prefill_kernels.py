"""The Triton kernel for many tokens per expert: the weights become an operand in registers.

A program takes a block of rows of one expert (see `moe_compiler.kernels.triton_routing`) times a block of output
features. Codes are unpacked as in `moe_compiler.kernels.triton_digits` and turned into weights
`(code - zero_point) * scale` in the dtype of `x` before the dot: at this size so many rows use a weight that two or
three half-precision instructions for each cost less than scaling the accumulators at every group. The difference is
exact and the product is rounded once, so in float16 the dot sees the weights that a dense float16 layer would hold;
in bfloat16 the scale is rounded first. Sums are float32, over all of `K`.

The weights are the first operand of the dot, the rows of `x` the second. On Hopper, `wgmma` reads the weights from
registers, and one dot takes the 128 channels of a tile (`WHOLE_TILE`), so that it is waited for once. Elsewhere a dot
takes the 16 channels of one digit position: `mma.sync` would want the weights of a whole tile shuffled through shared
memory.
"""

from __future__ import annotations

import triton
import triton.language as tl

from moe_compiler.kernels.triton_digits import bias_of, biased_codes, codes, dot, load_planes
from moe_compiler.kernels.triton_epilogue import clear_foreign_rows, write_block
from moe_compiler.kernels.triton_pool import columns, load_slots
from moe_compiler.kernels.triton_routing import load_block, program_block


@triton.constexpr_function
def _zero_point_joins_bias(position: int, planes: int, dtype: tl.dtype) -> bool:
    """Whether `bias + zero_point` is exact: zero points are multiples of `4**(planes - 4)` below `4**planes`."""
    if planes == 4 and dtype == tl.bfloat16:
        return False
    mantissa_bits = 10 if dtype == tl.float16 else 7
    return bool(bias_of(position, planes, dtype) * 2.0**-mantissa_bits <= 4.0 ** (planes - 4))


@triton.jit
def weights(
    words: tl.tuple,
    scale: tl.tensor,
    zero_point: tl.tensor,
    groups_left: tl.tensor,
    POSITION: tl.constexpr,
    P: tl.constexpr,
    GROUP: tl.constexpr,
    DTYPE: tl.constexpr,
    ASM: tl.constexpr,
) -> tl.tensor:
    """`(code - zero_point) * scale` of one digit position of a tile, `(rows, 16)`, rounded once.

    Args:
        words: the tuple of `load_planes`.
        scale: `(rows,)` pointers to the scales of the tile's first group.
        zero_point: the same for the zero points.
        groups_left: groups after the tile's first one; the padding beyond the last one reads that one's.
        POSITION: digit position `j`, 0 to 7.
        P: planes.
        GROUP: input channels of a group.
        DTYPE: `tl.float16` or `tl.bfloat16`.
        ASM: see `moe_compiler.kernels.triton_digits`.
    """
    group = tl.minimum(POSITION * 16 // GROUP, groups_left)
    s = tl.load(scale + group).to(DTYPE)
    z = tl.load(zero_point + group).to(tl.float32) * (4.0 ** (P - 4))
    if not ASM:
        code = codes(words, POSITION, P, tl.float32, ASM) - z[:, None]
        return (code * s.to(tl.float32)[:, None]).to(DTYPE)
    elif _zero_point_joins_bias(POSITION, P, DTYPE):
        bias: tl.constexpr = bias_of(POSITION, P, DTYPE)
        return (biased_codes(words, POSITION, P, DTYPE, ASM) - (z + bias).to(DTYPE)[:, None]) * s[:, None]
    else:
        return (codes(words, POSITION, P, DTYPE, ASM) - z.to(DTYPE)[:, None]) * s[:, None]


@triton.jit
def _tile_weights(
    words: tl.tuple,
    scale: tl.tensor,
    zero_point: tl.tensor,
    groups_left: tl.tensor,
    P: tl.constexpr,
    GROUP: tl.constexpr,
    DTYPE: tl.constexpr,
    ASM: tl.constexpr,
) -> tl.tensor:
    """The weights of a tile, `(rows, 128)`: the positions side by side; arguments as in `weights`."""
    w0 = weights(words, scale, zero_point, groups_left, 0, P, GROUP, DTYPE, ASM)
    w1 = weights(words, scale, zero_point, groups_left, 1, P, GROUP, DTYPE, ASM)
    w2 = weights(words, scale, zero_point, groups_left, 2, P, GROUP, DTYPE, ASM)
    w3 = weights(words, scale, zero_point, groups_left, 3, P, GROUP, DTYPE, ASM)
    w4 = weights(words, scale, zero_point, groups_left, 4, P, GROUP, DTYPE, ASM)
    w5 = weights(words, scale, zero_point, groups_left, 5, P, GROUP, DTYPE, ASM)
    w6 = weights(words, scale, zero_point, groups_left, 6, P, GROUP, DTYPE, ASM)
    w7 = weights(words, scale, zero_point, groups_left, 7, P, GROUP, DTYPE, ASM)
    low = tl.join(tl.join(w0, w1), tl.join(w2, w3))
    high = tl.join(tl.join(w4, w5), tl.join(w6, w7))
    return tl.join(low, high).permute(0, 4, 3, 2, 1).reshape(w0.shape[0], 128)


@triton.jit
def _multiply(
    x: tl.tensor,
    planes: tl.tensor,
    scale: tl.tensor,
    zero_point: tl.tensor,
    P: tl.constexpr,
    N: tl.constexpr,
    K: tl.constexpr,
    GROUP: tl.constexpr,
    WHOLE_TILE: tl.constexpr,
    ASM: tl.constexpr,
) -> tl.tensor:
    """The base weights of some output features times `x`, `(block_n, block_m)` float32.

    Args:
        x: `(1, block_m)` pointers to the rows of `x`, all of them readable.
        planes: `(block_n, 1)` pointers to the features' half words in tile 0.
        scale: `(block_n,)` pointers to their first scale.
        zero_point: `(block_n,)` pointers to their first zero point.
        P: planes.
        N: output features of the linear.
        K: input features.
        GROUP: input channels of a scale.
        WHOLE_TILE: one dot for a tile's 128 channels rather than eight.
        ASM: see `moe_compiler.kernels.triton_digits`.
    """
    DTYPE: tl.constexpr = x.dtype.element_ty
    WIDTH: tl.constexpr = 128 if WHOLE_TILE else 16
    channel = tl.arange(0, WIDTH)[:, None]
    half_words = planes + tl.arange(0, 16)[None, :]
    acc = tl.zeros((planes.shape[0], x.shape[1]), tl.float32)
    for tile in tl.range(0, (K + 127) // 128):
        words = load_planes(half_words + tile * (P * N * 16), N * 16, None, P)
        group = tile * 128 // GROUP
        groups_left = (K + GROUP - 1) // GROUP - 1 - group
        for step in tl.static_range(128 // WIDTH):
            first = tile * 128 + step * WIDTH
            if K % 128 == 0:
                values = tl.load(x + first + channel)
            else:
                values = tl.load(x + first + channel, mask=channel < K - first, other=0.0)
            if WHOLE_TILE:
                w = _tile_weights(words, scale + group, zero_point + group, groups_left, P, GROUP, DTYPE, ASM)
            else:
                w = weights(words, scale + group, zero_point + group, groups_left, step, P, GROUP, DTYPE, ASM)
            acc = dot(w, values, acc)
    return acc


@triton.jit(do_not_specialize=["num_rows"])
def prefill_kernel(
    x: tl.tensor,
    projected: tl.tensor,
    expert_ids: tl.tensor,
    record: tl.tensor,
    order: tl.tensor,
    offsets: tl.tensor,
    weight: tl.tuple,
    bias: tl.tensor,
    routing_weights: tl.tensor,
    out: tl.tensor,
    num_rows: tl.tensor,
    E: tl.constexpr,
    N: tl.constexpr,
    K: tl.constexpr,
    D: tl.constexpr,
    REPEAT: tl.constexpr,
    GROUP: tl.constexpr,
    ACTIVATION: tl.constexpr,
    ATOMIC: tl.constexpr,
    TOP_K: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_M: tl.constexpr,
    SLOTS: tl.constexpr,
    WHOLE_TILE: tl.constexpr,
    ASM: tl.constexpr,
) -> None:
    """A block of rows of one expert times `BLOCK_N` columns of `out`, as `decode_kernel` does it; always in blocks.

    Args:
        WHOLE_TILE: one dot for a tile's 128 channels rather than eight; all others as in `decode_kernel`.
    """
    WIDTH: tl.constexpr = N if ACTIVATION is None else N // 2
    block, first = program_block(WIDTH, BLOCK_N)
    column = first + tl.arange(0, BLOCK_N)
    exists = column < WIDTH
    expert, row, valid = load_block(expert_ids, record, order, block, E, BLOCK_M)
    if routing_weights is None:
        clear_foreign_rows(out, order, offsets, num_rows, block, column, exists, E, WIDTH, BLOCK_M)
    if expert < 0:
        return
    if ACTIVATION is None:
        feature = tl.where(exists, column, 0)
    else:
        lane = tl.arange(0, 2 * BLOCK_N)
        feature = tl.minimum(first + lane % BLOCK_N, WIDTH - 1) + lane // BLOCK_N * WIDTH
    own = expert.to(tl.int64) * N + feature
    x_row = (row // REPEAT).to(tl.int64)[None, :]
    x += x_row * K
    if projected is not None:
        projected += x_row * D
    P = tl.load(weight.table + 2 * expert)
    planes = weight.planes + tl.load(weight.table + 2 * expert + 1).to(tl.int64) * 128 + feature[:, None] * 16
    s = weight.scale + own * ((K + GROUP - 1) // GROUP)
    z = weight.zero_point + own * ((K + GROUP - 1) // GROUP)
    if P == 1:
        acc = _multiply(x, planes, s, z, 1, N, K, GROUP, WHOLE_TILE, ASM)
    elif P == 2:
        acc = _multiply(x, planes, s, z, 2, N, K, GROUP, WHOLE_TILE, ASM)
    elif P == 3:
        acc = _multiply(x, planes, s, z, 3, N, K, GROUP, WHOLE_TILE, ASM)
    else:
        acc = _multiply(x, planes, s, z, 4, N, K, GROUP, WHOLE_TILE, ASM)
    if SLOTS:
        end = tl.load(weight.pool_offset + expert + 1)
        for slot in tl.range(tl.load(weight.pool_offset + expert), end, SLOTS, num_stages=1):
            values, delta, unit = load_slots(
                slot, end, x, valid[None, :], projected, feature, feature < N, weight, N, K, SLOTS
            )
            acc = dot(columns(delta, unit, x.dtype.element_ty), values, acc)
    if bias is not None:
        acc += tl.load(bias + own).to(tl.float32)[:, None]
    write_block(acc, out, routing_weights, row, valid, column, exists, WIDTH, ACTIVATION, ATOMIC, TOP_K)
