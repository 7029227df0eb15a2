"""Token utilization, channel and expert significance: worked examples, properties, degenerate cases."""

import math
from itertools import pairwise

import pytest
import torch
from allocation_cases import make_block, make_layer, permute_experts
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_compiler.passes.significance import (
    channel_significance,
    expert_significance,
    fit_power_law,
    layer_significance,
    ordered_sum,
    token_expert_significance,
    token_utilization,
    token_weights,
)
from moe_compiler.passes.statistics import LinearStatistics

counts_of_tokens = st.lists(st.integers(0, 10_000), min_size=1, max_size=40).filter(any)


def test_power_law_worked_example() -> None:
    law = fit_power_law(torch.tensor([4, 0, 8]))  # through (1, 8) and (2, 4)
    assert [law.C, law.beta] == pytest.approx([8, 1])
    torch.testing.assert_close(law(torch.tensor([1, 2, 4])), torch.tensor([8.0, 4, 2], dtype=torch.float64))


@settings(max_examples=25, deadline=None)
@given(st.floats(0.1, 3), st.floats(0.01, 1e6), st.integers(2, 50), st.randoms())
def test_power_law_recovers_an_exact_law_in_any_order(beta: float, C: float, size: int, shuffle) -> None:
    frequencies = [C * rank**-beta for rank in range(1, size + 1)]
    shuffle.shuffle(frequencies)
    law = fit_power_law(torch.tensor(frequencies, dtype=torch.float64))
    assert [law.C, law.beta] == pytest.approx([C, beta], rel=1e-6)


@pytest.mark.parametrize("counts", [[7], [0, 7, 0], [7, 7, 7]])
def test_power_law_of_one_token_or_of_equal_ones_is_flat(counts: list[int]) -> None:
    law = fit_power_law(torch.tensor(counts))
    assert [law.C, law.beta] == pytest.approx([7, 0], abs=1e-12)


def test_token_utilization_is_top_k_times_the_frequency() -> None:
    torch.testing.assert_close(token_utilization(torch.tensor([3, 0]), 4), torch.tensor([12.0, 0]).double())


def test_token_weights_worked_example() -> None:
    # beta is 1: ranks 2 and 1, and the unseen token takes the last rank, 2
    weights = token_weights(torch.tensor([4, 8, 0]), alpha=0.3)
    expected = torch.tensor([2**-0.3, 1, 2**-0.3], dtype=torch.float64)
    torch.testing.assert_close(weights, expected)


@settings(max_examples=50, deadline=None)
@given(counts_of_tokens, st.floats(0, 2))
def test_token_weights_fall_with_the_rank(counts: list[int], alpha: float) -> None:
    weights = token_weights(torch.tensor(counts), alpha).tolist()
    pairs = sorted(zip(counts, weights, strict=True))
    assert all(0 < w <= 1 for w in weights)
    assert pairs[-1][1] == 1  # the head
    for (count, weight), (next_count, next_weight) in pairwise(pairs):
        assert weight == next_weight if count == next_count else weight <= next_weight


@pytest.mark.parametrize("counts", [[5], [3, 3, 3]])
def test_token_weights_are_one_where_no_token_stands_out(counts: list[int]) -> None:
    torch.testing.assert_close(token_weights(torch.tensor(counts)), torch.ones(len(counts)).double())


def test_token_weights_refuse_what_has_no_ranks() -> None:
    with pytest.raises(ValueError, match=r"`token_counts` must count at least one token, got 3 zeros"):
        token_weights(torch.zeros(3, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"`token_counts` must be a vector .* got shape \(1, 2\)"):
        token_weights(torch.ones(1, 2))
    with pytest.raises(ValueError, match=r"`frequencies` must be a vector of finite"):
        fit_power_law(torch.tensor([1.0, -1.0]))
    with pytest.raises(ValueError, match=r"`alpha` must be a finite number of at least 0, got -1"):
        token_weights(torch.ones(3), alpha=-1)


def test_channel_significance_worked_example() -> None:
    linear = LinearStatistics(torch.tensor([[1.0, 2], [3, 0]]), torch.zeros(2, 2))
    result = channel_significance(linear, torch.tensor([[0.5, 2], [2, 9]]))
    torch.testing.assert_close(result, torch.tensor([[0.5, 4], [6, 0]], dtype=torch.float64))
    with pytest.raises(ValueError, match=r"`column_norm` must have the shape of the statistics \(2, 2\), got \(2, 3\)"):
        channel_significance(linear, torch.ones(2, 3))


def test_expert_significance_worked_example() -> None:
    # up: experts contribute 1·2 + 2·1 = 4 and 12, shares 1/4 and 3/4; down: 5 and 5, shares 1/2; k = 2
    block = make_block({"up_proj": [[1, 2], [4, 4]], "down_proj": [[5], [1]]}, [3, 9], tokens=6, top_k=2)
    norms = {"up_proj": torch.tensor([[2.0, 1], [1, 2]]), "down_proj": torch.tensor([[1.0], [5]])}
    expected = torch.tensor([0.75, 1.25], dtype=torch.float64)
    torch.testing.assert_close(expert_significance(block, norms), expected)


def test_expert_significance_without_statistics() -> None:
    norms = {"up_proj": torch.ones(4, 1), "down_proj": torch.ones(4, 1)}
    empty = make_block({"up_proj": [[0]] * 4, "down_proj": [[0]] * 4}, [0] * 4, tokens=0, top_k=2)
    torch.testing.assert_close(expert_significance(empty, norms), torch.full((4,), 0.5).double())
    torch.testing.assert_close(token_expert_significance(empty), torch.full((4,), 0.5).double())
    half = make_block({"up_proj": [[0]] * 4, "down_proj": [[1], [1], [2], [4]]}, [1] * 4, tokens=2, top_k=2)
    expected = torch.tensor([0.25, 0.25, 0.5, 1], dtype=torch.float64)
    torch.testing.assert_close(expert_significance(half, norms), expected)


def test_expert_significance_names_a_linear_without_norms() -> None:
    block = make_block({"up_proj": [[1]], "down_proj": [[1]]}, [1], tokens=1, top_k=1)
    with pytest.raises(ValueError, match=r"`column_norm` must hold the linear 'down_proj', got \['up_proj'\]"):
        expert_significance(block, {"up_proj": torch.ones(1, 1)})


def test_an_expert_that_takes_every_token_alone_reaches_one() -> None:
    block = make_block({"up_proj": [[0], [7], [0]]}, [0, 7, 0], tokens=7, top_k=1)
    expected = torch.tensor([0.0, 1, 0], dtype=torch.float64)
    torch.testing.assert_close(expert_significance(block, {"up_proj": torch.ones(3, 1)}), expected)
    torch.testing.assert_close(token_expert_significance(block), expected)


def test_token_expert_significance_worked_example() -> None:
    block = make_block({"up_proj": [[1]] * 3}, [5, 10, 1], tokens=8, top_k=2)
    expected = torch.tensor([0.625, 1.25, 0.125], dtype=torch.float64)
    torch.testing.assert_close(token_expert_significance(block), expected)


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 1000), st.integers(1, 40), st.integers(1, 4))
def test_layer_significance_sums_to_k_and_follows_the_experts(seed: int, experts: int, datasets: int) -> None:
    layer = make_layer(seed, experts=experts, datasets=datasets, top_k=3)
    significance = layer_significance(layer)
    assert significance.shape == (datasets, experts)
    torch.testing.assert_close(significance.sum(dim=1), torch.full((datasets,), 3.0).double())
    order = torch.randperm(experts, generator=torch.Generator().manual_seed(seed))
    assert torch.equal(layer_significance(permute_experts(layer, order)), significance[:, order])


@settings(max_examples=25, deadline=None)
@given(st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=30), st.randoms())
def test_ordered_sum_does_not_depend_on_the_order(values: list[float], shuffle) -> None:
    total = ordered_sum(torch.tensor(values, dtype=torch.float64)).item()
    assert total == pytest.approx(math.fsum(values), abs=1e-6)
    shuffle.shuffle(values)
    assert ordered_sum(torch.tensor(values, dtype=torch.float64)).item() == total
