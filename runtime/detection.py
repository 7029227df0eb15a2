"""How well the drift guard works: false alarms on a steady stream, tokens until it notices a change."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from moe_compiler.runtime.guard import DriftPolicy
from moe_compiler.runtime.runtime import Runtime


@dataclass(frozen=True)
class Detection:
    """What `measure_detection` saw.

    Attributes:
        steady_tokens: tokens of the stream before the change.
        checks: times the guard looked before the change.
        false_alarms: how often it then said that the data had changed.
        largest_gap: the largest divergence, in bits, that the active profile then had over the nearest one.
        detected_after: tokens of the changed stream after which it first said so, `None` if it never did.
        nearest: the profile that was nearest at the end of the changed stream.
    """

    steady_tokens: int
    checks: int
    false_alarms: int
    largest_gap: float
    detected_after: int | None
    nearest: str | None

    def to_dict(self) -> dict[str, Any]:
        """The figures as JSON types."""
        return asdict(self)

    def __str__(self) -> str:
        found = "not detected" if self.detected_after is None else f"detected after {self.detected_after:,} tokens"
        return (
            f"{self.false_alarms} false alarms in {self.checks} checks over {self.steady_tokens:,} tokens "
            f"(largest gap {self.largest_gap:.4f} bits); change {found}, nearest profile {self.nearest!r}"
        )


@torch.no_grad()
def measure_detection(
    runtime: Runtime, policy: DriftPolicy, steady: Iterable[Tensor], changed: Iterable[Tensor]
) -> Detection:
    """Runs a stream that changes through a compiled model and asks after each batch whether the data have changed.

    Nothing is switched; the model must have the profile in its pools that fits `steady`.

    Args:
        runtime: of the model.
        policy: when data count as changed.
        steady: batches of token ids `(B, S)` before the change.
        changed: batches after it, at least one.
    """
    runtime.switch(runtime.active)  # the histograms start anew
    model: Any = runtime.model
    body = getattr(model, "base_model", model)
    device = next(model.parameters()).device
    steady_tokens = checks = false_alarms = 0
    largest_gap = 0.0
    for batch in steady:
        body(input_ids=batch.to(device), use_cache=False)
        report = runtime.drift()
        steady_tokens += batch.numel()
        checks += 1
        false_alarms += policy.drifted(report)
        if report.tokens >= policy.minimum_tokens:
            largest_gap = max(largest_gap, report.divergence[report.active] - min(report.divergence.values()))
    tokens, detected = 0, None
    for batch in changed:
        body(input_ids=batch.to(device), use_cache=False)
        report = runtime.drift()
        tokens += batch.numel()
        if detected is None and policy.drifted(report):
            detected = tokens
    return Detection(steady_tokens, checks, false_alarms, largest_gap, detected, runtime.drift().nearest)
