"""Second moments of what each expert of a linear is given: from Hessians, or from the input rows themselves.

A rule of adaptation only multiplies with them, so a few thousand rows serve as well as `E` matrices of `K·K`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

_PADDING, _LEAST_PADDED = 16, 64


@dataclass(frozen=True, eq=False)
class Gram:
    """The second moments `Q = factorᵀ·factor + diag(ridge)` of one expert's inputs, or `Q = factor + diag(ridge)`.

    Attributes:
        factor: the input rows times their routing weights, `(n, K)` float32, some of zeros at the end, or their Hessian
            `(K, K)`.
        ridge: `(K,)` float32, what is added to the diagonal.
        is_hessian: whether `factor` is the Hessian.
    """

    factor: Tensor
    ridge: Tensor
    is_hessian: bool

    def times(self, block: Tensor) -> Tensor:
        """`Q · block` for a block of columns, `(K, q)`."""
        product = self.factor @ block
        if not self.is_hessian:
            product = self.factor.t() @ product
        return product.add_(self.ridge[:, None] * block)

    def energy(self, error: Tensor) -> float:
        """`tr(error · Q · errorᵀ)` for `(N, K)`: the squared size of what an error of the weight does to the output."""
        if self.is_hessian:
            own = ((error @ self.factor).double() * error.double()).sum()
        else:
            own = (error @ self.factor.t()).double().square().sum()
        return float(own + (error.square().sum(dim=0).double() * self.ridge.double()).sum())

    def damped(self, damping: float, pseudo_rows: float, count: int) -> Gram:
        """Second moments that a few rows support: shrunk towards channels that do not correlate.

        With `n` rows the correlations between channels keep the share `n / (n + pseudo_rows)`, the diagonal stays as it
        is, and `damping` of its mean is added to it.

        Args:
            damping: fraction of the mean of the diagonal that is added to it.
            pseudo_rows: how many rows without correlation are added.
            count: `n`.
        """
        if not count:
            return self
        share = count / (count + pseudo_rows)
        diagonal = self.diagonal()
        ridge = self.ridge + (1 - share) * diagonal + damping * diagonal.mean()
        return Gram(self.factor * (share if self.is_hessian else share**0.5), ridge, self.is_hessian)

    def diagonal(self) -> Tensor:
        """The diagonal of `Q`, `(K,)`."""
        own = self.factor.diagonal() if self.is_hessian else self.factor.square().sum(dim=0)
        return own + self.ridge


class SecondMoments(Protocol):
    """The second moments of one linear's inputs, expert by expert."""

    @property
    def count(self) -> Tensor:
        """Rows that each expert saw, `(E,)` int64 on the host."""

    def expert(self, expert: int, device: torch.device) -> Gram:
        """Those of one expert, in float32 on `device`."""


@dataclass(frozen=True, eq=False)
class HessianMoments:
    """Second moments that were summed up as Hessians.

    Attributes:
        hessian: `(E, K, K)`, the sum of `g²·x·xᵀ`.
        count: `(E,)` int64, the rows in it, on the host.
    """

    hessian: Tensor
    count: Tensor

    def expert(self, expert: int, device: torch.device) -> Gram:
        """The Hessian of one expert, in float32 on `device`."""
        hessian = self.hessian[expert].to(device, torch.float32)
        return Gram(hessian, hessian.new_zeros(hessian.shape[1]), is_hessian=True)


@dataclass(frozen=True, eq=False)
class RowMoments:
    """Second moments of rows that were kept, `2·K` bytes a row where the model is in 16 bits.

    Attributes:
        rows: `(T, K)` or `(R, K)`, inputs in the model's dtype, on the host: pair `r` reads row `r // (R / rows)`.
        expert_ids: `(R,)` int64, the expert of each pair, on the host; `E` or more for none.
        gate: `(R,)` float32, its routing weight `g`, on the host.
        num_experts: `E`.
    """

    rows: Tensor
    expert_ids: Tensor
    gate: Tensor
    num_experts: int

    @property
    def count(self) -> Tensor:
        """Rows that each expert saw, `(E,)` int64."""
        return torch.bincount(self.expert_ids, minlength=self.num_experts)[: self.num_experts]

    def expert(self, expert: int, device: torch.device) -> Gram:
        """The rows of one expert times their routing weights, or their Hessian where it is smaller.

        Rows of zeros follow more than 64, up to a multiple of 16, so that the products of all experts have few shapes:
        libraries compile a kernel for each.
        """
        pairs = (self.expert_ids == expert).nonzero().squeeze(1)
        count, gate = pairs.shape[0], self.gate[pairs]
        if count > _LEAST_PADDED:
            missing = -count % _PADDING
            pairs, gate = torch.cat([pairs, pairs[-1:].expand(missing)]), F.pad(gate, (0, missing))
        places = pairs // (self.expert_ids.shape[0] // self.rows.shape[0])
        rows = self.rows.index_select(0, places).to(device, torch.float32)
        rows.mul_(gate.to(device)[:, None])
        ridge = rows.new_zeros(rows.shape[1])
        if count > rows.shape[1]:
            return Gram(rows.t() @ rows, ridge, is_hessian=True)
        return Gram(rows, ridge, is_hessian=False)
