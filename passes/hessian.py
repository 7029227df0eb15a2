"""The Hessians of the experts' inputs: blending for rarely used experts, output errors, error compensation.

The Hessian of expert `e`'s linear is the sum of `g²·x·xᵀ` over its tokens, so that the squared error of its
outputs is `tr(D·H·Dᵀ)` for an error `D` of its weights. Symbols: `E` experts, `N` output features, `K` inputs.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from moe_compiler.kernels.affine import QuantizedWeight, dequantize

_GROWTH = 10.0  # damping is multiplied by it until a Hessian is positive definite
_LEAST_DAMPING = 1e-6  # where none was asked for


@dataclass(frozen=True, eq=False)
class BlendedHessians:
    """Hessians that every expert can be quantized with.

    Attributes:
        hessian: `(E, K, K)` float32.
        blended: the experts that saw fewer tokens than the minimum, whose Hessian is mostly the layer's.
    """

    hessian: Tensor
    blended: tuple[int, ...]


def blend_hessians(hessian: Tensor, count: Tensor, minimum: float | None = None) -> BlendedHessians:
    """Blend the layer's pooled Hessian into each expert's, the more the fewer tokens the expert saw.

    Our decision: the papers do not say what happens to rarely used experts. With `c` tokens, an expert keeps the
    share `c / (c + minimum)` of its own Hessian and takes the rest from the mean Hessian of all the layer's
    tokens, scaled to the trace of its own, so output errors keep their size. An expert without tokens gets the
    pooled Hessian of one token; if no expert saw any, all get the identity. The share is smooth in `c` and never
    1: on a small OLMoE that gave a lower error on held-out text than to blend below the minimum only.

    Args:
        hessian: `(E, K, K)`, sums over the tokens routed to each expert.
        count: `(E,)` tokens routed to each expert.
        minimum: tokens at which own and pooled Hessian weigh the same; `K`, what full rank needs, by default.

    Returns:
        The blended Hessians and the experts with fewer tokens than `minimum`.

    Raises:
        ValueError: a shape is wrong, or a Hessian is not finite.
    """
    E, K = hessian.shape[0], hessian.shape[-1]
    check_hessian(hessian, E, K)
    if count.shape != (E,):
        raise ValueError(f"`count` must have one number per expert, ({E},), got {tuple(count.shape)}")
    if minimum is None:
        minimum = float(K)
    if minimum <= 0:
        raise ValueError(f"`minimum` must be positive, got {minimum}")
    tokens = count.to(hessian.device, torch.float64)
    few = tuple(torch.nonzero(tokens < minimum).flatten().tolist())
    pooled = hessian.sum(0, dtype=torch.float64) / tokens.sum().clamp_min(1)
    if not pooled.any():
        identity = torch.eye(K, dtype=torch.float32, device=hessian.device)
        return BlendedHessians(identity.expand(E, K, K).clone(), few)
    trace = hessian.diagonal(dim1=-2, dim2=-1).sum(-1, dtype=torch.float64)
    size = torch.where(trace > 0, trace / pooled.trace(), 1.0)
    own = torch.where(trace > 0, tokens / (tokens + minimum), 0.0)
    blend = hessian.float() * own.float()[:, None, None]
    blend += ((1 - own) * size).float()[:, None, None] * pooled.float()
    return BlendedHessians(blend, few)


def output_error(weight: Tensor, quantized: QuantizedWeight | Tensor, hessian: Tensor) -> Tensor:
    """Return the squared error of each expert's outputs, `tr((W − Ŵ)·H·(W − Ŵ)ᵀ)`.

    Args:
        weight: `(E, N, K)`.
        quantized: the quantized weights, or their dequantized values `(E, N, K)`.
        hessian: `(E, K, K)`.

    Returns:
        `(E,)` float64, in the Hessian's unit times the weights' squared.

    Raises:
        ValueError: the shapes of the arguments do not fit together.
    """
    E, N, K = weight.shape
    check_hessian(hessian, E, K)
    values = quantized.codes if isinstance(quantized, QuantizedWeight) else quantized
    if values.shape != weight.shape:
        raise ValueError(f"`quantized` must have the shape {(E, N, K)} of `weight`, got {tuple(values.shape)}")
    errors = torch.empty(E, dtype=torch.float64, device=weight.device)
    for e in range(E):
        value = values[e].float()
        if isinstance(quantized, QuantizedWeight):
            value = dequantize(values[e], quantized.scale[e], quantized.zero_point[e], quantized.group_size)
        difference = weight[e].detach().float() - value
        errors[e] = (difference @ hessian[e].float()).mul_(difference).sum(dtype=torch.float64)
    return errors


def compensation(hessian: Tensor, damping: float) -> tuple[Tensor, Tensor]:
    """Factor Hessians into what GPTQ needs: how later columns make up for earlier ones' errors.

    With `H + damping·mean(diag H)·I = (I + U)·diag(p)·(I + U)ᵀ`, `U` strictly upper triangular, the output error
    of an error `D` is `Σ_j p_j·‖D_j + Σ_{i<j} U_ij·D_i‖²`: rounding `w_j + Σ_{i<j} U_ij·D_i` (with `D_i = w_i −
    ŵ_i`) to nearest is GPTQ's step without its explicit inverse, and `p_j` (`1/[H⁻¹ of the columns from j]_jj`)
    is what an error in column `j` costs (method: QuIP, arXiv 2307.13304, theorem 6; GPTQ, arXiv 2210.17323).

    A Hessian that is all zero counts as the identity. Where one is not positive definite even in float64, its
    damping alone is raised tenfold until it is (our decision).

    Args:
        hessian: `(E, K, K)`, finite, non-negative on the diagonal.
        damping: fraction of the mean of the diagonal that is added to it.

    Returns:
        `I + U`, `(E, K, K)` float32, and `p`, `(E, K)` float32 in units of the mean of the diagonal.
    """
    work = hessian.to(torch.float64, copy=True)
    diagonal = work.diagonal(dim1=-2, dim2=-1)
    mean = diagonal.mean(-1, keepdim=True)
    unused = mean == 0
    work /= torch.where(unused, 1.0, mean).unsqueeze(-1)
    added = torch.where(unused, 1.0, damping)
    diagonal += added
    while True:
        # The Cholesky factor of the reversed matrix, reversed, is the upper triangular factor.
        reversed_factor, info = torch.linalg.cholesky_ex(work.flip(-2, -1))
        if not info.any():
            break
        more = ((_GROWTH - 1) * added).clamp_min(_LEAST_DAMPING) * (info != 0).unsqueeze(-1)
        diagonal += more
        added += more
    factor = reversed_factor.flip(-2, -1)
    pivot = factor.diagonal(dim1=-2, dim2=-1).clone()
    factor /= pivot.unsqueeze(-2)
    return factor.float(), pivot.square().float()


def check_hessian(hessian: Tensor, experts: int, inputs: int) -> None:
    """Raise `ValueError` unless `hessian` is `(experts, inputs, inputs)`, finite, non-negative on the diagonal."""
    if hessian.shape != (experts, inputs, inputs):
        raise ValueError(
            f"`hessian` must have the shape {(experts, inputs, inputs)}, one matrix of the inputs per expert, "
            f"got {tuple(hessian.shape)}"
        )
    for e, matrix in enumerate(hessian):
        if not torch.isfinite(matrix.sum()) and not torch.isfinite(matrix).all():
            raise ValueError(f"`hessian` must be finite, that of expert {e} holds NaN or infinite values")
        if (matrix.diagonal() < 0).any():
            raise ValueError(f"`hessian` must be a sum of x·xᵀ, that of expert {e} is negative on its diagonal")
