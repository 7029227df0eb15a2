"""Triton kernels for few tokens per expert: they read every weight once, as packed, and are bound by memory.

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
from moe_compiler.kernels.triton_epilogue import activate, clear_foreign_rows
from moe_compiler.kernels.triton_pool import columns, load_slots


@triton.jit
def load_block(
    expert_ids: tl.tensor,
    record: tl.tensor,
    order: tl.tensor,
    block: tl.tensor,
    E: tl.constexpr,
    BLOCK_M: tl.constexpr,
) -> tl.tensor:
    """The expert of a block, -1 for none, and its rows: `(BLOCK_M,)` numbers, and which of them exist.

    Without `record` and `order` block `b` is row `b` alone, of expert `expert_ids[b]`.
    """
    lane = tl.arange(0, BLOCK_M)
    if record is None:
        expert = tl.load(expert_ids + block)
        expert = tl.where((expert >= 0) & (expert < E), expert, -1).to(tl.int32)
        valid = lane < 1
        row = block + lane * 0
    else:
        expert = tl.load(record + 4 * block)
        first = tl.load(record + 4 * block + 1)
        valid = lane < tl.load(record + 4 * block + 2)
        row = tl.load(order + first + lane, mask=valid, other=0)
    return expert, row, valid


@triton.jit
def _matmul(
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


@triton.jit
def _multiply(
    x: tl.tensor,
    x_mask: tl.tensor,
    projected: tl.tensor,
    weight: tl.tuple,
    bias: tl.tensor,
    expert: tl.tensor,
    feature: tl.tensor,
    exists: tl.tensor,
    N: tl.constexpr,
    K: tl.constexpr,
    GROUP: tl.constexpr,
    EVEN_N: tl.constexpr,
    SLOTS: tl.constexpr,
    ASM: tl.constexpr,
) -> tl.tensor:
    """Some output features of one expert for a block of rows, pool and bias included.

    Args:
        x: `(1, rows)` pointers to the rows of `x`.
        x_mask: `(1, rows)`, the rows that exist.
        projected: `(1, rows)` pointers to what `triton_pool.project` made of them, or `None`.
        weight: `PackedTensors`.
        bias: pointer to `(E, N)`, or `None`.
        expert: the block's expert.
        feature: `(features,)`, output features.
        exists: `(features,)`, those that exist.
        N: output features of the linear.
        K: input features.
        GROUP: input channels of one scale.
        EVEN_N: whether all features exist.
        SLOTS: pool slots of one dot, 0 for no pool.
        ASM: see `triton_digits`.

    Returns:
        `(features, rows)` float32.
    """
    GROUPS: tl.constexpr = (K + GROUP - 1) // GROUP
    acc = tl.zeros((feature.shape[0], x_mask.shape[1]), tl.float32)
    P = tl.load(weight.table + 2 * expert)
    planes = weight.planes + tl.load(weight.table + 2 * expert + 1).to(tl.int64) * 128
    scale = weight.scale + expert.to(tl.int64) * (N * GROUPS)
    zero = weight.zero_point + expert.to(tl.int64) * (N * GROUPS)
    if SLOTS:
        # The first slots' chain of loads starts before the long loop and is used after it.
        slot = tl.load(weight.pool_offset + expert)
        end = tl.load(weight.pool_offset + expert + 1)
        x_slots, value, unit = load_slots(slot, end, x, x_mask, projected, feature, exists, weight, N, K, SLOTS)
    if P == 1:
        acc = _matmul(acc, x, x_mask, planes, scale, zero, feature, exists, 1, N, K, GROUP, EVEN_N, ASM)
    elif P == 2:
        acc = _matmul(acc, x, x_mask, planes, scale, zero, feature, exists, 2, N, K, GROUP, EVEN_N, ASM)
    elif P == 3:
        acc = _matmul(acc, x, x_mask, planes, scale, zero, feature, exists, 3, N, K, GROUP, EVEN_N, ASM)
    else:
        acc = _matmul(acc, x, x_mask, planes, scale, zero, feature, exists, 4, N, K, GROUP, EVEN_N, ASM)
    if SLOTS:
        while slot < end:
            acc = dot(columns(value, unit, x.dtype.element_ty), x_slots, acc)
            slot += SLOTS
            x_slots, value, unit = load_slots(slot, end, x, x_mask, projected, feature, exists, weight, N, K, SLOTS)
    if bias is not None:
        own = tl.load(bias + expert.to(tl.int64) * N + feature, mask=exists, other=0.0)
        acc += own.to(tl.float32)[:, None]
    return acc


@triton.jit
def _store_rows(
    out: tl.tensor, row: tl.tensor, column: tl.tensor, mask: tl.tensor, value: tl.tensor, N: tl.constexpr
) -> None:
    """Stores `(columns, rows)` to `out` `(R, N)`."""
    tl.store(out + row.to(tl.int64)[None, :] * N + column[:, None], value.to(out.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["num_rows"])
def gate_up_kernel(
    x: tl.tensor,
    projected: tl.tensor,
    expert_ids: tl.tensor,
    record: tl.tensor,
    order: tl.tensor,
    offsets: tl.tensor,
    weight: tl.tuple,
    bias: tl.tensor,
    h: tl.tensor,
    num_rows: tl.tensor,
    E: tl.constexpr,
    N: tl.constexpr,
    K: tl.constexpr,
    D: tl.constexpr,
    REPEAT: tl.constexpr,
    GROUP: tl.constexpr,
    ACTIVATION: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_M: tl.constexpr,
    SLOTS: tl.constexpr,
    ASM: tl.constexpr,
) -> None:
    """`h = act(gate) · up` of a block of rows.

    Grid: blocks of output features, blocks of rows.

    Args:
        x: `(T, K)` or `(R, K)` float16 or bfloat16.
        projected: what `triton_pool.project` made of `x`.
        expert_ids: `(R,)`, read if there are no blocks.
        record, order, offsets: of `triton_routing.Blocks`, or `None` for a block per row.
        weight: `PackedTensors` of the linear `(N, K)`.
        bias: `(E, N)` or `None`.
        h: `(R, N / 2)`, in the dtype of `x`.
        num_rows: `R`.
        E: experts.
        N: output features of the linear.
        K: input features.
        D: the pool's directions.
        REPEAT: consecutive rows that read one row of `x`.
        GROUP: input channels of one scale.
        ACTIVATION: see `triton_epilogue.activate`.
        BLOCK_N: columns of a program's part of the result.
        BLOCK_M: rows of a block.
        SLOTS: pool slots of one dot, 0 for no pool.
        ASM: see `triton_digits`.
    """
    block = tl.program_id(1)
    WIDTH: tl.constexpr = N // 2
    column = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    both = tl.arange(0, 2 * BLOCK_N)
    column_of_both = tl.program_id(0) * BLOCK_N + both % BLOCK_N
    feature = column_of_both + both // BLOCK_N * WIDTH
    expert, row, valid = load_block(expert_ids, record, order, block, E, BLOCK_M)
    mask = valid[None, :] & (column < WIDTH)[:, None]
    if record is not None:
        clear_foreign_rows(h, order, offsets, num_rows, block, column, column < WIDTH, E, WIDTH, BLOCK_M)
    if expert < 0:
        if record is None:
            _store_rows(h, row, column, mask, tl.zeros((BLOCK_N, BLOCK_M), tl.float32), WIDTH)
        return
    x += (row // REPEAT).to(tl.int64)[None, :] * K
    if projected is not None:
        projected += (row // REPEAT).to(tl.int64)[None, :] * D
    EVEN_N: tl.constexpr = WIDTH % BLOCK_N == 0
    acc = _multiply(
        x,
        valid[None, :],
        projected,
        weight,
        bias,
        expert,
        feature,
        column_of_both < WIDTH,
        N,
        K,
        GROUP,
        EVEN_N,
        SLOTS,
        ASM,
    )
    gate, up = acc.reshape(2, BLOCK_N, BLOCK_M).permute(1, 2, 0).split()
    _store_rows(h, row, column, mask, activate(gate, ACTIVATION) * up, WIDTH)


@triton.jit(do_not_specialize=["num_rows"])
def linear_kernel(
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
    EPILOGUE: tl.constexpr,
    TOP_K: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_M: tl.constexpr,
    SLOTS: tl.constexpr,
    ASM: tl.constexpr,
) -> None:
    """A linear for a block of rows; what happens to its result is chosen by `EPILOGUE`.

    Grid: blocks of output features, blocks of rows.

    Args:
        x: `(T, K)` or `(R, K)` float16 or bfloat16.
        projected: what `triton_pool.project` made of `x`.
        expert_ids: `(R,)`, read if there are no blocks.
        record, order, offsets: of `triton_routing.Blocks`, or `None` for a block per row.
        weight: `PackedTensors` of the linear `(N, K)`.
        bias: `(E, N)` or `None`.
        routing_weights: `(R,)`, or `None` for `EPILOGUE` 0.
        out: `(R, N)`, or `(R / TOP_K, N)` for `EPILOGUE` 2.
        num_rows: `R`.
        E: experts.
        N: output features of the linear.
        K: input features.
        D: the pool's directions.
        REPEAT: consecutive rows that read one row of `x`.
        GROUP: input channels of one scale.
        EPILOGUE: 0 to store rows, 1 to store them times their routing weights, 2 to add those to their tokens.
        TOP_K: rows of one token.
        BLOCK_N: columns of a program's part of the result.
        BLOCK_M: rows of a block.
        SLOTS: pool slots of one dot, 0 for no pool.
        ASM: see `triton_digits`.
    """
    block = tl.program_id(1)
    feature = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    exists = feature < N
    expert, row, valid = load_block(expert_ids, record, order, block, E, BLOCK_M)
    mask = valid[None, :] & exists[:, None]
    if EPILOGUE == 0 and record is not None:
        clear_foreign_rows(out, order, offsets, num_rows, block, feature, exists, E, N, BLOCK_M)
    if expert < 0:
        if EPILOGUE == 0 and record is None:
            _store_rows(out, row, feature, mask, tl.zeros((BLOCK_N, BLOCK_M), tl.float32), N)
        return
    x += (row // REPEAT).to(tl.int64)[None, :] * K
    if projected is not None:
        projected += (row // REPEAT).to(tl.int64)[None, :] * D
    EVEN_N: tl.constexpr = N % BLOCK_N == 0
    acc = _multiply(
        x, valid[None, :], projected, weight, bias, expert, feature, exists, N, K, GROUP, EVEN_N, SLOTS, ASM
    )
    if EPILOGUE != 0:
        acc *= tl.load(routing_weights + row, mask=valid, other=0.0).to(tl.float32)[None, :]
    if EPILOGUE == 2:
        target = out + (row // TOP_K).to(tl.int64)[None, :] * N + feature[:, None]
        tl.atomic_add(target, acc, mask=mask, sem="relaxed")
    else:
        _store_rows(out, row, feature, mask, acc, N)
