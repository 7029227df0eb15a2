"""Rounding to nearest, the baseline, and what every quantizer of expert weights checks and returns."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from moe_compiler.kernels.affine import QuantizedWeight, choose_qparams, quantize

GROUP_SIZES = (32, 64, 128, 256, 512, 1024)
"""The group sizes to choose from; a linear with fewer inputs than one has one group per row."""


def check_weight(weight: Tensor, bits: Sequence[int], group_size: int) -> None:
    """Raise `ValueError` unless `weight` `(E, N, K)` can be quantized at one width per expert."""
    if weight.dim() != 3:
        raise ValueError(f"`weight` must be (experts, outputs, inputs), got the shape {tuple(weight.shape)}")
    if len(bits) != weight.shape[0]:
        raise ValueError(f"`bits` must have one width per expert, {weight.shape[0]} of them, got {len(bits)}")
    for e, width in enumerate(bits):
        if not 2 <= width <= 8:
            raise ValueError(f"`bits` must be from 2 to 8, got {width} for expert {e}")
    if group_size not in GROUP_SIZES:
        raise ValueError(f"`group_size` must be one of {GROUP_SIZES}, got {group_size}")
    for e, matrix in enumerate(weight):
        if not torch.isfinite(matrix).all():
            raise ValueError(f"`weight` must be finite, that of expert {e} holds NaN or infinite values")


def empty_quantized(weight: Tensor, bits: Sequence[int], group_size: int) -> QuantizedWeight:
    """Allocate the codes, scales and zero points of `weight` `(E, N, K)`, for a quantizer to fill."""
    E, N, K = weight.shape
    shape = (E, N, -(-K // group_size))
    return QuantizedWeight(
        codes=torch.empty(E, N, K, dtype=torch.uint8, device=weight.device),
        scale=torch.empty(shape, dtype=torch.float32, device=weight.device),
        zero_point=torch.empty(shape, dtype=torch.float32, device=weight.device),
        bits=tuple(int(width) for width in bits),
        group_size=group_size,
    )


@torch.no_grad()
def quantize_rtn(
    weight: Tensor, bits: Sequence[int], group_size: int = 128, importance: Tensor | None = None
) -> QuantizedWeight:
    """Round every expert's weights to the nearest code, with ranges from a mean-square-error search.

    A baseline: at 2 bits it destroys real models.

    Args:
        weight: `(E, N, K)`, any floating dtype; not modified.
        bits: one width per expert, 2 to 8.
        group_size: `G`, one of `GROUP_SIZES`.
        importance: `(E, K)`, weights of the input channels' square errors in the range search.

    Returns:
        The quantized weights of all experts.

    Raises:
        ValueError: an argument has the wrong shape or value, or `weight` is not finite.
    """
    check_weight(weight, bits, group_size)
    E, _, K = weight.shape
    if importance is not None and importance.shape != (E, K):
        raise ValueError(f"`importance` must have the shape {(E, K)}, got {tuple(importance.shape)}")
    result = empty_quantized(weight, bits, group_size)
    for e, width in enumerate(result.bits):
        matrix = weight[e].float()
        scale, zero_point = choose_qparams(matrix, width, group_size, None if importance is None else importance[e])
        result.codes[e] = quantize(matrix, scale, zero_point, width, group_size)
        result.scale[e], result.zero_point[e] = scale, zero_point
    return result
