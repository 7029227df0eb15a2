"""What the observers collect: additive sums per dataset, MoE block, expert and input channel.

Symbols: `E` experts, `K` input channels of one expert linear, `N` its output features, `n` datasets,
`g` the routing weight of a (token, expert) pair and `w` the token's own weight.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor


@dataclass(frozen=True)
class LinearStatistics:
    """Sums over the rows that reached the `E` experts of one linear (method: DynaMo III-A).

    Attributes:
        abs_sum: `(E, K)` float64, the sum of `w·g·|x_c|`.
        sq_sum: `(E, K)` float64, the sum of `w·g²·x_c²`.
        hessian: `(E, K, K)` float32, the sum of `g²·x·xᵀ`, or `None` where it was not collected.
    """

    abs_sum: Tensor
    sq_sum: Tensor
    hessian: Tensor | None = None

    def __add__(self, other: LinearStatistics) -> LinearStatistics:
        hessian = None
        if self.hessian is not None and other.hessian is not None:
            hessian = self.hessian + other.hessian
        return LinearStatistics(self.abs_sum + other.abs_sum, self.sq_sum + other.sq_sum, hessian)


@dataclass(frozen=True)
class BlockStatistics:
    """What one dataset did in one MoE block. Adds up over batches, ranks and datasets.

    Attributes:
        top_k: experts per token.
        tokens: tokens that entered the block.
        token_weight_sum: the sum of `w` over those tokens (equal to `tokens` where every weight is 1).
        count: `(E,)` int64, tokens routed to each expert.
        token_mass: `(E,)` float64, the sum of `w` over the tokens routed to each expert.
        gate_mass: `(E,)` float64, the sum of `w·g` over the tokens routed to each expert.
        linears: the sums of each expert linear, by its name (`gate_up_proj` or `up_proj`, and `down_proj`).
        coactivation: `(E, E)` int64, tokens routed to both experts (on the diagonal, to the one), or `None` where it
            was not collected.
    """

    top_k: int
    tokens: int
    token_weight_sum: float
    count: Tensor
    token_mass: Tensor
    gate_mass: Tensor
    linears: Mapping[str, LinearStatistics]
    coactivation: Tensor | None = None

    @property
    def num_experts(self) -> int:
        """The number of experts `E` of the block."""
        return self.count.shape[0]

    def __add__(self, other: BlockStatistics) -> BlockStatistics:
        if self.top_k != other.top_k or self.linears.keys() != other.linears.keys():
            raise ValueError(
                "statistics of different MoE blocks cannot be added: "
                f"top_k {self.top_k} and {other.top_k}, linears {list(self.linears)} and {list(other.linears)}"
            )
        coactivation = None
        if self.coactivation is not None and other.coactivation is not None:
            coactivation = self.coactivation + other.coactivation
        return replace(
            self,
            tokens=self.tokens + other.tokens,
            token_weight_sum=self.token_weight_sum + other.token_weight_sum,
            count=self.count + other.count,
            token_mass=self.token_mass + other.token_mass,
            gate_mass=self.gate_mass + other.gate_mass,
            linears={name: linear + other.linears[name] for name, linear in self.linears.items()},
            coactivation=coactivation,
        )


@dataclass(frozen=True)
class LayerEvidence:
    """All that an allocation strategy sees of one MoE block.

    Attributes:
        path: the block's module path in the model.
        statistics: the block's statistics by dataset, in the order the datasets were given.
        column_norm: by linear, `(E, K)` float64: the L2 norm of each input channel `W[e, :, c]`.
        shapes: by linear, `(N, K)`.
        overhead_bits: by linear, the bits per weight that every width pays besides its codes (scales, zero
            points, tables, channel pool), so that effective bits are `code bits + overhead_bits`.
        errors: by linear and width, `(n, E)` float64: the expected squared output error of each expert on each
            dataset if it is quantized at that width. Only the strategy `budget` needs it.
        signal: by linear, `(n, E)` float64: the squared size of the output itself, which `errors` is judged by.
        sensitivity: what a relative error of this layer costs, compared with other layers.
    """

    path: str
    statistics: Mapping[str, BlockStatistics]
    column_norm: Mapping[str, Tensor]
    shapes: Mapping[str, tuple[int, int]]
    overhead_bits: Mapping[str, float]
    errors: Mapping[str, Mapping[int, Tensor]] | None = None
    signal: Mapping[str, Tensor] | None = None
    sensitivity: float = 1.0

    @property
    def datasets(self) -> tuple[str, ...]:
        """The datasets' names, in order."""
        return tuple(self.statistics)

    @property
    def num_experts(self) -> int:
        """The number of experts `E` of the block."""
        return next(iter(self.statistics.values())).num_experts

    @property
    def top_k(self) -> int:
        """Experts per token."""
        return next(iter(self.statistics.values())).top_k

    def counts(self) -> Tensor:
        """Tokens routed to each expert, `(n, E)` float64."""
        return torch.stack([s.count.double() for s in self.statistics.values()])
