"""What a weight's error does to the output on some rows, from products with a few columns instead of all rows.

`M = D·Xᵀ` `(N, n)`, for an error `D` `(N, K)` and rows `X` `(n, K)`, is never formed. Its leading left singular vectors
are found by a randomized range finder with one power step (Halko, Martinsson and Tropp, arXiv 0909.4061); its size is
that of the part that they hold, which is exact, and of the rest, which probes measure (Hutch++, arXiv 2010.09649).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from moe_compiler.passes.moments import Gram

PROBES = 8
"""Random columns that the rest is measured with."""

_TINY = 1e-6  # of the largest eigenvalue: below, a direction of a float32 block is rounding


@dataclass(frozen=True, eq=False)
class OutputSketch:
    """An output error `M` `(N, n)`: exact for some outputs, known by probes elsewhere.

    Attributes:
        basis: `(N, q)`, the outputs, orthonormal or zero; `None` for all of them, in their own order.
        inside: `basisᵀ·M`, `(q, n)`.
        probes: `(n, m)`, random signs.
        outside: `(M − basis·inside)·probes`, `(N, m)`.
    """

    basis: Tensor | None
    inside: Tensor
    probes: Tensor
    outside: Tensor

    @classmethod
    def whole(cls, image: Tensor) -> OutputSketch:
        """All of `M`, `(N, n)`."""
        return cls(None, image, image.new_zeros(image.shape[1], 0), image.new_zeros(image.shape[0], 0))

    def squared_error(self, value: Tensor | None = None, seen: Tensor | None = None) -> float:
        """The estimate of `‖M − value·seenᵀ‖²`, without bias and never negative; exact where `M` is known whole.

        The same probes serve every correction, so that their chance cancels where two are compared.

        Args:
            value: `(N, s)` float32, what the slots of a correction write; `None` for no correction.
            seen: `(n, s)` float32, what they read.
        """
        inside, outside = self.inside.float(), self.outside
        if value is not None and seen is not None:
            own = value if self.basis is None else self.basis.t() @ value
            inside = torch.addmm(inside, own, seen.t(), alpha=-1)
            if self.basis is not None:
                outside = outside - (value - self.basis @ own) @ (seen.t() @ self.probes)
        error = inside.square().sum(dtype=torch.float64)
        if outside.numel():
            error += outside.square().sum(dtype=torch.float64) / outside.shape[1]
        return float(error)


def expected_outputs(gram: Gram, channel_error: Tensor, block: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """What `M`'s leading singular vectors would be if the errors of single weights were independent.

    `MᵀM = X·DᵀD·Xᵀ`, and `DᵀD` would be the diagonal of the channels' squared errors `d`; so that `Q = XᵀX` and `d`
    tell much before `D` is known.

    Args:
        gram: `Q`.
        channel_error: `d`, `(K,)` float32.
        block: `(K, q)`, any columns to begin with; `q` at most `K`.
        dtype: of the products with rows.

    Returns:
        The squares of the singular values `(q,)`, and `Xᵀ` times the right singular vectors, in some scale, `(K, q)`;
        the largest first.
    """
    scale = channel_error.sqrt()[:, None]
    factor = gram.factor if gram.is_hessian else gram.factor.to(dtype)

    def times(columns: Tensor) -> Tensor:
        if gram.is_hessian:
            return gram.times(columns)
        return (factor.t() @ (factor @ columns.to(dtype))).float()

    block = orthonormal(scale * times(scale * block))
    start = times(scale * block)
    inside = block.t() @ (scale * start)
    values, vectors = torch.linalg.eigh((inside + inside.t()) / 2)
    return values.flip(0).clamp(min=0), start @ vectors.flip(1)


def sketch(error: Tensor, rows: Tensor, start: Tensor, seed: int) -> tuple[Tensor, Tensor, Tensor, OutputSketch]:
    """The leading left singular vectors of `M = error · rowsᵀ`, nearly: one power step from `start`.

    Costs four products of `N·K·q` multiplications and four of `n·K·q`.

    Args:
        error: `(N, K)` float32 or bfloat16.
        rows: `(n, K)` of that dtype.
        start: `(K, q)`, columns near the span of `rowsᵀ` times the right singular vectors.
        seed: of the probes, which must not depend on `start`.

    Returns:
        The squares of the singular values `(q,)` float32, the largest first; the vectors `(N, q)` float32; the
        directions, vectorsᵀ · error, `(q, K)` float32; and `M` as far as it is known.
    """
    dtype, width = error.dtype, start.shape[1]
    signs = torch.randint(0, 2, (rows.shape[0], PROBES), generator=torch.Generator().manual_seed(seed))
    probes = (2 * signs - 1).to(error.device, torch.float32)
    block = (error @ torch.cat([_unit(start).to(dtype), rows.t() @ probes.to(dtype)], dim=1)).float()
    right = _unit((rows @ _times(_unit(block[:, :width]), error).t()).float())
    basis = orthonormal(orthonormal((error @ (rows.t() @ right.to(dtype))).float()))
    inputs = _times(basis, error)
    inside = (inputs @ rows.t()).float()
    values, vectors = torch.linalg.eigh(inside @ inside.t())
    values, vectors = values.flip(0).clamp(min=0), vectors.flip(1)
    basis, inside = basis @ vectors, vectors.t() @ inside
    outside = block[:, width:] - basis @ (inside @ probes)
    return values, basis, vectors.t() @ inputs.float(), OutputSketch(basis, inside, probes, outside)


def _times(basis: Tensor, error: Tensor) -> Tensor:
    """`basisᵀ · error`, of contiguous blocks: the layout that is multiplied fastest."""
    return basis.t().to(error.dtype).contiguous() @ error


def orthonormal(block: Tensor) -> Tensor:
    """An orthonormal basis of the columns of a block `(N, q)` float32, the direction of most first.

    By the eigenvectors of its Gram matrix, which is several times faster than QR for few columns; called twice it is
    orthonormal to rounding. Where the columns depend on each other the last ones are zero.
    """
    block = block / torch.linalg.vector_norm(block).clamp(min=torch.finfo(block.dtype).tiny)
    values, vectors = torch.linalg.eigh(block.t() @ block)
    values, vectors = values.flip(0), vectors.flip(1)
    known = values > _TINY * values[:1].clamp(min=torch.finfo(values.dtype).tiny)
    vectors = vectors * (torch.where(known, values, 1).rsqrt() * known)
    basis: Tensor = block @ vectors
    return basis


def _unit(block: Tensor) -> Tensor:
    size = block.square().sum(dim=0).sqrt()
    return block / size.clamp(min=torch.finfo(block.dtype).tiny)
