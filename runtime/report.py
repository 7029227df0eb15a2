"""What an adaptation did, to print or to log."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor


def jensen_shannon(p: Tensor, q: Tensor) -> float:
    """Jensen-Shannon divergence of two histograms in bits: 0 where they agree, 1 where they share nothing.

    Args:
        p: `(E,)` non-negative counts, not all zero.
        q: `(E,)` likewise.
    """
    p, q = p.double() / p.sum(), q.double() / q.sum()
    middle = (p + q) / 2

    def relative(a: Tensor) -> Tensor:
        used = a > 0
        return (a[used] * (a[used] / middle[used]).log2()).sum()

    return max(0.0, float((relative(p) + relative(q)) / 2))


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
            `moe_compiler.runtime.channels.expected_error`.
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
        divergence: Jensen-Shannon divergence in bits of the routing from that of the calibration data.
        clusters_changed: experts whose width would be another on the new data.
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
        name: the adaptation's name.
        rule: how the slots were filled.
        tokens: tokens of the new data that were observed.
        layers: the change of each MoE block.
        seconds: wall-clock time of each step: `"observe"`, `"choose"`, `"swap"`.
    """

    name: str
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
            f"adapted to {self.name!r} by rule {self.rule!r} on {self.tokens:,} tokens in {total:.2f} s ({steps})",
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
