"""Splitting experts in two: the mean, natural breaks, and the choice between them."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_compiler.passes.partition import gaussian_threshold, jenks_split, moqa_partition


def vector(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def test_gaussian_threshold_is_the_mean() -> None:
    assert gaussian_threshold(vector(0.1, 0.2, 0.6)) == pytest.approx(0.3)


def test_jenks_split_worked_example() -> None:
    # squared distances within {1, 2} and {8, 9, 10}: 0.5 + 2, less than for any other split
    assert jenks_split(vector(9, 1, 8, 2, 10)) == 8
    assert jenks_split(vector(3, 3, 3)) == 3
    assert jenks_split(vector(0, 0)) == 0


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(0, 1000), min_size=2, max_size=30).filter(lambda numbers: len(set(numbers)) > 1))
def test_jenks_split_has_the_least_squares_within_classes(numbers: list[int]) -> None:
    values = torch.tensor(numbers, dtype=torch.float64) / 7

    def within(threshold: float) -> float:
        parts = (values[values < threshold], values[values >= threshold])
        return sum((part - part.mean()).square().sum().item() for part in parts)

    best = min(within(threshold) for threshold in values.unique()[1:].tolist())
    threshold = jenks_split(values)
    assert threshold in values.tolist()
    assert within(threshold) == pytest.approx(best, rel=1e-9, abs=1e-9)


def test_experts_that_differ_much_are_split_at_the_mean() -> None:
    # mean 0.25, variance (0.04 + 0.0225 + 0.0025 + 0.09) / 4 = 0.03875, coefficient 0.787
    partition = moqa_partition(vector(0.05, 0.1, 0.3, 0.55))
    assert partition.pattern == 1
    assert partition.threshold == pytest.approx(0.25)
    assert partition.std == pytest.approx(0.03875**0.5)
    assert partition.coefficient_of_variation == pytest.approx(0.03875**0.5 / 0.25)
    assert partition.high.tolist() == [False, False, True, True]


def test_experts_that_are_alike_are_split_by_natural_breaks() -> None:
    partition = moqa_partition(vector(0.24, 0.25, 0.35, 0.25, 0.25))
    assert partition.pattern == 2
    assert partition.threshold == 0.35
    assert partition.high.tolist() == [False, False, True, False, False]
    assert moqa_partition(vector(0.24, 0.25, 0.35), pattern_threshold=0.0).pattern == 1


@pytest.mark.parametrize("pattern_threshold", [0.0, 0.5])
@pytest.mark.parametrize("level", [0.0, 0.1])
def test_experts_that_are_all_alike_are_all_high(level: float, pattern_threshold: float) -> None:
    partition = moqa_partition(torch.full((7,), level).double(), pattern_threshold)
    assert partition.high.tolist() == [True] * 7


def test_refuses_a_negative_pattern_threshold() -> None:
    with pytest.raises(ValueError, match=r"`pattern_threshold` must be at least 0, got -0.1"):
        moqa_partition(vector(1, 2), pattern_threshold=-0.1)
