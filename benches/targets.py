"""The speeds this project promises itself, and the table that holds a run's measurements against them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from environment import Environment
from harness import markdown_table

PACKED = "packed"
PACKED_WITHOUT_POOL = "packed, no pool"
LARGE = 1 << 22  # bytes; rows that read less prove nothing


@dataclass(frozen=True)
class LayerRow:
    """One candidate at one setting. Numbers that were not measured are `None`.

    Attributes:
        mode: `"layer"` (one MoE layer without its router) or `"operator"` (one expert linear).
        shape: the model, or `NxK`.
        tokens: tokens of the batch; in mode `"operator"` tokens per expert.
        routing: `"uniform"` or `"zipf"`; in mode `"operator"` `"even"`.
        experts_hit: experts that get a token, shared ones included.
        bits: width of the codes; 3 is half 2 and half 4 bits.
        pool: share of the input channels that the pool holds, all slots in use.
        dtype: of the activations.
        candidate: what was measured.
        status: `"ok"`, or why there is no time.
        rounds: how many times were taken.
        best_ms: the shortest time of one call.
        median_ms: the median.
        spread: interquartile range over the median.
        warmup_s: seconds of the first call, compilation and graph capture included.
        baseline: what `speedup` is over.
        speedup: how many times faster than the baseline, the median over rounds.
        pool_cost: of the packed candidate with a pool, the time it takes over the one without, less 1.
        bytes_read: bytes that must be read at least: weights of the experts hit.
        gb_per_s: those over the median time.
        roof_share: that over the measured copy bandwidth.
        roof_gb_per_s: the measured copy bandwidth, bytes read and written.
    """

    mode: str
    shape: str
    tokens: int
    routing: str
    experts_hit: int
    bits: int
    pool: float
    dtype: str
    candidate: str
    status: str
    rounds: int
    best_ms: float | None
    median_ms: float | None
    spread: float | None
    warmup_s: float | None
    baseline: str
    speedup: float | None
    pool_cost: float | None
    bytes_read: int
    gb_per_s: float | None
    roof_share: float | None
    roof_gb_per_s: float

    def setting(self) -> tuple[object, ...]:
        """What rows of candidates that ran side by side have in common."""
        return self.mode, self.shape, self.tokens, self.routing, self.bits, self.pool, self.dtype


@dataclass(frozen=True)
class Target:
    """One promise: the worst of the rows it selects is held against the goal.

    Attributes:
        text: what is promised, with its conditions.
        device_type: `"cpu"` or `"cuda"`, or empty for either.
        device: part of the device's name, or empty for any.
        selects: which rows it speaks of.
        value: the number in the row.
        goal: the bound.
        at_most: whether the number must be at most the goal, rather than at least.
        percent: whether the number is a share.
    """

    text: str
    device_type: str
    device: str
    selects: Callable[[LayerRow], bool]
    value: Callable[[LayerRow], float | None]
    goal: float
    at_most: bool = False
    percent: bool = False

    def show(self, value: float) -> str:
        """The number as text."""
        return f"{value:.1%}" if self.percent else f"{value:.2f}x"

    def line(self, rows: Sequence[LayerRow], environment: Environment) -> tuple[str, str, str, str, str]:
        """The target's line of the summary: text, goal, worst measured, where, verdict."""
        goal = ("<= " if self.at_most else ">= ") + self.show(self.goal)
        here = self.device_type in ("", environment.device_type) and self.device in environment.device
        found = [(value, row) for row in rows if here and self.selects(row) and (value := self.value(row)) is not None]
        if not found:
            return self.text, goal, "-", "-", "not measured here"
        worst, row = (max if self.at_most else min)(found, key=lambda pair: pair[0])
        met = worst <= self.goal if self.at_most else worst >= self.goal
        where = f"{row.shape}, {row.tokens} {'per expert' if row.mode == 'operator' else 'tokens'}"
        return self.text, goal, self.show(worst), where, "met" if met else "missed"


def _layer(lowest: int, highest: int = 1 << 30) -> Callable[[LayerRow], bool]:
    return lambda row: (
        row.mode == "layer"
        and row.candidate == PACKED
        and row.bytes_read >= LARGE
        and row.routing == "uniform"
        and row.bits == 3
        and lowest <= row.tokens <= highest
    )


def _few_tokens(row: LayerRow) -> bool:
    """Up to 4 tokens per expert: in mode `"layer"` up to 16 in all, which the router spreads."""
    most = 4 if row.mode == "operator" else 16
    even = row.mode == "operator" or row.routing == "uniform"
    return row.bytes_read >= LARGE and row.candidate == PACKED and row.bits == 3 and even and row.tokens <= most


def _pool(row: LayerRow) -> bool:
    return row.candidate == PACKED and row.pool == 0.01 and row.bytes_read >= LARGE


def _speedup(row: LayerRow) -> float | None:
    return row.speedup


TARGETS = (
    Target("H100, 1-16 tokens, 3 bits, over the best bf16 layer", "cuda", "H100", _layer(1, 16), _speedup, 3.0),
    Target(
        "H100, 16 tokens, 3 bits, share of copy bandwidth",
        "cuda",
        "H100",
        _layer(16, 16),
        lambda row: row.roof_share,
        0.6,
        percent=True,
    ),
    Target("H100, 128 tokens, 3 bits, over the best bf16 layer", "cuda", "H100", _layer(128, 128), _speedup, 2.8),
    Target("H100, >= 2048 tokens, 3 bits, over the best bf16 layer", "cuda", "H100", _layer(2048), _speedup, 0.95),
    Target("CPU, 1-4 tokens per expert, 3 bits, over bf16 F.linear", "cpu", "", _few_tokens, _speedup, 2.5),
    Target("CPU, 2048 tokens or more, 3 bits, over bf16 F.linear", "cpu", "", _layer(2048), _speedup, 0.8),
    Target(
        "pool of 1 % of the channels, time over no pool",
        "",
        "",
        _pool,
        lambda row: row.pool_cost,
        0.05,
        at_most=True,
        percent=True,
    ),
)


def summary(rows: Sequence[LayerRow], environment: Environment) -> str:
    """The targets and what this run says of each, as a Markdown table."""
    header = ("target", "goal", "worst measured", "at", "verdict")
    return markdown_table(header, [target.line(rows, environment) for target in TARGETS])
