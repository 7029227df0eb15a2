"""The canonical bit layout of expert weights: planes of 2-bit digits.

A code of `b` bits is `P = b/2` digits of 2 bits, most significant first: INT2, INT4, INT6 and INT8 are 1, 2, 3 and
4 *planes*, with no waste at 6 bits. The leading planes of an INT8 code are the INT6, INT4 and INT2 codes of the
same number, and one operator reads experts of any width by reading fewer or more planes.

For one expert of shape `(N, K)`:

* `K` is padded with zero codes to a multiple of `TILE = 128` input channels; `tiles = ceil(K / 128)`.
* One *half word* (int16) holds eight digits of one plane that lie 16 channels apart. Half word `i` of tile `t`
  holds, in bits `2j` and `2j+1`, the digit of channel `k = 128·t + 16·j + i`, for `j` in 0..7 and `i` in 0..15::

      bit   15 14 | 13 12 | ... | 3 2 | 1 0
      j        7  |    6  | ... |  1  |  0        k = 128 t + 16 j + i

* The half words of the expert are stored as `(tiles, P, N, 16)`: all planes of a tile together, plane 0 the most
  significant. The strided order lets a kernel use each digit position as a contiguous slice of `x`.

Experts follow each other in one flat int16 tensor, each starting at a multiple of `ALIGNMENT = 128` half words. A
table `(E, 2)` int32 says for each expert its number of planes and where it starts, in units of 128 half words.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from moe_compiler.kernels.affine import WIDTHS

TILE = 128
HALF_WORDS = 16
DIGITS = 8
ALIGNMENT = 128


@dataclass(frozen=True)
class PlaneLayout:
    """Where the planes of `E` experts of one linear lie in their flat tensor.

    Attributes:
        bits: the width of each expert, each one of 2, 4, 6, 8.
        out_features: `N`.
        in_features: `K`.
    """

    bits: tuple[int, ...]
    out_features: int
    in_features: int

    def __post_init__(self) -> None:
        for expert, bits in enumerate(self.bits):
            if bits not in WIDTHS:
                raise ValueError(f"`bits` must hold widths in {WIDTHS}, but expert {expert} has {bits}")
        if self.out_features < 1 or self.in_features < 1:
            raise ValueError(
                f"`out_features` and `in_features` must be positive, but are {self.out_features} and {self.in_features}"
            )

    @property
    def tiles(self) -> int:
        """Tiles of 128 input channels."""
        return -(-self.in_features // TILE)

    def half_words(self, bits: int) -> int:
        """Half words of one expert at `bits`, without the padding up to the next expert."""
        return self.tiles * (bits // 2) * self.out_features * HALF_WORDS

    @cached_property
    def offsets(self) -> tuple[int, ...]:
        """Start of each expert in half words, and the total as the last item: `E + 1` numbers."""
        offsets = [0]
        for bits in self.bits:
            size = self.half_words(bits)
            offsets.append(offsets[-1] + -(-size // ALIGNMENT) * ALIGNMENT)
        return tuple(offsets)

    def table(self) -> Tensor:
        """The device table `(E, 2)` int32: planes of the expert, start in units of 128 half words."""
        rows = [(bits // 2, start // ALIGNMENT) for bits, start in zip(self.bits, self.offsets[:-1], strict=True)]
        return torch.tensor(rows, dtype=torch.int32).reshape(len(self.bits), 2)


def pack(codes: Tensor, bits: int) -> Tensor:
    """Packs one expert's codes into planes.

    Args:
        codes: `(N, K)` uint8, each below `2**bits`.
        bits: 2, 4, 6 or 8.

    Returns:
        `(tiles, bits / 2, N, 16)` int16 half words, see the module's specification.

    Raises:
        ValueError: `bits` is not a width of the format, or a code does not fit in it.
    """
    if bits not in WIDTHS:
        raise ValueError(f"`bits` must be one of {WIDTHS}, but is {bits}")
    if bits < 8 and codes.numel() and int(codes.max()) >= 1 << bits:
        raise ValueError(f"`codes` must be below 2**{bits} = {1 << bits}, but the largest is {int(codes.max())}")
    rows, columns = codes.shape
    padded = torch.nn.functional.pad(codes, (0, -columns % TILE))
    digits = padded.view(rows, -1, DIGITS, HALF_WORDS).to(torch.int32)
    shifts = torch.arange(0, 2 * DIGITS, 2, dtype=torch.int32, device=codes.device).view(-1, 1)
    planes = []
    for plane in range(bits // 2):
        digit = (digits >> (bits - 2 - 2 * plane)) & 3
        planes.append((digit << shifts).sum(dim=2, dtype=torch.int32))  # (N, tiles, 16)
    words = torch.stack(planes).permute(2, 0, 1, 3)
    return torch.where(words >= 1 << 15, words - (1 << 16), words).to(torch.int16).contiguous()


def unpack(words: Tensor, in_features: int) -> Tensor:
    """The inverse of `pack`.

    Args:
        words: `(tiles, P, N, 16)` int16.
        in_features: `K`; channels past it are padding and are dropped.

    Returns:
        `(N, K)` uint8 codes.
    """
    tiles, planes, rows, _ = words.shape
    octets = words.contiguous().view(torch.uint8).view(tiles, planes, rows, HALF_WORDS, 2)
    out = torch.empty(rows, tiles, 2, DIGITS // 2, HALF_WORDS, dtype=torch.uint8, device=words.device)
    for position in range(DIGITS // 2):
        code = torch.zeros(tiles, rows, HALF_WORDS, 2, dtype=torch.uint8, device=words.device)
        for plane in range(planes):
            code = (code << 2) | ((octets[:, plane] >> (2 * position)) & 3)
        out[:, :, :, position] = code.permute(1, 0, 3, 2)  # low octet: digits 0..3, high octet: 4..7
    return out.view(rows, tiles * TILE)[:, :in_features]


def pack_experts(codes: Tensor, bits: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Packs the codes of all experts of one linear.

    Args:
        codes: `(E, N, K)` uint8.
        bits: the width of each expert.

    Returns:
        The flat planes, int16, and the table `(E, 2)` int32.
    """
    layout = PlaneLayout(tuple(bits), codes.shape[1], codes.shape[2])
    planes = torch.zeros(layout.offsets[-1], dtype=torch.int16, device=codes.device)
    for expert, width in enumerate(layout.bits):
        start = layout.offsets[expert]
        words = pack(codes[expert], width)
        planes[start : start + words.numel()] = words.view(-1)
    return planes, layout.table().to(codes.device)


def unpack_expert(planes: Tensor, num_planes: int, start: int, out_features: int, in_features: int) -> Tensor:
    """Codes `(N, K)` uint8 of the expert with `num_planes` planes that starts at half word `start`."""
    tiles = -(-in_features // TILE)
    size = tiles * num_planes * out_features * HALF_WORDS
    words = planes[start : start + size].view(tiles, num_planes, out_features, HALF_WORDS)
    return unpack(words, in_features)
