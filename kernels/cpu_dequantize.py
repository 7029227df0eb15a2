"""Products of packed weights with many rows on the CPU: dequantize some of the rows of a weight, multiply, go on.

The compiled loop writes bfloat16 as pairs in one 32-bit integer, because Inductor has no conversion from float32 but a
chain of nine instructions: the two codes of a pair lie in the two halves of a word of the planes, the float32 bits of
both are rounded half up by adding, and one of them is shifted under the other.
"""

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from moe_compiler.kernels.cpu_compile import compiled
from moe_compiler.kernels.cpu_gemv import per_tile
from moe_compiler.kernels.cpu_words import INTEGERS, digits_of_group, expert_words, fields, pad_last
from moe_compiler.kernels.packed import PackedTensors
from moe_compiler.kernels.planes import ALIGNMENT, TILE

_CHUNK_BYTES = 1 << 24  # of dequantized weights at a time; smaller chunks cost more than cache misses do
_HALF = 16  # bits of a bfloat16


def dense_linear(packed: PackedTensors, expert: int, x: Tensor, group_size: int) -> Tensor:
    """Products of one expert's base weight with many rows, without the channel pool.

    Args:
        packed: the linear, `(N, K)` per expert, on the CPU.
        expert: which expert.
        x: `(R, K)` float32 or bfloat16.
        group_size: `G`: 16, 32, 64 or a multiple of 128.

    Returns:
        `(R, N)` in the dtype of `x`.

    Raises:
        CompilerUnavailableError: the kernel could not be compiled.
    """
    out_features, tiles = packed.out_features, -(-x.shape[1] // TILE)
    num_planes, start = packed.table[expert].tolist()
    scale = per_tile(packed.scale[expert].float(), group_size, tiles)
    zero_point = per_tile(packed.zero_point[expert], group_size, tiles).float() * 2.0 ** (2 * num_planes - 8)
    offset = -scale * zero_point
    pairs = x.dtype == torch.bfloat16
    x = pad_last(x, tiles * TILE) if pairs else INTEGERS.channels(x).flatten(1)
    step = _chunk_rows(out_features, tiles * TILE * x.element_size())
    out = x.new_empty(x.shape[0], out_features if step < out_features else 0)
    for begin in range(0, out_features, step):
        rows = slice(min(begin, out_features - step), min(begin, out_features - step) + step)
        words = expert_words(packed.planes, INTEGERS, start * ALIGNMENT, num_planes, out_features, tiles, rows)
        arguments = (words, scale[rows], offset[rows])
        key = (words.shape, words.stride(), scale.shape, pairs)
        kernel = compiled("dequantize", key, partial(_formula, pairs), arguments, half_vectors=True)
        weight = kernel(*arguments).view(x.dtype).flatten(1)
        if step == out_features:
            return F.linear(x, weight)
        out[:, rows] = F.linear(x, weight)
    return out


def _chunk_rows(out_features: int, row_bytes: int) -> int:
    """Rows dequantized at a time, as many for each chunk; the last chunk goes over some rows again if it must."""
    chunks = -(-out_features * row_bytes // _CHUNK_BYTES)
    return -(-out_features // max(1, chunks))


def _formula(pairs: bool, words: Tensor, scale: Tensor, offset: Tensor) -> Tensor:
    """Weights of some rows: pairs of bfloat16 in the order of the channels, or float32 in the order of the words."""
    tiles, _, rows, _ = words.shape
    scale, offset = (each.view(rows, tiles, -1, 1) for each in (scale, offset))
    groups = scale.shape[2]
    group_of = {digit: group for group in range(groups) for digit in digits_of_group(INTEGERS, group, groups)}
    weights = {
        field.digit: field.codes().float() * scale[:, :, group_of[field.digit]] + offset[:, :, group_of[field.digit]]
        for field in fields(words.transpose(0, 2).unbind(1), INTEGERS)
    }
    if pairs:
        half = INTEGERS.digits // 2
        lanes = [_pair(weights[digit], weights[half + digit]) for digit in range(half)]
    else:
        lanes = [weights[digit] for digit in range(INTEGERS.digits)]
    return torch.cat([lane.unsqueeze(2) for lane in lanes], dim=2).flatten(1)


def _pair(low: Tensor, high: Tensor) -> Tensor:
    """Two float32 rounded to bfloat16 in one int32."""
    low, high = (each.view(torch.int32) + (1 << _HALF - 1) for each in (low, high))
    return (high & -(1 << _HALF)) | ((low >> _HALF) & ((1 << _HALF) - 1))
