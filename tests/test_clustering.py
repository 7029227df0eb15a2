"""Fuzzy c-means and its boundaries: worked examples, a reference, properties, degenerate cases."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_compiler.passes.clustering import (
    FuzzyClusters,
    assign_clusters,
    boundary_scores,
    fuzzy_c_means,
    merge_ties,
    quantile_centers,
)

significances = st.lists(st.integers(0, 10**6), min_size=1, max_size=40).map(
    lambda numbers: torch.tensor(numbers, dtype=torch.float64) / 1000
)


def vector(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def log_normal(seed: int, experts: int, spread: float = 1.0) -> torch.Tensor:
    return torch.exp(spread * torch.randn(experts, generator=torch.Generator().manual_seed(seed)).double())


def reference_c_means(x: list[float], v: list[float], m: float, steps: int) -> tuple[list[float], np.ndarray]:
    """Algorithm 1 as it is printed, one number at a time."""

    def memberships(v: list[float]) -> np.ndarray:
        u = np.zeros((len(x), len(v)))
        for i in range(len(x)):
            for k in range(len(v)):
                u[i, k] = 1 / sum((abs(x[i] - v[k]) / abs(x[i] - v[j])) ** (2 / (m - 1)) for j in range(len(v)))
        return u

    u = memberships(v)
    for _ in range(steps):
        v = [sum(u[i, k] ** m * x[i] for i in range(len(x))) / sum(u[:, k] ** m) for k in range(len(v))]
        u = memberships(v)
    return v, u


@pytest.mark.parametrize(("clusters", "fuzzifier"), [(4, 2.0), (3, 1.5), (2, 3.0), (1, 2.0)])
def test_fuzzy_c_means_follows_the_printed_algorithm(clusters: int, fuzzifier: float) -> None:
    values = log_normal(0, 12)
    start = torch.linspace(0.31, 2.9, clusters).double()
    result = fuzzy_c_means(values, clusters, fuzzifier, initial_centers=start)
    assert result.converged
    centers, memberships = reference_c_means(values.tolist(), start.tolist(), fuzzifier, result.iterations)
    torch.testing.assert_close(result.centers, vector(*centers))
    torch.testing.assert_close(result.memberships, torch.from_numpy(memberships))


def test_fuzzy_c_means_worked_step() -> None:
    # Memberships of 1 at the centres 0 and 4: u = (9/10, 1/10); of 2: halves; of 0 and 4: their own centre.
    result = fuzzy_c_means(vector(0, 1, 2, 4), 2, initial_centers=vector(0, 4), max_iterations=1)
    low = (0.81 * 1 + 0.25 * 2) / (1 + 0.81 + 0.25)
    high = (0.01 * 1 + 0.25 * 2 + 4) / (0.01 + 0.25 + 1)
    torch.testing.assert_close(result.centers, vector(low, high))
    assert result.iterations == 1
    assert not result.converged


def test_fuzzy_c_means_finds_separate_groups() -> None:
    values = vector(8.0, 0.9, 4.1, 1.0, 2.1, 8.1, 1.1, 2.0, 3.9)
    clusters = fuzzy_c_means(values, 4)
    torch.testing.assert_close(clusters.centers, vector(1, 2.05, 4, 8.05), atol=0.05, rtol=0)
    assert assign_clusters(clusters).tolist() == [3, 0, 2, 0, 1, 3, 0, 1, 2]


@settings(max_examples=20, deadline=None)
@given(significances, st.integers(1, 6), st.randoms())
def test_fuzzy_c_means_ends_at_a_fixed_point_in_any_order(values: torch.Tensor, count: int, shuffle) -> None:
    result = fuzzy_c_means(values, count)
    u = result.memberships
    torch.testing.assert_close(u.sum(dim=1), torch.ones(len(values)).double())
    assert bool((result.centers.diff() >= 0).all())
    assert bool(((u >= 0) & (u <= 1)).all())
    if result.converged and result.iterations:
        weight = u**2
        centers = (weight * values[:, None]).sum(dim=0) / weight.sum(dim=0)
        spread = (values.max() - values.min()).item()
        torch.testing.assert_close(result.centers, centers, atol=1e-4 * spread, rtol=0)
    order = list(range(len(values)))
    shuffle.shuffle(order)
    permuted = fuzzy_c_means(values[order], count)
    assert torch.equal(permuted.memberships, u[order])
    assert torch.equal(permuted.centers, result.centers)


@pytest.mark.parametrize("level", [0.0, 0.25, 1 / 3])
def test_equal_values_are_one_cluster(level: float) -> None:
    clusters = fuzzy_c_means(torch.full((6,), level).double(), 4)
    assert clusters.centers.tolist() == pytest.approx([level] * 4)
    assert clusters.memberships.tolist() == [[1, 0, 0, 0]] * 6
    assert assign_clusters(clusters).tolist() == [0] * 6
    assert clusters.converged


def test_rounding_makes_no_clusters() -> None:
    values = vector(0.1 + 0.2, 0.3, 0.3, 0.1 + 0.2)
    assert values[0] != values[1]
    assert merge_ties(values).unique().tolist() == [0.3]
    assert assign_clusters(fuzzy_c_means(values, 2)).tolist() == [0] * 4


def test_as_many_values_as_clusters_or_fewer_are_the_centers() -> None:
    clusters = fuzzy_c_means(vector(5, 1, 5, 2), 4)
    assert clusters.centers.tolist() == [1, 2, 5, 5]
    assert clusters.memberships.argmax(dim=1).tolist() == [2, 0, 2, 1]
    assert assign_clusters(clusters).tolist() == [2, 0, 2, 1]


def test_quantile_centers_worked_examples() -> None:
    values = vector(4, 2, 1, 3)
    # even shares: positions 1/8, 3/8, 5/8, 7/8 of 1, 2, 3, 4; quantiles at 1/4 and 3/4
    torch.testing.assert_close(quantile_centers(values, torch.ones(4), 2), vector(1.5, 3.5))
    # shares 1/2 of value 1, 1/2 of value 4: positions 1/4 and 3/4
    torch.testing.assert_close(quantile_centers(values, vector(1, 0, 1, 0), 2), vector(1, 4))
    torch.testing.assert_close(quantile_centers(values, torch.zeros(4), 2), vector(1.5, 3.5))


def test_quantile_centers_stay_apart_where_one_expert_takes_everything() -> None:
    values = vector(0.1, 0.2, 0.3, 0.4, 0.5, 9)
    centers = quantile_centers(values, vector(1, 1, 1, 1, 1, 995), 4)
    torch.testing.assert_close(centers, quantile_centers(values, torch.ones(6), 4))
    assert bool((centers.diff() > 0).all())
    assert quantile_centers(vector(2, 1, 2), torch.ones(3), 4).tolist() == [1, 2, 2, 2]


@settings(max_examples=20, deadline=None)
@given(significances, st.integers(1, 6), st.integers(0, 1000))
def test_quantile_centers_are_apart_and_in_range(values: torch.Tensor, count: int, seed: int) -> None:
    share = torch.rand(len(values), generator=torch.Generator().manual_seed(seed)).double()
    centers = quantile_centers(values, share, count)
    assert centers.shape == (count,)
    assert values.min() - 1e-9 <= centers[0]
    assert centers[-1] <= values.max() + 1e-9
    if len(values.unique()) >= count:
        assert bool((centers.diff() > 0).all())


def by_hand(*values: float) -> FuzzyClusters:
    """Two clusters with the centres 1 and 2."""
    x = vector(*values)[:, None]
    closeness = 1 / (x - vector(1, 2)).square()
    return FuzzyClusters(x[:, 0], vector(1, 2), closeness / closeness.sum(dim=1, keepdim=True), 1, True)


def test_assign_clusters_low_precision_first() -> None:
    # memberships at 1.55: 0.2025 : 0.3025 = 0.401 and 0.599, too close; at 1.56: 0.382 and 0.618
    clusters = by_hand(1.45, 1.49, 1.51, 1.55, 1.56, 1.99, 2.5, 0.5)
    assert assign_clusters(clusters).tolist() == [0, 0, 0, 0, 1, 1, 1, 0]
    assert assign_clusters(clusters, overlap=0).tolist() == [0, 0, 1, 1, 1, 1, 1, 0]
    assert assign_clusters(clusters, overlap=1).tolist() == [0, 0, 0, 0, 0, 0, 1, 0]


def test_boundary_scores_worked_example() -> None:
    scores = boundary_scores(by_hand(0.5, 1.5, 1.56, 3))[:, 0].tolist()
    assert scores == pytest.approx([-2, 0, 0.2366, 1.5], abs=1e-4)
    exact = FuzzyClusters(vector(0, 3), vector(0, 3), torch.eye(2).double(), 0, True)
    assert boundary_scores(exact).tolist() == [[-1], [1]]


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 10_000), st.integers(3, 40), st.integers(2, 5), st.floats(0.1, 2.5))
def test_boundaries_are_monotone(seed: int, experts: int, count: int, spread: float) -> None:
    values = log_normal(seed, experts, spread).sort().values
    values[: experts // 3] = 0 if seed % 2 else values[0]
    clusters = fuzzy_c_means(values, count)
    scores = boundary_scores(clusters)
    assert bool((scores[1:] >= scores[:-1] - 1e-9).all())  # in the value
    assert bool((scores[:, :-1] >= scores[:, 1:]).all())  # in the cluster
    previous = None
    for overlap in (0.0, 0.2, 0.6, 1.0):
        level = assign_clusters(clusters, overlap)
        assert bool((level.diff() >= 0).all())
        assert previous is None or bool((level <= previous).all())
        previous = level


def test_refuses_what_it_cannot_cluster() -> None:
    values = vector(1, 2, 3, 4, 5)
    with pytest.raises(ValueError, match=r"`values` must be a non-empty vector of finite, non-negative"):
        fuzzy_c_means(-values)
    with pytest.raises(ValueError, match=r"`values` must be .* got shape \(0,\)"):
        merge_ties(torch.ones(0))
    with pytest.raises(ValueError, match=r"`num_clusters` must be at least 1, got 0"):
        fuzzy_c_means(values, 0)
    with pytest.raises(ValueError, match=r"`fuzzifier` must be greater than 1, got 1"):
        fuzzy_c_means(values, fuzzifier=1.0)
    with pytest.raises(ValueError, match=r"`tolerance` and `max_iterations` must be positive, got 0 and 1000"):
        fuzzy_c_means(values, tolerance=0)
    with pytest.raises(ValueError, match=r"`initial_centers` must hold 2 different numbers, got \[1.0, 1.0\]"):
        fuzzy_c_means(values, 2, initial_centers=vector(1, 1))
    with pytest.raises(ValueError, match=r"`token_share` must hold 5 finite, non-negative shares"):
        quantile_centers(values, torch.ones(4), 2)
    with pytest.raises(ValueError, match=r"`overlap` must be in \[0, 1\], got 1.5"):
        assign_clusters(by_hand(1.5), overlap=1.5)
