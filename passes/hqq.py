"""Half-quadratic quantization (HQQ): zero points from a robust norm of the weight error, without any data."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from moe_compiler.kernels.affine import QuantizedWeight, choose_qparams, quantize, zero_point_step
from moe_compiler.passes.rtn import check_weight, empty_quantized


@torch.no_grad()
def quantize_hqq(
    weight: Tensor,
    bits: Sequence[int],
    group_size: int = 128,
    norm: float = 0.7,
    beta: float = 10.0,
    kappa: float = 1.01,
    iterations: int = 20,
) -> QuantizedWeight:
    """Quantize every expert's weights with zero points that minimise `Σ |w − ŵ|^norm`.

    Method: HQQ (Badri and Shaji 2023, repository mobiusml/hqq), whose steps alternate between shrinking the
    error, `e ← shrink(w − ŵ)`, and the zero point `z ← mean(code − (w − e)/scale)`. Our decisions: it starts from
    the range of the mean-square-error search instead of minimum to maximum (on a small OLMoE that halves the
    output error at 2 bits), the error is measured in quantization steps, so that the result does not depend on
    the size of the weights, zero points are snapped to their grid in every step, and each group keeps the best
    zero point it has seen.

    Args:
        weight: `(E, N, K)`, any floating dtype; not modified.
        bits: one width per expert, 2 to 8.
        group_size: `G`, one of `moe_compiler.passes.rtn.GROUP_SIZES`; the last group holds what is left of `K`.
        norm: exponent of the error, in `(0, 1]`; small ones forgive outliers.
        beta: weight of the quadratic penalty, positive.
        kappa: growth of `beta` per iteration, at least 1.
        iterations: the most steps to take.

    Returns:
        The quantized weights of all experts.

    Raises:
        ValueError: an argument has the wrong shape or value, or `weight` is not finite.
    """
    check_weight(weight, bits, group_size)
    if not 0 < norm <= 1:
        raise ValueError(f"`norm` must be above 0 and at most 1, got {norm}")
    if not beta > 0 or not kappa >= 1:
        raise ValueError(f"`beta` must be positive and `kappa` at least 1, got {beta} and {kappa}")
    result = empty_quantized(weight, bits, group_size)
    for e, width in enumerate(result.bits):
        matrix = weight[e].float()
        scale, zero_point = choose_qparams(matrix, width, group_size)
        for group, columns in enumerate(matrix.split(group_size, dim=-1)):
            zero_point[:, group] = _fit_zero_point(
                columns / scale[:, group, None], zero_point[:, group], width, (norm, beta, kappa, iterations)
            )
        result.codes[e] = quantize(matrix, scale, zero_point, width, group_size)
        result.scale[e], result.zero_point[e] = scale, zero_point
    return result


def _fit_zero_point(steps: Tensor, zero_point: Tensor, bits: int, options: tuple[float, float, float, int]) -> Tensor:
    """Best zero points `(N,)` for the weights `(N, G)` in quantization steps, never worse than those given."""
    norm, beta, kappa, iterations = options
    grid = zero_point_step(bits)
    top = 2**bits - 1

    def miss(zero_point: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        codes = (steps + zero_point.unsqueeze(-1)).round_().clamp_(0, top)
        error = steps - (codes - zero_point.unsqueeze(-1))
        return codes, error, error.abs().pow_(norm).sum(-1)

    codes, error, least = miss(zero_point)
    for _ in range(iterations):
        size = error.abs()
        shrunk = error.sign() * (size - size.pow(norm - 1) / beta).clamp_min_(0)
        candidate = (codes - steps + shrunk).mean(-1)
        candidate = (candidate / grid).round_().mul_(grid).clamp_(0, 2**bits - grid)
        codes, error, cost = miss(candidate)
        better = cost < least
        zero_point = torch.where(better, candidate, zero_point)
        least = torch.where(better, cost, least)
        if not better.any():
            break
        beta *= kappa
    return zero_point
