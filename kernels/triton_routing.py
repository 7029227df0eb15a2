"""Routing on the device: rows are grouped by expert and cut into blocks, in fixed-size outputs and no host read.

A row is one (token, expert) pair. The kernels of the experts take one block of rows of one expert at a time, so rows
are first sorted by expert: a counting sort, stable and without atomics, hence the same on every run. Up to
`SINGLE_LAUNCH_ROWS` rows one program does it all. Above, a first launch counts the experts in each chunk of rows, and
in a second one every program adds up the counts of the chunks before its own and places its rows.

All shapes and grids follow from the shapes of the inputs alone, so a CUDA graph that was captured once serves every
routing (the idea of vLLM's `moe_align_block_size`, which pads where this keeps a list of records).

Launches over blocks of rows and blocks of columns have a grid of one dimension, columns first (`program_block`): the
other dimensions of a CUDA grid end at 65,535.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

SINGLE_LAUNCH_ROWS = 512
"""Most rows that one program sorts; its work grows with their square."""

_CHUNK_ROWS = 256  # rows of a program of the two-launch form
_LONG_CHUNK_ROWS = 1024  # the same above `_LONG_ROWS` rows, where reading the counts of all chunks weighs more
_LONG_ROWS = 1 << 16
_MIN_CHUNK_ROWS = 128  # one row for each thread of four warps
_COLUMNS = 32  # rows that a chunk is compared with at a time
_COUNT_CHUNKS = 8  # chunks whose counts are read at a time


@dataclass(frozen=True, eq=False)
class Blocks:
    """The rows of a batch, sorted by expert and cut into blocks of one expert each.

    Attributes:
        record: `(max_blocks, 4)` int32, for each block its expert (-1 for an unused block), its first position in
            `order`, its rows (1 to `block_m`, 0 for an unused block) and a zero, so that it is one load of 16 bytes.
            The blocks of an expert follow each other; used blocks come first, by expert.
        order: `(R,)` int32, the rows sorted by expert, those of one expert in ascending order. Rows with ids outside
            `0 .. E - 1` come last and belong to no block.
        offsets: `(E + 1,)` int32; the rows of expert `e` are `order[offsets[e]:offsets[e + 1]]`.
        block_m: most rows of a block.
    """

    record: Tensor
    order: Tensor
    offsets: Tensor
    block_m: int


def max_blocks(rows: int, num_experts: int, block_m: int) -> int:
    """The most blocks that any routing of `rows` rows can need: `min(R, R // block_m + E)`.

    Expert `e` with `c` rows has `ceil(c / block_m)` blocks. A block has at least one row, so there are at most `R`.
    And `ceil(c / b) <= floor(c / b) + 1`, while a sum of floors is at most the floor of the sum: over the experts,
    `Σ ceil(c_e / b) <= floor(Σ c_e / b) + E <= floor(R / b) + E`.

    Args:
        rows: `R`.
        num_experts: `E`.
        block_m: most rows of a block.
    """
    return min(rows, rows // block_m + num_experts)


def route(expert_ids: Tensor, num_experts: int, block_m: int) -> Blocks:
    """Groups rows by expert, on the device; one launch up to `SINGLE_LAUNCH_ROWS` rows, two above, none for no rows.

    Args:
        expert_ids: `(R,)` int32 or int64; ids outside `0 .. E - 1` mark rows computed elsewhere.
        num_experts: `E`.
        block_m: most rows of a block.

    Returns:
        The blocks, on the device of `expert_ids`.

    Raises:
        TypeError: `expert_ids` is not int32 or int64.
        ValueError: `expert_ids` is not one-dimensional, or `num_experts` or `block_m` is not positive.
    """
    if expert_ids.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"`expert_ids` must be int32 or int64 to be routed, but is {expert_ids.dtype}")
    if expert_ids.dim() != 1:
        raise ValueError(f"`expert_ids` must have one dimension to be routed, but has shape {tuple(expert_ids.shape)}")
    if num_experts < 1 or block_m < 1:
        raise ValueError(
            f"`num_experts` and `block_m` must be positive to route rows, but are {num_experts} and {block_m}"
        )
    rows = expert_ids.shape[0]
    capacity = max_blocks(rows, num_experts, block_m)
    record = expert_ids.new_empty(capacity, 4, dtype=torch.int32)
    order = expert_ids.new_empty(rows, dtype=torch.int32)
    if rows == 0:
        return Blocks(record, order, expert_ids.new_zeros(num_experts + 1, dtype=torch.int32), block_m)
    offsets = expert_ids.new_empty(num_experts + 1, dtype=torch.int32)
    ids = expert_ids.contiguous()
    bins = triton.next_power_of_2(num_experts + 1)
    if rows <= SINGLE_LAUNCH_ROWS:
        chunk_rows = max(_MIN_CHUNK_ROWS, triton.next_power_of_2(rows))
    else:
        chunk_rows = _CHUNK_ROWS if rows <= _LONG_ROWS else _LONG_CHUNK_ROWS
    chunks = triton.cdiv(rows, chunk_rows)
    warps = {128: 4, 1024: 16}.get(chunk_rows, 8)
    counts = offsets
    if chunks > 1:
        counts = expert_ids.new_empty(chunks, bins, dtype=torch.int32)
        _count[(chunks,)](ids, counts, rows, num_experts, BINS=bins, CHUNK=chunk_rows, num_warps=warps)
    _place[(chunks,)](
        ids,
        counts,
        record,
        order,
        offsets,
        rows,
        num_experts,
        chunks,
        block_m,
        capacity,
        BINS=bins,
        CHUNK=chunk_rows,
        COLUMNS=_COLUMNS,
        COUNT_CHUNKS=_COUNT_CHUNKS,
        SINGLE=chunks == 1,
        num_warps=warps,
    )
    return Blocks(record, order, offsets, block_m)


@triton.jit
def _load_experts(ids: tl.tensor, row: tl.tensor, rows: tl.tensor, num_experts: tl.tensor) -> tl.tensor:
    """Experts of the rows; every id that is no expert here, and every row past the end, as expert `num_experts`."""
    expert = tl.load(ids + row, mask=row < rows, other=-1)
    return tl.where((expert >= 0) & (expert < num_experts), expert, num_experts).to(tl.int32)


@triton.jit(do_not_specialize=["rows", "num_experts"])
def _count(
    ids: tl.tensor, counts: tl.tensor, rows: tl.tensor, num_experts: tl.tensor, BINS: tl.constexpr, CHUNK: tl.constexpr
) -> None:
    """Rows of each expert in each chunk: `counts` `(chunks, BINS)`."""
    chunk = tl.program_id(0)
    expert = _load_experts(ids, chunk * CHUNK + tl.arange(0, CHUNK), rows, num_experts)
    tl.store(counts + chunk * BINS + tl.arange(0, BINS), tl.histogram(expert, BINS))


@triton.jit(do_not_specialize=["rows", "num_experts", "chunks", "block_m", "capacity"])
def _place(
    ids: tl.tensor,
    counts: tl.tensor,
    record: tl.tensor,
    order: tl.tensor,
    offsets: tl.tensor,
    rows: tl.tensor,
    num_experts: tl.tensor,
    chunks: tl.tensor,
    block_m: tl.tensor,
    capacity: tl.tensor,
    BINS: tl.constexpr,
    CHUNK: tl.constexpr,
    COLUMNS: tl.constexpr,
    COUNT_CHUNKS: tl.constexpr,
    SINGLE: tl.constexpr,
) -> None:
    """Writes the order of this chunk's rows and a share of the records."""
    chunk = tl.program_id(0)
    row = chunk * CHUNK + tl.arange(0, CHUNK)
    expert = _load_experts(ids, row, rows, num_experts)
    bins = tl.arange(0, BINS)
    before = tl.zeros((BINS,), tl.int32)  # rows of each expert in the chunks before this one
    total = tl.zeros((BINS,), tl.int32)
    if SINGLE:
        total = tl.histogram(expert, BINS)
    else:
        for first in tl.range(0, chunks, COUNT_CHUNKS):
            other = first + tl.arange(0, COUNT_CHUNKS)[:, None]
            count = tl.load(counts + other * BINS + bins[None, :], mask=other < chunks, other=0)
            before += tl.sum(tl.where(other < chunk, count, 0), axis=0)
            total += tl.sum(count, axis=0)
    start = tl.cumsum(total, axis=0) - total

    rank = tl.zeros((CHUNK,), tl.int32)  # rows of the same expert before each row in this chunk
    for first in tl.range(0, CHUNK, COLUMNS):
        column = chunk * CHUNK + first + tl.arange(0, COLUMNS)
        same = _load_experts(ids, column, rows, num_experts)[None, :] == expert[:, None]
        rank += tl.sum((same & (column[None, :] < row[:, None])).to(tl.int32), axis=1)
    position = tl.gather(start + before, expert, axis=0) + rank
    tl.store(order + position, row, mask=row < rows)
    if chunk == 0:
        tl.store(offsets + bins, start, mask=bins <= num_experts)

    blocks = tl.where(bins < num_experts, (total + block_m - 1) // block_m, 0)
    last = tl.cumsum(blocks, axis=0)
    field = tl.arange(0, 4)[None, :]
    for index in tl.range(chunk, tl.max(blocks, axis=0), chunks):  # one block of every expert at a time
        block = last - blocks + index
        first_row = start + index * block_m
        size = tl.minimum(total - index * block_m, block_m)
        value = tl.where(field == 0, bins[:, None], tl.where(field == 1, first_row[:, None], size[:, None]))
        value = tl.where(field == 3, 0, value)
        tl.store(record + block[:, None] * 4 + field, value, mask=(index < blocks)[:, None])
    used = tl.max(last, axis=0)
    for first in tl.range(used + chunk * BINS, capacity, chunks * BINS):
        block = first + bins[:, None]
        tl.store(record + block * 4 + field, tl.where(field == 0, -1, 0), mask=block < capacity)


@triton.jit
def program_block(WIDTH: tl.constexpr, BLOCK_N: tl.constexpr) -> tl.tensor:
    """The program's block of rows, and the first of its `BLOCK_N` columns out of `WIDTH`."""
    COLUMN_BLOCKS: tl.constexpr = (WIDTH + BLOCK_N - 1) // BLOCK_N
    program = tl.program_id(0)
    return program // COLUMN_BLOCKS, program % COLUMN_BLOCKS * BLOCK_N


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
