"""Group-wise affine quantization at 2 to 8 bits, and the search for the range of a group.

Symbols: `E` experts, `N` output features, `K` input channels, `G` group size along `K`.
A weight is `ŵ = scale·(code − zero_point)` with one scale and one zero point per output row and group
(method: torchao's `choose_qparams_affine`, asymmetric).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

WIDTHS = (2, 4, 6, 8)
"""The widths, in bits, that the packed format stores."""

_MIN_BITS, _MAX_BITS = 2, 8
_MIN_SCALE = 2.0**-24  # the smallest positive float16
_MAX_SCALE = 65504.0  # the largest finite float16
_END_MOVES = (0.5, 0.25, 0.125)  # how far the search moves one end of a range, in quantization steps
_CHUNK_ELEMENTS = {"cpu": 1 << 18}  # weights searched at a time: a CPU's cache, or a few launches elsewhere
_CHUNK_ELEMENTS_ELSEWHERE = 1 << 25


@dataclass(frozen=True, eq=False)
class QuantizedWeight:
    """The quantized weights of one linear of all `E` experts; unpacked, one byte per code.

    Attributes:
        codes: `(E, N, K)` uint8, expert `e`'s in `0 .. 2^bits[e] − 1`.
        scale: `(E, N, ceil(K/G))` float32, each exactly a positive float16, as which it is stored.
        zero_point: `(E, N, ceil(K/G))` float32, a multiple of `zero_point_step(bits[e])` in `[0, 2^bits[e])`:
            stored as the byte `zero_point / zero_point_step`.
        bits: the width of each expert's codes, 2 to 8.
        group_size: `G`; the last group of a row may be shorter.
    """

    codes: Tensor
    scale: Tensor
    zero_point: Tensor
    bits: tuple[int, ...]
    group_size: int

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """Return the weights `scale·(codes − zero_point)`, `(E, N, K)`, in `dtype`."""
        return dequantize(self.codes, self.scale, self.zero_point, self.group_size).to(dtype)


def zero_point_step(bits: int) -> float:
    """Return the grid of zero points at a width: `2^(bits − 8)`.

    Our decision: the papers give no format. A byte per zero point is stored anyway, so below 8 bits it
    carries fractions (1/64 at 2 bits, 1/16 at 4) at no cost, which lets two bits put their levels evenly on
    both sides of zero. `code − zero_point` keeps at most 8 significant bits, so it is exact in float16 and in
    bfloat16. At 8 bits it is the usual integer.
    """
    return 2.0 ** (bits - 8)


def choose_qparams(
    weight: Tensor, bits: int, group_size: int, importance: Tensor | None = None, search_steps: int = 5
) -> tuple[Tensor, Tensor]:
    """Choose scale and zero point of every group by a mean-square-error search over clipped ranges.

    Our decision: the papers give no formula. Both ends of the group's range (which always includes 0) are
    first shrunk by common ratios, then each end is moved on its own by 1/2, 1/4 and 1/8 of a quantization
    step; a change is kept where it lowers the group's weighted square error, counted after rounding the scale
    to float16 and the zero point to its grid. The range from minimum to maximum is tried first, so the result
    is never worse than it.

    A group of zeros gets the smallest positive float16 as its scale and dequantizes to exact zeros; a group
    so small that it needs a smaller scale gets that one too.

    Args:
        weight: `(..., N, K)`, finite, any floating dtype. It is worked on in chunks of rows.
        bits: width of a code, 2 to 8.
        group_size: `G`, input channels per scale; the last group holds what is left of `K`.
        importance: `(..., K)`, non-negative weights of the square errors, such as the mean squares of the
            input channels. A group whose importances are all zero counts as uniform.
        search_steps: common ratios to try; 0 keeps the range from minimum to maximum.

    Returns:
        `(scale, zero_point)`, each `(..., N, ceil(K/G))` float32 as in `QuantizedWeight`.

    Raises:
        ValueError: `bits`, `group_size` or the shape of `importance` is wrong, or `weight` is not finite or
            so large that a scale would overflow float16.
    """
    _check(bits, group_size)
    *lead, N, K = weight.shape
    if importance is not None and importance.shape != (*lead, K):
        raise ValueError(
            f"`importance` must have one value per input channel, {(*lead, K)}, got {tuple(importance.shape)}"
        )
    rows = weight.reshape(-1, K)
    shape = (rows.shape[0], -(-K // group_size))
    scale = torch.empty(shape, dtype=torch.float32, device=weight.device)
    zero_point = torch.empty_like(scale)
    real = _by_group(torch.ones(K, device=weight.device), group_size)
    for span in _row_chunks(rows):
        values = _by_group(rows[span].float(), group_size)
        weights = real.expand_as(values)
        if importance is not None:
            owner = torch.arange(span.start, span.stop, device=weight.device) // N
            weights = _by_group(importance.reshape(-1, K).float()[owner], group_size)
            weights = torch.where((weights > 0).any(-1, keepdim=True), weights, real)
        scale[span], zero_point[span] = _search(values, weights, bits, search_steps)
    return scale.view(*lead, N, -1), zero_point.view(*lead, N, -1)


def quantize(weight: Tensor, scale: Tensor, zero_point: Tensor, bits: int, group_size: int) -> Tensor:
    """Return the nearest codes `clamp(round(w/scale + zero_point), 0, 2^bits − 1)`.

    Args:
        weight: `(..., K)`.
        scale: `(..., ceil(K/G))`, as from `choose_qparams`.
        zero_point: `(..., ceil(K/G))`.
        bits: width of a code, 2 to 8.
        group_size: `G`.

    Returns:
        `(..., K)` uint8.

    Raises:
        ValueError: `bits` or `group_size` is wrong.
    """
    _check(bits, group_size)
    values = _by_group(weight.float(), group_size)
    codes = _round(values, scale.unsqueeze(-1), zero_point.unsqueeze(-1), 2**bits - 1)
    return codes.to(torch.uint8).flatten(-2)[..., : weight.shape[-1]]


def dequantize(codes: Tensor, scale: Tensor, zero_point: Tensor, group_size: int) -> Tensor:
    """Return the weights `scale·(codes − zero_point)`.

    Args:
        codes: `(..., K)` uint8.
        scale: `(..., ceil(K/G))`.
        zero_point: `(..., ceil(K/G))`.
        group_size: `G`.

    Returns:
        `(..., K)` float32.
    """
    values = _by_group(codes.float(), group_size)
    values = (values - zero_point.unsqueeze(-1)).mul_(scale.unsqueeze(-1))
    return values.flatten(-2)[..., : codes.shape[-1]]


def _check(bits: int, group_size: int) -> None:
    if not _MIN_BITS <= bits <= _MAX_BITS:
        raise ValueError(f"`bits` must be from {_MIN_BITS} to {_MAX_BITS}, got {bits}")
    if group_size < 1:
        raise ValueError(f"`group_size` must be positive, got {group_size}")


def _by_group(values: Tensor, group_size: int) -> Tensor:
    """`(..., K)` as `(..., ceil(K/G), G)`, the last group filled up with zeros."""
    missing = -values.shape[-1] % group_size
    if missing:
        values = F.pad(values, (0, missing))
    return values.reshape(*values.shape[:-1], values.shape[-1] // group_size, group_size)


def _row_chunks(rows: Tensor) -> Iterator[slice]:
    elements = _CHUNK_ELEMENTS.get(rows.device.type, _CHUNK_ELEMENTS_ELSEWHERE)
    step = max(1, elements // max(1, rows.shape[1]))
    for start in range(0, rows.shape[0], step):
        yield slice(start, min(start + step, rows.shape[0]))


def _round(values: Tensor, scale: Tensor, zero_point: Tensor, top: int) -> Tensor:
    return (values / scale).add_(zero_point).round_().clamp_(0, top)


def storable_range(scale: Tensor, offset: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Return the storable scale and zero point nearest to weights `scale·code + offset`.

    Args:
        scale: any shape, float32, positive.
        offset: the same shape, the value of code 0.
        bits: width of a code, 2 to 8.

    Returns:
        Scale and zero point as in `QuantizedWeight`; a scale is infinite where float16 cannot hold it.
    """
    scale = scale.clamp_min(_MIN_SCALE).half().float()
    step = zero_point_step(bits)
    return scale, (offset / (-step * scale)).round_().mul_(step).clamp_(0, 2**bits - step)


def _from_range(low: Tensor, high: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Storable scale and zero point of the ranges `low .. high`; infinite where float16 cannot hold it."""
    top = 2**bits - 1
    return storable_range(high / top - low / top, low, bits)


def _search(values: Tensor, weights: Tensor, bits: int, steps: int) -> tuple[Tensor, Tensor]:
    """Search for `(rows, groups, G)` values and weights of their square errors."""
    top = 2**bits - 1
    lowest, highest = values.amin(-1).clamp_max_(0), values.amax(-1).clamp_min_(0)
    scale, zero_point = _from_range(lowest, highest, bits)
    if not torch.isfinite(lowest).all() or not torch.isfinite(highest).all():
        raise ValueError("`weight` must be finite, it holds NaN or infinite values")
    if not (scale <= _MAX_SCALE).all():
        raise ValueError(
            f"`weight` must fit a float16 scale: a group from {lowest.min():.3g} to {highest.max():.3g} "
            f"needs one above {_MAX_SCALE:.0f} at {bits} bits; scale the weights down"
        )

    def error(scale: Tensor, zero_point: Tensor) -> Tensor:
        exact = torch.addcmul(zero_point.unsqueeze(-1), values, scale.reciprocal().unsqueeze(-1))
        missed = exact.round().clamp_(0, top).sub_(exact).square_().mul_(weights)
        return missed.sum(-1) * scale * scale

    best = error(scale, zero_point) if steps else scale

    def attempt(low: Tensor, high: Tensor) -> None:
        nonlocal best, scale, zero_point
        new_scale, new_zero = _from_range(low, high, bits)
        new_error = error(new_scale, new_zero)
        better = new_error < best
        best = torch.where(better, new_error, best)
        scale = torch.where(better, new_scale, scale)
        zero_point = torch.where(better, new_zero, zero_point)

    least = 0.25 + 0.1 * (bits - _MIN_BITS)  # the best common ratio falls with the number of levels
    for i in range(steps):
        ratio = 1 - (1 - least) * (i + 1) / steps
        attempt(lowest * ratio, highest * ratio)
    for move in _END_MOVES if steps else ():
        for low_move, high_move in ((-move, 0), (move, 0), (0, -move), (0, move)):
            low, high = -zero_point * scale, (top - zero_point) * scale
            attempt(low + low_move * scale, high + high_move * scale)
    return scale, zero_point
