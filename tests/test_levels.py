"""Raising levels to a target: worked examples and what holds for every choice."""

from collections.abc import Sequence
from itertools import pairwise

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_compiler.passes.levels import fill_levels

WIDTHS = (2, 4, 6, 8)


def vector(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def two_levels(values: torch.Tensor, mean_bits: float) -> list[int]:
    return fill_levels(values, values[:, None], (2, 4), mean_bits).tolist()


def test_the_most_significant_rise_first() -> None:
    assert two_levels(vector(3, 1, 4, 2), 3.0) == [1, 0, 1, 0]
    assert two_levels(vector(3, 1, 4, 2), 3.4) == [1, 0, 1, 0]
    assert two_levels(vector(3, 1, 4, 2), 3.5) == [1, 0, 1, 1]
    assert two_levels(vector(3, 1, 4, 2), 2.0) == [0, 0, 0, 0]
    assert two_levels(vector(3, 1, 4, 2), 9.0) == [1, 1, 1, 1]


def test_equal_experts_rise_together_or_not_at_all() -> None:
    assert two_levels(vector(3, 3, 4, 3), 3.5) == [0, 0, 1, 0]
    assert two_levels(vector(1, 1, 1, 1), 3.9) == [0, 0, 0, 0]
    assert two_levels(vector(1, 1, 1, 1), 4.0) == [1, 1, 1, 1]


def test_what_a_large_group_leaves_goes_to_the_experts_above() -> None:
    scores = torch.stack([vector(1, 1, 1, 2), vector(0, 0, 0, 0.5)], dim=1)
    assert fill_levels(vector(1, 1, 1, 2), scores, (2, 4, 6), 3.0).tolist() == [0, 0, 0, 2]


def test_one_width_has_one_level() -> None:
    assert fill_levels(vector(1, 2), torch.empty(2, 0), (4,), 4.0).tolist() == [0, 0]


def allowed(levels: torch.Tensor, values: torch.Tensor) -> bool:
    pairs = sorted(zip(values.tolist(), levels.tolist(), strict=True))
    return all(a[1] <= b[1] and (a[0] != b[0] or a[1] == b[1]) for a, b in pairwise(pairs))


def mean_width(levels: torch.Tensor, widths: Sequence[int]) -> float:
    return sum(widths[level] for level in levels.tolist()) / len(levels)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(0, 12), min_size=1, max_size=12), st.floats(2, 8.5), st.floats(0.2, 3))
def test_within_the_target_monotone_and_not_to_be_raised(numbers: list[int], mean_bits: float, ratio: float) -> None:
    values = torch.tensor(numbers, dtype=torch.float64)
    scores = torch.stack([values, values / (1 + ratio), values / (1 + ratio) ** 2], dim=1)
    levels = fill_levels(values, scores, WIDTHS, mean_bits)
    assert mean_width(levels, WIDTHS) <= mean_bits + 1e-8
    assert allowed(levels, values)
    for value in values.unique():
        raised = levels + (values == value)
        if raised.max() < len(WIDTHS) and allowed(raised, values):
            assert mean_width(raised, WIDTHS) > mean_bits
    order = torch.randperm(len(values))
    assert torch.equal(fill_levels(values[order], scores[order], WIDTHS, mean_bits), levels[order])


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 1000), st.integers(2, 20))
def test_a_higher_target_lowers_nobody(seed: int, experts: int) -> None:
    values = torch.rand(experts, generator=torch.Generator().manual_seed(seed)).double()
    scores = torch.stack([values, values / 2, values / 4], dim=1)
    previous = torch.zeros(experts, dtype=torch.int64)
    for mean_bits in (2, 2.3, 3, 4.1, 6, 8):
        levels = fill_levels(values, scores, WIDTHS, mean_bits)
        assert bool((levels >= previous).all())
        assert mean_bits - mean_width(levels, WIDTHS) < 2 / experts
        previous = levels
