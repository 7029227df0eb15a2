"""The Triton kernel for few tokens per expert: it reads every weight once, as packed, and is bound by memory.

A program computes `block_n` output features of up to `block_m` rows of one expert. Weights are the first operand of
`tl.dot`, so that their digits go from shared memory to the tensor cores through registers only, and tokens the second
one, where eight columns suffice. The number of planes is data: it selects one of four loops inside the kernel.

Zero points
    The codes of a group come out of `triton_digits` as `code + bias`, and what is wanted is `code - zero_point` with
    a zero point of each output row. Both are constant along the group except that the bias depends on the digit
    position, so neither is subtracted from the weights: with `X_j` the sum of `x` over the channels of position `j`,

        Σ_k (code - zero) · x_k  =  Σ_k (code + bias_j) · x_k  -  Σ_j bias_j · X_j  -  zero · Σ_j X_j,

    and the last two sums are dots of `x` with constant operands, shared by the gate and the up projection. That is
    less than half as many instructions per weight as a subtraction, and costs at most 6 of the 24 bits of a float32
    accumulator (two planes in float16, where a bias is 64 times the largest code; elsewhere it is less).

Everything that depends on data (expert, its planes, the pool's bounds) is read on the device: grids depend on shapes
alone, and weights, pool and routing may change their contents under a captured CUDA graph.
"""

from __future__ import annotations

import triton
import triton.language as tl

from moe_compiler.kernels.triton_digits import bias_of, dot, dot_codes, load_planes, uniform_bias
from moe_compiler.kernels.triton_epilogue import clear_foreign_rows, write_block
from moe_compiler.kernels.triton_pool import columns, load_slots
from moe_compiler.kernels.triton_routing import load_block, program_block


@triton.jit
def _multiply(
    acc: tl.tensor,
    x: tl.tensor,
    x_mask: tl.tensor,
    planes: tl.tensor,
    scale: tl.tensor,
    zero: tl.tensor,
    feature: tl.tensor,
    exists: tl.tensor,
    P: tl.constexpr,
    N: tl.constexpr,
    K: tl.constexpr,
    GROUP: tl.constexpr,
    EVEN_N: tl.constexpr,
    ASM: tl.constexpr,
) -> tl.tensor:
    """`acc` plus the base weights of some output features, in `P` planes, times a block's rows of `x`."""
    DTYPE: tl.constexpr = x.dtype.element_ty
    BIAS: tl.constexpr = uniform_bias(P, DTYPE)
    GROUPS: tl.constexpr = (K + GROUP - 1) // GROUP
    TILE_GROUPS: tl.constexpr = 128 // GROUP if GROUP < 128 else 1
    GROUP_TILES: tl.constexpr = GROUP // 128 if GROUP > 128 else 1
    POSITIONS: tl.constexpr = 8 // TILE_GROUPS
    half_word = tl.arange(0, 16)
    ones = tl.full((acc.shape[0], 16), 1.0, DTYPE)
    word_mask = None if EVEN_N else exists[:, None]
    words_of_tile_0 = planes + feature[:, None] * 16 + half_word[None, :]
    x += half_word[:, None]
    for tile in tl.range(0, (K + 127) // 128):
        words = load_planes(words_of_tile_0 + tile * (P * N * 16), N * 16, word_mask, P)
        for i in tl.static_range(TILE_GROUPS):
            group = (tile * TILE_GROUPS + i) // GROUP_TILES
            if K % 128 != 0:
                group = tl.minimum(group, GROUPS - 1)
            s = tl.load(scale + feature * GROUPS + group, mask=exists, other=0.0).to(tl.float32)
            z = tl.load(zero + feature * GROUPS + group, mask=exists, other=0).to(tl.float32) * 4.0 ** (P - 4)
            part = tl.zeros_like(acc)
            total = part
            offset = part
            for j in tl.static_range(POSITIONS):
                channel = tile * 128 + (i * POSITIONS + j) * 16
                mask = x_mask
                if K % 128 != 0:
                    mask = x_mask & (channel + half_word < K)[:, None]
                x_position = tl.load(x + channel, mask=mask, other=0.0)
                part = dot_codes(words, x_position, part, i * POSITIONS + j, P, ASM)
                total = dot(ones, x_position, total)
                if BIAS == 0:
                    biases = tl.full((acc.shape[0], 16), bias_of(i * POSITIONS + j, P, DTYPE), DTYPE)
                    offset = dot(biases, x_position, offset)
            if BIAS == 0:
                part = part - offset - z[:, None] * total
            else:
                part = part - (z + BIAS)[:, None] * total
            acc += part * s[:, None]
    return acc


@triton.jit(do_not_specialize=["num_rows"])
def decode_kernel(
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
    ASM: tl.constexpr,
) -> None:
    """A block of rows of one expert times `BLOCK_N` columns of `out`.

    With an activation, the linear is a gate's and an up projection's rows, and both halves of a column are computed in
    one accumulator of twice the height: the gate's rows first. Rows that no expert here computes are cleared, unless
    there are routing weights: what adds up a token's rows then leaves them out.

    Args:
        x: `(T, K)` or `(R, K)` float16 or bfloat16.
        projected: what `triton_pool.project` made of `x`, or `None`.
        expert_ids: `(R,)`, read if there are no blocks.
        record, order, offsets: of `triton_routing.Blocks`, or `None` for a block per row.
        weight: `PackedTensors` of the linear `(N, K)`.
        bias: `(E, N)` or `None`.
        routing_weights: `(R,)` to multiply rows with, or `None`.
        out: `(R, N)`; `(R, N / 2)` with an activation, `(R / TOP_K, N)` float32 if `ATOMIC`.
        num_rows: `R`.
        E: experts.
        N: output features of the linear.
        K: input features.
        D: the pool's directions.
        REPEAT: consecutive rows that read one row of `x`.
        GROUP: input channels of one scale.
        ACTIVATION: see `triton_epilogue.activate`; `None` for none.
        ATOMIC: adds rows to their tokens instead of storing them.
        TOP_K: rows of one token.
        BLOCK_N: columns of a program.
        BLOCK_M: rows of a block.
        SLOTS: pool slots of one dot, 0 for no pool.
        ASM: see `triton_digits`.
    """
    WIDTH: tl.constexpr = N if ACTIVATION is None else N // 2
    GROUPS: tl.constexpr = (K + GROUP - 1) // GROUP
    EVEN_N: tl.constexpr = WIDTH % BLOCK_N == 0
    block, first = program_block(WIDTH, BLOCK_N)
    column = first + tl.arange(0, BLOCK_N)
    expert, row, valid = load_block(expert_ids, record, order, block, E, BLOCK_M)
    if routing_weights is None and record is not None:
        clear_foreign_rows(out, order, offsets, num_rows, block, column, column < WIDTH, E, WIDTH, BLOCK_M)
    if expert < 0:
        if routing_weights is None and record is None:
            tl.store(out + block.to(tl.int64) * WIDTH + column, tl.zeros((BLOCK_N,), tl.float32), mask=column < WIDTH)
        return
    if ACTIVATION is None:
        feature = column
        exists = column < WIDTH
    else:
        lane = tl.arange(0, 2 * BLOCK_N)
        column_of_lane = first + lane % BLOCK_N
        feature = column_of_lane + lane // BLOCK_N * WIDTH
        exists = column_of_lane < WIDTH
    x_row = (row // REPEAT).to(tl.int64)[None, :]
    x_mask = valid[None, :]
    x += x_row * K
    if projected is not None:
        projected += x_row * D
    P = tl.load(weight.table + 2 * expert)
    planes = weight.planes + tl.load(weight.table + 2 * expert + 1).to(tl.int64) * 128
    scale = weight.scale + expert.to(tl.int64) * (N * GROUPS)
    zero = weight.zero_point + expert.to(tl.int64) * (N * GROUPS)
    acc = tl.zeros((feature.shape[0], BLOCK_M), tl.float32)
    if SLOTS:
        # The first slots' chain of loads starts before the long loop and is used after it.
        slot = tl.load(weight.pool_offset + expert)
        end = tl.load(weight.pool_offset + expert + 1)
        x_slots, value, unit = load_slots(slot, end, x, x_mask, projected, feature, exists, weight, N, K, SLOTS)
    if P == 1:
        acc = _multiply(acc, x, x_mask, planes, scale, zero, feature, exists, 1, N, K, GROUP, EVEN_N, ASM)
    elif P == 2:
        acc = _multiply(acc, x, x_mask, planes, scale, zero, feature, exists, 2, N, K, GROUP, EVEN_N, ASM)
    elif P == 3:
        acc = _multiply(acc, x, x_mask, planes, scale, zero, feature, exists, 3, N, K, GROUP, EVEN_N, ASM)
    else:
        acc = _multiply(acc, x, x_mask, planes, scale, zero, feature, exists, 4, N, K, GROUP, EVEN_N, ASM)
    if SLOTS:
        while slot < end:
            acc = dot(columns(value, unit, x.dtype.element_ty), x_slots, acc)
            slot += SLOTS
            x_slots, value, unit = load_slots(slot, end, x, x_mask, projected, feature, exists, weight, N, K, SLOTS)
    if bias is not None:
        own = tl.load(bias + expert.to(tl.int64) * N + feature, mask=exists, other=0.0)
        acc += own.to(tl.float32)[:, None]
    write_block(acc, out, routing_weights, row, valid, column, column < WIDTH, WIDTH, ACTIVATION, ATOMIC, TOP_K)
