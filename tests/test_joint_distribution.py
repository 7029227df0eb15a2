"""The joint distribution of expert significance: worked examples, an oracle, degenerate cases."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_compiler.passes.significance import fit_joint_distribution


def tensor(*rows: list[float]) -> torch.Tensor:
    return torch.tensor(rows, dtype=torch.float64)


def draw(seed: int, datasets: int, experts: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(datasets, experts, generator=generator, dtype=torch.float64)


def test_worked_example_of_two_datasets() -> None:
    joint = fit_joint_distribution(tensor([0.2, 0.8], [0.4, 0.6]))
    torch.testing.assert_close(joint.mean, tensor([0.5, 0.5])[0])
    torch.testing.assert_close(joint.covariance, tensor([0.09, 0.03], [0.03, 0.01]))
    torch.testing.assert_close(joint.correlation, tensor([1, 1], [1, 1]))
    torch.testing.assert_close(joint.weights, tensor([0.5, 0.5])[0])
    torch.testing.assert_close(joint.baseline, tensor([0.3, 0.7])[0])
    torch.testing.assert_close(joint.dynamics, tensor([0.1 / 0.3, 0.1 / 0.7])[0])


def test_a_dataset_that_contradicts_the_others_has_no_weight() -> None:
    joint = fit_joint_distribution(tensor([0.1, 0.9], [0.3, 0.7], [0.8, 0.2]))
    torch.testing.assert_close(joint.correlation, tensor([1, 1, -1], [1, 1, -1], [-1, -1, 1]))
    torch.testing.assert_close(joint.weights, tensor([0.5, 0.5, 0])[0])
    torch.testing.assert_close(joint.baseline, tensor([0.2, 0.8])[0])


def test_one_dataset_is_its_own_baseline() -> None:
    significance = draw(0, 1, 6)
    joint = fit_joint_distribution(significance)
    assert torch.equal(joint.baseline, significance[0])
    assert torch.equal(joint.dynamics, torch.zeros(6).double())
    assert torch.equal(joint.weights, torch.ones(1).double())


def test_datasets_that_cancel_weigh_the_same() -> None:
    joint = fit_joint_distribution(tensor([0.1, 0.9], [0.9, 0.1]))
    torch.testing.assert_close(joint.weights, tensor([0.5, 0.5])[0])
    torch.testing.assert_close(joint.baseline, tensor([0.5, 0.5])[0])


def test_a_dataset_with_equal_experts_correlates_with_itself_only() -> None:
    joint = fit_joint_distribution(tensor([0.1, 0.9], [0.1 + 0.2, 0.3], [0.2, 0.8]))
    torch.testing.assert_close(joint.correlation, tensor([1, 0, 1], [0, 1, 0], [1, 0, 1]))
    torch.testing.assert_close(joint.weights, tensor([0.4, 0.2, 0.4])[0])


def test_an_expert_that_no_dataset_uses_has_no_dynamics() -> None:
    joint = fit_joint_distribution(tensor([0, 1], [0, 1]))
    assert joint.dynamics.tolist() == [0, 0]
    assert joint.baseline.tolist() == [0, 1]


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10_000), st.integers(1, 5), st.integers(3, 40))
def test_agrees_with_numpy_and_follows_permutations(seed: int, datasets: int, experts: int) -> None:
    significance = draw(seed, datasets, experts)
    joint = fit_joint_distribution(significance)
    oracle = torch.from_numpy(np.atleast_2d(np.corrcoef(significance.numpy())))
    torch.testing.assert_close(joint.correlation, oracle)
    torch.testing.assert_close(joint.covariance, torch.cov(significance, correction=0).reshape(datasets, datasets))
    raw = oracle.sum(dim=1).clamp(min=0)
    torch.testing.assert_close(joint.baseline, (raw / raw.sum()) @ significance)
    spread = significance.std(dim=0, correction=0) / significance.mean(dim=0)
    torch.testing.assert_close(joint.dynamics, spread)

    generator = torch.Generator().manual_seed(seed)
    of_datasets = torch.randperm(datasets, generator=generator)
    of_experts = torch.randperm(experts, generator=generator)
    permuted = fit_joint_distribution(significance[of_datasets][:, of_experts])
    assert torch.equal(permuted.baseline, joint.baseline[of_experts])
    assert torch.equal(permuted.dynamics, joint.dynamics[of_experts])
    assert torch.equal(permuted.weights, joint.weights[of_datasets])


@pytest.mark.parametrize(
    "wrong", [torch.ones(3), torch.ones(0, 3), -torch.ones(2, 2), torch.full((2, 2), float("nan"))]
)
def test_refuses_what_is_no_significance(wrong: torch.Tensor) -> None:
    with pytest.raises(ValueError, match=r"`significance` must be a non-empty \(datasets, experts\) matrix"):
        fit_joint_distribution(wrong)
