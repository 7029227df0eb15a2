"""How the CPU kernels read the planes: as words whose lanes hold many digits, and which channel each digit belongs to.

The 16 half words that one row has in one tile and plane (see `moe_compiler.kernels.planes`) are read in one of two
ways, because the compiler has vectors of bytes and of 32-bit integers but none of 16-bit integers:

* `BYTES`: 32 lanes of 4 digits. Lane `2i + b`, digit `j` is channel `16·(4b + j) + i` of the tile.
* `INTEGERS`: 8 lanes of 16 digits. Lane `l`, digit `8h + j` is channel `16·j + 2l + h`: all lanes of a digit lie in the
  same 16 channels, which groups of fewer than 128 channels need.

Codes wider than one digit are merged from the words of their planes a word at a time, before digits are taken apart.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from moe_compiler.kernels.planes import TILE


def pad_last(values: Tensor, size: int) -> Tensor:
    """Values with zeros after them up to a size of the last dimension; themselves where that is their size."""
    return F.pad(values, (0, size - values.shape[-1])) if size > values.shape[-1] else values


@dataclass(frozen=True)
class WordFormat:
    """One way to read a row's half words of a tile.

    Attributes:
        bits: bits of a word.
        lanes: words of a row in one tile and plane.
        dtype: in which the flat planes are viewed.
    """

    bits: int
    lanes: int
    dtype: torch.dtype

    @property
    def digits(self) -> int:
        """Digits in a word."""
        return self.bits // 2

    def channels(self, x: Tensor) -> Tensor:
        """Channels `(..., K)` in the order of the words, `(..., tiles, digits, lanes)`; zeros fill the last tile."""
        size = -(-x.shape[-1] // TILE) * TILE
        tiles: Tensor = pad_last(x, size).unflatten(-1, (-1, 8, 16))
        if self is BYTES:
            tiles = tiles.unflatten(-2, (2, 4)).movedim(-3, -1).flatten(-2)
        else:
            tiles = tiles.unflatten(-1, (8, 2)).movedim(-1, -3).flatten(-3, -2)
        return tiles


BYTES = WordFormat(bits=8, lanes=32, dtype=torch.uint8)
INTEGERS = WordFormat(bits=32, lanes=8, dtype=torch.int32)


def expert_words(
    planes: Tensor, form: WordFormat, start: int, num_planes: int, out_features: int, tiles: int, rows: slice
) -> Tensor:
    """The words of rows of one expert, `(tiles, P, rows, lanes)`, a view of the flat planes.

    Args:
        planes: int16, flat.
        form: how to read them.
        start: where the expert begins, in half words.
        num_planes: `P`.
        out_features: `N`.
        tiles: tiles of 128 channels.
        rows: of the `N`.
    """
    words = planes.contiguous().view(form.dtype)
    first = words.storage_offset() + start * 16 // form.bits + rows.start * form.lanes
    plane = out_features * form.lanes
    shape = (tiles, num_planes, rows.stop - rows.start, form.lanes)
    return words.as_strided(shape, (num_planes * plane, plane, form.lanes, 1), first)


@dataclass(frozen=True)
class Field:
    """The codes that lie at one place of all words.

    Attributes:
        digit: which of the word's digits, as `WordFormat.channels` counts them.
        word: int32.
        offset: lowest bit of the code in the word.
        width: bits of the code.
        sign: whether the code reaches the sign bit of an int32.
    """

    digit: int
    word: Tensor
    offset: int
    width: int
    sign: bool

    def codes(self) -> Tensor:
        """The codes, int32."""
        mask = (1 << self.width) - 1
        return (self.word >> self.offset if self.offset else self.word) & mask

    def shifted_codes(self) -> Tensor:
        """The codes times `2**self.shift`, int32: one instruction where `codes` needs two."""
        word = self.word >> self.width if self.sign else self.word
        return word & (((1 << self.width) - 1) << self.shift)

    @property
    def shift(self) -> int:
        """Binary logarithm of the factor in `shifted_codes`."""
        return self.offset - self.width if self.sign else self.offset


def fields(words: Sequence[Tensor], form: WordFormat) -> Iterator[Field]:
    """Merges the planes of words and takes their codes apart.

    Args:
        words: `P` int32 tensors of one shape, the most significant plane first.
        form: how the words were read.
    """
    width = 2 * len(words)
    for word, pitch, digits in _merge(words, form):
        for place, digit in enumerate(digits):
            offset = pitch * place
            yield Field(digit, word, offset, width, sign=offset + width == 32)


def digits_of_group(form: WordFormat, group: int, groups: int) -> list[int]:
    """The digits of a word whose channels lie in a group, where a tile has 1, 2, 4 or 8 groups."""
    return [digit for digit in range(form.digits) if groups == 1 or digit % 8 * groups // 8 == group]


def shifts(num_planes: int, form: WordFormat) -> list[int]:
    """`Field.shift` of each digit."""
    by_digit = {field.digit: field.shift for field in fields([torch.zeros((), dtype=torch.int32)] * num_planes, form)}
    return [by_digit[digit] for digit in range(form.digits)]


def _mask(form: WordFormat, pitch: int, width: int, offset: int = 0) -> int:
    """`width` ones every `pitch` bits, as a signed int32."""
    mask = sum(((1 << width) - 1) << place for place in range(offset, form.bits, pitch))
    return mask - (1 << 32) if mask >= 1 << 31 else mask


def _merge(words: Sequence[Tensor], form: WordFormat) -> Iterator[tuple[Tensor, int, range]]:
    """Words whose codes lie `pitch` bits apart: the word, the pitch, and the digits of its codes from the lowest."""
    if len(words) == 1:
        yield words[0], 2, range(form.digits)
        return
    for parity, word in enumerate(_interleave(words[0], words[1], 2, form)):
        if len(words) == 2:
            yield word, 4, range(parity, form.digits, 2)
        elif len(words) == 3:
            third, low, middle = words[2], _mask(form, 8, 2), _mask(form, 8, 4, 2)
            yield ((word << 2) & middle) | ((third >> 2 * parity) & low), 8, range(parity, form.digits, 4)
            yield ((word >> 2) & middle) | ((third >> 2 * parity + 4) & low), 8, range(parity + 2, form.digits, 4)
        else:
            pairs = _interleave(word, _interleave(words[2], words[3], 2, form)[parity], 4, form)
            for half, pair in enumerate(pairs):
                yield pair, 8, range(parity + 2 * half, form.digits, 4)


def _interleave(high: Tensor, low: Tensor, width: int, form: WordFormat) -> tuple[Tensor, Tensor]:
    """Fields of `2·width` bits from two words with fields of `width` bits: of the even fields, and of the odd ones."""
    even = _mask(form, 2 * width, width)
    return ((high & even) << width) | (low & even), (high & ~even) | ((low >> width) & even)
