"""The drift guard: how far the routing of the last tokens is from that of each profile, and when to act on it."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from moe_compiler.runtime.report import jensen_shannon

WINDOW_TOKENS = 2048
"""Mean age of a token in the routing histogram: what one more token does to it is multiply the rest by
`1 − 1 / WINDOW_TOKENS`."""


@dataclass(frozen=True)
class LayerDrift:
    """What the histogram of one MoE block says.

    Attributes:
        path: the MoE block.
        tokens: tokens that its histogram stands for, `WINDOW_TOKENS` at most; 0 right after a change of the profile.
        divergence: by profile, the Jensen-Shannon divergence in bits of the routing from that of the profile's data;
            empty where `tokens` is 0.
    """

    path: str
    tokens: float
    divergence: Mapping[str, float]


@dataclass(frozen=True)
class DriftReport:
    """How far the routing of the last tokens is from that of each profile.

    Attributes:
        active: the profile in the pools.
        layers: each MoE block.
        drifted: whether the guard found that the data have changed; `False` where none was set.
        switched_to: the profile that the guard put into the pools, or `None`.
    """

    active: str
    layers: tuple[LayerDrift, ...]
    drifted: bool = False
    switched_to: str | None = None

    @property
    def tokens(self) -> float:
        """Tokens that the histograms stand for: the least over the blocks that saw any."""
        return min((layer.tokens for layer in self.layers if layer.tokens), default=0.0)

    @property
    def divergence(self) -> dict[str, float]:
        """By profile, the mean divergence over the blocks that saw tokens."""
        seen = [layer.divergence for layer in self.layers if layer.divergence]
        return {name: sum(one[name] for one in seen) / len(seen) for name in seen[0]} if seen else {}

    @property
    def nearest(self) -> str | None:
        """The profile with the least divergence, or `None` where no token was seen."""
        divergence = self.divergence
        return min(divergence, key=divergence.__getitem__) if divergence else None

    def to_dict(self) -> dict[str, Any]:
        """The report as JSON types."""
        return asdict(self) | {"tokens": self.tokens, "divergence": self.divergence, "nearest": self.nearest}

    def __str__(self) -> str:
        if not self.divergence:
            return f"drift: no tokens since profile {self.active!r} took effect"
        names = list(self.divergence)
        width = max(12, *map(len, names))
        end = f"; drifted: {'yes' if self.drifted else 'no'}"
        lines = [
            f"drift over {self.tokens:,.0f} tokens: active {self.active!r}, nearest {self.nearest!r}{end}",
            f"{'MoE block':32} {'tokens':>8} " + " ".join(f"{name:>{width}}" for name in names),
        ]
        for layer in self.layers:
            cells = [f"{layer.divergence[name]:{width}.4f}" if layer.divergence else " " * width for name in names]
            lines.append(f"{layer.path:32} {layer.tokens:8,.0f} " + " ".join(cells))
        mean = " ".join(f"{self.divergence[name]:{width}.4f}" for name in names)
        return "\n".join([*lines, f"{'mean':32} {self.tokens:8,.0f} {mean}"])


Action = Literal["report", "switch"] | Callable[[DriftReport], Any]
"""What to do about drift: log it, switch to the nearest profile, or call."""


@dataclass(frozen=True)
class DriftPolicy:
    """When data count as changed, and what to do then.

    Attributes:
        action: what to do.
        margin: how much nearer, in bits, another profile must be than the active one.
        threshold: how far, in bits, the active profile may be at most, whatever the others are; `None` for any. It
            finds data that no profile knows. A switch does not help there, so the action `"switch"` ignores it.
        minimum_tokens: how many tokens the histogram must stand for. It starts anew with every change of the profile,
            so this is also the time between two changes.
        timeout: how long a switch waits for forward passes to end, in seconds.
    """

    action: Action
    margin: float = 0.005
    threshold: float | None = None
    minimum_tokens: int = WINDOW_TOKENS // 4
    timeout: float = 10.0

    def __post_init__(self) -> None:
        if self.action not in ("report", "switch") and not callable(self.action):
            raise ValueError(f"`policy` must be 'report', 'switch' or a callable, but is {self.action!r}")
        for name, low, high in (
            ("margin", 0, 1),
            ("threshold", 0, 1),
            ("minimum_tokens", 1, WINDOW_TOKENS * 0.9),
            ("timeout", 0, threading.TIMEOUT_MAX),
        ):
            value = getattr(self, name)
            if name == "threshold" and value is None:
                continue
            if not isinstance(value, int | float) or isinstance(value, bool) or not low <= value <= high:
                raise ValueError(f"`{name}` must be a number in [{low}, {high:g}], but is {value!r}")

    def drifted(self, report: DriftReport, margin: float = 1.0) -> bool:
        """Whether the data have changed by this policy; `margin` scales its limits, for a change to end later."""
        divergence = report.divergence
        if report.nearest is None or report.tokens < self.minimum_tokens or report.active not in divergence:
            return False
        active = divergence[report.active]
        if active - divergence[report.nearest] > margin * self.margin:
            return True
        return self.action != "switch" and self.threshold is not None and active > margin * self.threshold


def divergences(
    histograms: Mapping[str, Tensor], profiles: Mapping[str, Mapping[str, Tensor]]
) -> tuple[LayerDrift, ...]:
    """How far routing histograms are from those of profiles.

    Args:
        histograms: by MoE block path, `(E + 1,)`, see `moe_compiler.kernels.histogram`.
        profiles: by profile and MoE block path, `(E,)`.
    """
    width = max(histogram.shape[0] for histogram in histograms.values())

    def stacked(rows: Iterable[Tensor]) -> Tensor:
        return torch.stack([torch.nn.functional.pad(row.double(), (0, width - row.shape[0])) for row in rows])

    host = [histogram.cpu() for histogram in histograms.values()]
    seen = stacked(one[:-1] for one in host)
    by_profile = {name: jensen_shannon(seen, stacked(of[path] for path in histograms)) for name, of in profiles.items()}
    return tuple(
        LayerDrift(
            path=path,
            tokens=float(host[i].sum()),
            divergence={name: float(values[i]) for name, values in by_profile.items()} if seen[i].any() else {},
        )
        for i, path in enumerate(histograms)
    )
