"""Coordinate descent on quantized weights: ranges and codes are improved in turn until little is left to gain.

GPTQ rounds every column once and never returns to it. Here each group's scale and zero point are fitted to its codes
by least squares, then each of its codes is chosen anew, with everything else as it stands; no step raises the output
error.
Symbols: `E` experts, `N` output features, `K` input channels, `G` group size. Weights are kept as `(E, K, N)`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from moe_compiler.kernels.affine import storable_range

_LEAST_DETERMINANT = 1e-6  # of a least squares problem whose diagonal is 1: below, all codes of a group are alike


@dataclass(frozen=True, eq=False)
class Rounded:
    """Quantized weights of experts of one width, in the layout of this file.

    Attributes:
        codes: `(E, K, N)` float32, whole numbers.
        scale: `(E, groups, N)` float32.
        zero_point: `(E, groups, N)` float32.
        bits: the width.
        group_size: `G`; the last group holds what is left of `K`.
    """

    codes: Tensor
    scale: Tensor
    zero_point: Tensor
    bits: int
    group_size: int


def descend(weight: Tensor, hessian: Tensor, rounded: Rounded, sweeps: int) -> Rounded:
    """Lower the output error of quantized weights by sweeps of coordinate descent over their groups.

    For an error `D = W − Ŵ` the squared error of the outputs is `tr(D·H·Dᵀ)`. In each group first the pair (scale, zero
    point) of a row is replaced by its least squares fit, rounded to what can be stored and kept where the error falls,
    then each code by the best one, all else fixed (codes: QuantEase, arXiv 2309.01885; together with ranges: our
    decision). A sweep costs two products of `N·K²` multiplications per expert, as many as GPTQ.

    Args:
        weight: `(E, K, N)` float32.
        hessian: `(E, K, K)` float32, damped, with a positive diagonal.
        rounded: what to begin with; not modified.
        sweeps: how often all groups are visited; 0 returns `rounded`.

    Returns:
        Codes, scales and zero points with an error that is no larger, up to rounding.
    """
    if not sweeps:
        return rounded
    codes, scale, zero_point = rounded.codes.clone(), rounded.scale.clone(), rounded.zero_point.clone()
    size, inputs = rounded.group_size, weight.shape[1]
    error = torch.empty_like(weight)
    parts = [slice(start, min(start + size, inputs)) for start in range(0, inputs, size)]
    for g, part in enumerate(parts):
        error[:, part] = _error(weight[:, part], codes[:, part], scale[:, g], zero_point[:, g])
    slope = hessian @ error  # half the derivative of the squared error
    for _ in range(sweeps):
        for g, part in enumerate(parts):
            group = _Group(weight[:, part], hessian[:, part, part], rounded.bits)
            before = error[:, part].clone()
            local = slope[:, part].clone()
            fitted = group.fit_range(codes[:, part], scale[:, g], zero_point[:, g], error[:, part], local)
            scale[:, g], zero_point[:, g], error[:, part] = fitted
            local += group.hessian @ (error[:, part] - before)
            codes[:, part], error[:, part] = group.choose_codes(scale[:, g], zero_point[:, g], error[:, part], local)
            slope += hessian[:, :, part] @ (error[:, part] - before)
    return Rounded(codes, scale, zero_point, rounded.bits, size)


@dataclass(frozen=True, eq=False)
class _Group:
    """The weights `(E, G, N)`, the Hessian `(E, G, G)` and the width of one group."""

    weight: Tensor
    hessian: Tensor
    bits: int

    def fit_range(
        self, codes: Tensor, scale: Tensor, zero_point: Tensor, error: Tensor, slope: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Scale and zero point by least squares, each row's kept where the error falls, and the weights' error."""
        curvature = self.hessian @ codes
        flat = self.hessian.sum(-1, keepdim=True)  # H·1
        cc, c1, one = (codes * curvature).sum(1), (codes * flat).sum(1), flat.sum(1).expand_as(scale)
        c_slope, slope_sum = (codes * slope).sum(1), slope.sum(1)
        # Ŵ = scale·codes + offset: the step that makes the slope along both vanish.
        determinant = cc * one - c1 * c1
        usable = determinant > _LEAST_DETERMINANT * cc * one
        safe = torch.where(usable, determinant, 1.0)
        new_scale = scale + torch.where(usable, (one * c_slope - c1 * slope_sum) / safe, 0.0)
        offset = -scale * zero_point + torch.where(usable, (cc * slope_sum - c1 * c_slope) / safe, 0.0)
        usable &= new_scale > 0
        new_scale, new_zero = storable_range(
            torch.where(usable, new_scale, scale), torch.where(usable, offset, -scale * zero_point), self.bits
        )
        new_error = _error(self.weight, codes, new_scale, new_zero)
        change = new_error - error
        gain = (change * (2 * slope + self.hessian @ change)).sum(1)
        better = gain < 0
        return (
            torch.where(better, new_scale, scale),
            torch.where(better, new_zero, zero_point),
            torch.where(better.unsqueeze(1), new_error, error),
        )

    def choose_codes(self, scale: Tensor, zero_point: Tensor, error: Tensor, slope: Tensor) -> tuple[Tensor, Tensor]:
        """Each column's codes anew, one column after the other, and the weights' error; `slope` is used up."""
        top = 2**self.bits - 1
        pivot = self.hessian.diagonal(dim1=-2, dim2=-1)
        codes, change = torch.empty_like(error), torch.empty_like(error)

        def choose(low: int, high: int) -> None:
            # Halving, as in GPTQ: what the first half changed reaches the second in one product.
            if high - low == 1:
                best = self.weight[:, low] - error[:, low] + slope[:, low] / pivot[:, low, None]
                code = torch.addcdiv(zero_point, best, scale).round_().clamp_(0, top)
                codes[:, low] = code
                change[:, low] = self.weight[:, low] - (code - zero_point) * scale - error[:, low]
                return
            middle = (low + high) // 2
            choose(low, middle)
            slope[:, middle:high].baddbmm_(self.hessian[:, middle:high, low:middle], change[:, low:middle])
            choose(middle, high)

        choose(0, error.shape[1])
        return codes, error + change


def _error(weight: Tensor, codes: Tensor, scale: Tensor, zero_point: Tensor) -> Tensor:
    """`W − Ŵ` of one group, `(E, G, N)`."""
    return weight - (codes - zero_point.unsqueeze(1)) * scale.unsqueeze(1)
