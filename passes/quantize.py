"""The quantizers of expert weights under one call: a method's name, weights, Hessians and widths to codes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Protocol

import torch
from torch import Tensor

from moe_compiler.kernels.affine import QuantizedWeight
from moe_compiler.passes.gptq import quantize_gptq
from moe_compiler.passes.hessian import BlendedHessians, blend_hessians, check_hessian, output_error
from moe_compiler.passes.hqq import quantize_hqq
from moe_compiler.passes.rtn import check_weight, quantize_rtn

__all__ = [
    "QUANTIZERS",
    "BlendedHessians",
    "Quantizer",
    "blend_hessians",
    "output_error",
    "quantize_experts",
    "quantize_gptq",
    "quantize_hqq",
    "quantize_rtn",
]

_IMPORTANCE_FLOOR = 0.05  # of the mean: what a channel that the calibration never excited counts


class Quantizer(Protocol):
    """What `QUANTIZERS` holds: weights, Hessians where there are any, widths and group size to codes."""

    def __call__(self, weight: Tensor, hessian: Tensor | None, bits: Sequence[int], group_size: int) -> QuantizedWeight:
        """Quantize `(E, N, K)` weights."""
        ...


def quantize_experts(
    method: str,
    weight: Tensor,
    hessian: Tensor | None,
    bits: Sequence[int],
    group_size: int = 128,
    draft: bool = False,
) -> QuantizedWeight:
    """Quantize the weights of all experts of one linear with the method of a name.

    Args:
        method: `"gptq"` (needs Hessians), `"rtn"` (weights its range search by their diagonal where they are
            given) or `"hqq"` (ignores them).
        weight: `(E, N, K)`, any floating dtype; not modified.
        hessian: `(E, K, K)`, as from `blend_hessians`, or `None`.
        bits: one width per expert, 2 to 8.
        group_size: `G`, one of `moe_compiler.passes.rtn.GROUP_SIZES`.
        draft: leave out what GPTQ gains by visiting a group again: a third of the time, about a tenth more error. For
            comparing widths.

    Returns:
        The quantized weights.

    Raises:
        ValueError: `method` is unknown or lacks its Hessians, an argument has the wrong shape or value, or
            `weight` or `hessian` is not finite.
    """
    if method not in QUANTIZERS:
        raise ValueError(f"`method` must be one of {sorted(QUANTIZERS)}, got {method!r}")
    if draft and method == "gptq" and hessian is not None:
        return quantize_gptq(weight, hessian, bits, group_size, refine=0, sweeps=0)
    return QUANTIZERS[method](weight, hessian, bits, group_size)


def _gptq(weight: Tensor, hessian: Tensor | None, bits: Sequence[int], group_size: int) -> QuantizedWeight:
    if hessian is None:
        raise ValueError("`hessian` must be given for the method 'gptq', got None: calibrate with Hessians")
    return quantize_gptq(weight, hessian, bits, group_size)


def _rtn(weight: Tensor, hessian: Tensor | None, bits: Sequence[int], group_size: int) -> QuantizedWeight:
    importance = None
    if hessian is not None:
        check_weight(weight, bits, group_size)
        check_hessian(hessian, weight.shape[0], weight.shape[-1])
        diagonal = torch.diagonal(hessian, dim1=-2, dim2=-1).float()
        importance = diagonal + _IMPORTANCE_FLOOR * diagonal.mean(-1, keepdim=True)
    return quantize_rtn(weight, bits, group_size, importance)


def _hqq(weight: Tensor, hessian: Tensor | None, bits: Sequence[int], group_size: int) -> QuantizedWeight:
    return quantize_hqq(weight, bits, group_size)


QUANTIZERS: Mapping[str, Quantizer] = MappingProxyType({"gptq": _gptq, "rtn": _rtn, "hqq": _hqq})
"""The methods that `quantize_experts` knows, by name."""
