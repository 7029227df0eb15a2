"""Products of packed weights with few rows on the CPU: unpacking and multiplying in one compiled loop.

With `q` the codes, `z` the zero points and `s` the scales of a group, `Σ_k s·(q − z)·x = s·(Σ_k q·x − z·Σ_k x)`: the
loop needs per weight one mask, one conversion and, per row, one multiply-add; group sums of `x` are made once per row.
Codes are not shifted to the right: `x` is divided by their place in the word instead, which is exact.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, partial

import torch
from torch import Tensor

from moe_compiler.kernels.cpu_compile import compiled
from moe_compiler.kernels.cpu_words import BYTES, INTEGERS, WordFormat, digits_of_group, fields, pad_last, shifts
from moe_compiler.kernels.packed import PackedTensors
from moe_compiler.kernels.planes import ALIGNMENT, HALF_WORDS, TILE

ROWS = (4, 2, 1)
"""Rows that one call of the compiled kernel multiplies, in the order in which an expert's rows are cut up."""


@dataclass(frozen=True)
class RowBlock:
    """Consecutive rows of one expert.

    Attributes:
        expert: the expert.
        rows: one of `ROWS`.
    """

    expert: int
    rows: int


def row_blocks(rows: int) -> list[int]:
    """Sizes of the blocks, each one of `ROWS`, that hold so many rows of one expert."""
    most = ROWS[0]
    last = rows % most
    return [most] * (rows // most) + ([min(size for size in ROWS if size >= last)] if last else [])


def gemv(packed: PackedTensors, blocks: Sequence[RowBlock], x: Tensor, group_size: int) -> Tensor:
    """Products of experts' base weights with a few rows each, without the channel pool.

    Args:
        packed: the linear, `(N, K)` per expert, on the CPU.
        blocks: which rows belong to which expert, in the order of the rows.
        x: `(R, K)` float32, `R` the sum of the blocks' rows.
        group_size: `G`: 16, 32, 64 or a multiple of 128.

    Returns:
        `(R, N)` float32.

    Raises:
        CompilerUnavailableError: a kernel could not be compiled.
    """
    form = BYTES if group_size % TILE == 0 else INTEGERS
    planes = packed.planes.contiguous().view(form.dtype).view(-1, form.lanes)
    table = packed.table.tolist()
    classes: dict[tuple[int, int], list[tuple[int, int]]] = defaultdict(list)
    first = 0
    for block in blocks:
        classes[table[block.expert][0], block.rows].append((block.expert, first))
        first += block.rows
    out = x.new_empty(x.shape[0], packed.out_features)
    for (num_planes, rows), members in classes.items():
        experts = torch.tensor([expert for expert, _ in members])
        places = torch.tensor([first for _, first in members])[:, None] + torch.arange(rows)
        starts = torch.tensor([table[expert][1] * (ALIGNMENT // HALF_WORDS) for expert, _ in members])
        channels = form.channels(x[places])
        sums = _group_sums(channels, max(1, TILE // group_size)) * 2.0 ** (2 * num_planes - 8)
        arguments = (
            planes,
            starts,
            experts,
            packed.scale,
            packed.zero_point,
            channels * _factors(num_planes, form),
            sums,
        )
        shapes = (packed.scale.shape, channels.shape[2], group_size, num_planes, rows)
        formula = partial(_formula, form, num_planes, group_size)
        kernel = compiled("gemv", shapes, formula, arguments, varying=(0, 1, 2, 5, 6), half_vectors=form is INTEGERS)
        out[places.view(-1)] = kernel(*arguments).view(-1, packed.out_features)
    return out


@cache
def _factors(num_planes: int, form: WordFormat) -> Tensor:
    """What `Field.shifted_codes` has too much, inverted: `(digits, 1)`."""
    return torch.tensor([[2.0**-shift] for shift in shifts(num_planes, form)])


def per_tile(parameters: Tensor, group_size: int, tiles: int) -> Tensor:
    """Parameters of groups `(..., ceil(K/G))` with the same number for each tile, `(..., tiles · max(1, 128/G))`."""
    if group_size > TILE:
        parameters = parameters.unsqueeze(-1).expand(*parameters.shape, group_size // TILE).flatten(-2)
    size = tiles * max(1, TILE // group_size)
    return pad_last(parameters[..., :size], size).contiguous()  # kernels are compiled for contiguous parameters


def _group_sums(channels: Tensor, groups: int) -> Tensor:
    """Sums over the digits of each group, lane by lane: `(..., tiles, groups, lanes)`."""
    halves = channels if groups == 1 else channels.unflatten(-2, (2, groups, -1)).sum(dim=-4)
    return halves.sum(dim=-2, keepdim=groups == 1)


def _formula(
    form: WordFormat,
    num_planes: int,
    group_size: int,
    planes: Tensor,
    starts: Tensor,
    experts: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    values: Tensor,
    sums: Tensor,
) -> Tensor:
    """The kernel: products of `C` experts of one width with `M` rows each, `(C, M, N)`.

    Its sums run over the channels of a few tiles at a time: in memory these tiles are few streams, each read in order.

    Args:
        form: how the planes are read.
        num_planes: of the experts.
        group_size: `G`.
        planes: the planes of all experts, as rows of `form.lanes` words.
        starts: `(C,)` int64, where the experts begin in `planes`.
        experts: `(C,)` int64.
        scale: `(E, N, groups)`.
        zero_point: `(E, N, groups)`.
        values: `(C, M, tiles, digits, lanes)`, the inputs times `_factors`.
        sums: `(C, M, tiles, groups of a tile, lanes)`, sums of the inputs in units of the zero points.
    """
    rows, tiles, groups = values.shape[1], values.shape[2], sums.shape[3]
    out_features, run = scale.shape[1], _run_length(values.shape[2])
    tile, feature = torch.arange(tiles).view(-1, 1, run), torch.arange(out_features).view(-1, 1)
    words = [
        torch.ops.aten._unsafe_index(
            planes, [starts.view(-1, 1, 1, 1) + (tile * num_planes + plane) * out_features + feature]
        ).int()
        for plane in range(num_planes)
    ]
    per_expert = out_features * tiles * groups
    # as_strided keeps Inductor from making the parameters again for each row, and float16 out of the main loop
    factor, offset = (
        per_tile(parameter, group_size, tiles)[experts].as_strided(
            (experts.shape[0], tiles // run, out_features, run, groups, 1),
            (per_expert, run * groups, tiles * groups, groups, 1, 1),
        )
        for parameter in (scale.float(), -scale.float() * zero_point.float())
    )
    values = values.view(-1, rows, tiles // run, 1, run, form.digits, form.lanes)
    sums = sums.view(-1, rows, tiles // run, 1, run, groups, form.lanes)
    codes = {field.digit: field.shifted_codes().float() for field in fields(words, form)}
    out = []
    for row in range(rows):
        terms = []
        for group in range(groups):
            first, *others = [codes[at] * values[:, row, ..., at, :] for at in digits_of_group(form, group, groups)]
            term = sum(others, first) * factor[..., group, :]
            terms.append(term + offset[..., group, :] * sums[:, row, ..., group, :])
        out.append(sum(terms[1:], terms[0]).sum(dim=(3, 4)).sum(dim=1))
    return torch.stack(out, dim=1)


def _run_length(tiles: int) -> int:
    """How many tiles a sum runs over: a divisor of `tiles`, of 2 to 4 where there is one."""
    return next((run for run in (4, 3, 2) if tiles % run == 0), tiles if tiles <= 16 else 1)
