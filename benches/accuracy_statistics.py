"""How much a quantized model loses, and how sure one can be of it: means over domains, intervals over windows.

The loss is `100 · ln(perplexity / perplexity of the original)`, averaged over domains: about per cent of perplexity.
Both models read the same windows, so what counts is the difference window by window: the intervals come from the paired
bootstrap (Efron and Tibshirani 1993, chapter 13; Koehn 2004, EMNLP), windows drawn again within each domain.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

SAMPLES = 2000
CONFIDENCE = 0.95

Losses = Mapping[str, Sequence[float]]
"""By domain, the negative log-likelihood of each window."""


@dataclass(frozen=True)
class Interval:
    """A mean with its confidence interval.

    Attributes:
        mean: of the windows at hand.
        low: lower end of the interval.
        high: upper end.
    """

    mean: float
    low: float
    high: float

    @property
    def half_width(self) -> float:
        """Half of the interval's length."""
        return (self.high - self.low) / 2

    def __str__(self) -> str:
        return f"{self.mean:.2f} ± {self.half_width:.2f}"


def loss(candidate: Losses, original: Losses, domains: Sequence[str], window: int, seed: int = 0) -> Interval:
    """Mean over `domains` of `100 · ln(perplexity of candidate / perplexity of original)`, by paired bootstrap.

    It may also compare two quantized models: the mean is the difference of their losses.

    Args:
        candidate: negative log-likelihoods of one model.
        original: of the other, on the same windows.
        domains: which to average over, each with the same weight.
        window: tokens per window, of which all but the first are scored.
        seed: of the bootstrap.

    Raises:
        ValueError: there is no domain, a model has no losses on one, or the two have different numbers of windows.
    """
    if not domains:
        raise ValueError("`domains` must name at least one domain, but is empty")
    generator = torch.Generator().manual_seed(seed)
    mean, drawn = 0.0, torch.zeros(SAMPLES, dtype=torch.float64)
    for domain in domains:
        difference = _difference(candidate, original, domain) * (100 / (window - 1))
        number = difference.numel()
        picks = torch.randint(number, (SAMPLES, number), generator=generator)
        mean += float(difference.mean())
        drawn += difference[picks].mean(dim=1)
    tail = (1 - CONFIDENCE) / 2
    low, high = torch.quantile(drawn / len(domains), torch.tensor([tail, 1 - tail], dtype=torch.float64)).tolist()
    return Interval(mean / len(domains), low, high)


def _difference(candidate: Losses, original: Losses, domain: str) -> Tensor:
    for name, losses in (("candidate", candidate), ("original", original)):
        if domain not in losses:
            raise ValueError(f"`{name}` must have losses on {domain!r}, but has them on {', '.join(losses) or 'none'}")
    first, second = (torch.tensor(list(one[domain]), dtype=torch.float64) for one in (candidate, original))
    if first.shape != second.shape or not first.numel():
        raise ValueError(
            f"`candidate` and `original` must have the same windows of {domain!r}, at least one, "
            f"but have {first.numel()} and {second.numel()}"
        )
    return first - second
