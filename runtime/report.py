"""What an adaptation did, to print or to log."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor


def jensen_shannon(first: Tensor, second: Tensor) -> Tensor:
    """Jensen-Shannon divergence in bits (Lin 1991, IEEE Trans. Inf. Theory 37, eq. 4.1, equal weights).

    Args:
        first: histograms over the last dimension, `(..., E)`: non-negative, not all zero.
        second: of the same shape.

    Returns:
        `(...)` float64: 0 where they agree, 1 where they share nothing.
    """

    def entropy(distribution: Tensor) -> Tensor:
        terms: Tensor = torch.special.xlogy(distribution, distribution)
        return -terms.sum(dim=-1) / math.log(2)

    p, q = (one.double() / one.sum(dim=-1, keepdim=True) for one in (first, second))
    return (entropy((p + q) / 2) - (entropy(p) + entropy(q)) / 2).clamp(min=0)


@dataclass(frozen=True)
class LinearChange:
    """What an adaptation did to the pool of one linear.

    Attributes:
        path: the MoE block.
        linear: the expert linear.
        capacity: slots in the pool.
        used: slots that hold a correction now.
        moved: corrections that were not there before.
        error_before: expected squared output error on the new data with the old contents, see
            `moe_compiler.runtime.quality.expected_error`.
        error_after: the same with the new contents.
    """

    path: str
    linear: str
    capacity: int
    used: int
    moved: int
    error_before: float
    error_after: float


@dataclass(frozen=True)
class LayerChange:
    """What an adaptation saw in one MoE block.

    Attributes:
        path: the MoE block.
        divergence: Jensen-Shannon divergence in bits of the routing from that of the profile in the pools before.
        clusters_changed: experts that would have another width if the layer were clustered for the new data alone
            (strategy `"dynamo"`) at the bits it has.
        linears: the change of each linear's pool.
    """

    path: str
    divergence: float
    clusters_changed: int
    linears: tuple[LinearChange, ...]


@dataclass(frozen=True)
class AdaptReport:
    """What `Runtime.adapt` did.

    Attributes:
        name: the new profile's name.
        previous: the profile that was in the pools before.
        rule: how the slots were filled.
        tokens: tokens of the new data that were observed.
        layers: the change of each MoE block.
        seconds: wall-clock time of each step: `"observe"`, `"choose"`, `"swap"`.
    """

    name: str
    previous: str
    rule: str
    tokens: int
    layers: tuple[LayerChange, ...]
    seconds: Mapping[str, float]

    def to_dict(self) -> dict[str, Any]:
        """The report as JSON types."""
        return {**asdict(self), "seconds": dict(self.seconds)}

    def __str__(self) -> str:
        total = sum(self.seconds.values())
        steps = ", ".join(f"{step} {seconds:.2f} s" for step, seconds in self.seconds.items())
        lines = [
            f"adapted to {self.name!r} by rule {self.rule!r} on {self.tokens:,} tokens in {total:.2f} s ({steps}); "
            f"before: {self.previous!r}",
            f"{'MoE block':32} {'linear':14} {'divergence':>10} {'clusters':>9} {'slots':>9} {'moved':>6} "
            f"{'error left':>10}",
        ]
        for layer in self.layers:
            for change in layer.linears:
                left = change.error_after / change.error_before if change.error_before else 1.0
                slots = f"{change.used}/{change.capacity}"
                lines.append(
                    f"{layer.path:32} {change.linear:14} {layer.divergence:10.3f} {layer.clusters_changed:9d} "
                    f"{slots:>9} {change.moved:6d} {left:10.1%}"
                )
        return "\n".join(lines)


def moved_slots(before: Tensor, after: Tensor) -> int:
    """How many of the (expert, channel) keys in `after` are not in `before`."""
    return int((~torch.isin(after, before)).sum())
