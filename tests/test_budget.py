"""The bit budget: exhaustive search as the oracle, the greedy against the integer program, errors by hand."""

from dataclasses import replace
from itertools import product
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from allocation_cases import make_layer
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_compiler.passes import budget as module
from moe_compiler.passes.budget import convex_hull, relative_errors, solve_budget

WIDTHS = (2, 4, 6, 8)


def problem(seed: int, items: int) -> tuple[np.ndarray, np.ndarray]:
    """Errors that fall about fourfold per bit, now and then not at all, and weights of two sizes."""
    generator = np.random.default_rng(seed)
    scale = np.exp(1.5 * generator.normal(size=(items, 1)))
    errors = scale * 4.0 ** -np.asarray(WIDTHS) * np.exp(0.5 * generator.normal(size=(items, 4)))
    return errors, generator.choice([128, 256], size=items)


def total(errors: np.ndarray, choice: np.ndarray) -> float:
    return float(np.take_along_axis(errors, choice[:, None], axis=1).sum())


def bits(weights: np.ndarray, choice: np.ndarray) -> int:
    return int((weights * np.asarray(WIDTHS)[choice]).sum())


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10_000), st.integers(1, 5), st.floats(2, 8.5))
def test_integer_program_finds_what_exhaustive_search_finds(seed: int, items: int, mean_bits: float) -> None:
    errors, weights = problem(seed, items)
    budget = mean_bits * weights.sum()
    choices = [np.array(choice) for choice in product(range(4), repeat=items)]
    best = min(total(errors, choice) for choice in choices if bits(weights, choice) <= budget)
    choice = solve_budget(errors, weights, WIDTHS, budget, "milp")
    assert bits(weights, choice) <= budget
    assert total(errors, choice) == pytest.approx(best, rel=1e-6)


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 10_000), st.integers(1, 150), st.floats(2, 8))
def test_the_greedy_is_close_to_the_integer_program(seed: int, items: int, mean_bits: float) -> None:
    errors, weights = problem(seed, items)
    budget = mean_bits * weights.sum()
    exact = solve_budget(errors, weights, WIDTHS, budget, "milp")
    greedy = solve_budget(errors, weights, WIDTHS, budget, "hull")
    assert bits(weights, greedy) <= budget
    largest_step = (errors[:, 0] - errors.min(axis=1)).max()
    assert total(errors, exact) * (1 - 1e-5) <= total(errors, greedy) <= total(errors, exact) + largest_step
    if items >= 50:
        assert total(errors, greedy) <= 1.05 * total(errors, exact)


@pytest.mark.parametrize("method", ["milp", "hull"])
def test_the_choice_follows_the_items(method: module.Method) -> None:
    errors, weights = problem(3, 40)
    choice = solve_budget(errors, weights, WIDTHS, 3.1 * weights.sum(), method)
    order = np.random.default_rng(0).permutation(40)
    permuted = solve_budget(errors[order], weights[order], WIDTHS, 3.1 * weights.sum(), method)
    assert permuted.tolist() == choice[order].tolist()


@pytest.mark.parametrize("method", ["milp", "hull"])
def test_extremes(method: module.Method) -> None:
    errors, weights = problem(1, 6)
    assert solve_budget(errors, weights, WIDTHS, 2 * weights.sum(), method).tolist() == [0] * 6
    wide = solve_budget(errors, weights, WIDTHS, 8 * weights.sum(), method)
    assert wide.tolist() == errors.argmin(axis=1).tolist()
    assert solve_budget(np.zeros((3, 4)), weights[:3], WIDTHS, 1e9, method).tolist() == [0, 0, 0]


def test_auto_takes_the_greedy_for_many_items(monkeypatch: pytest.MonkeyPatch) -> None:
    errors, weights = problem(2, 12)
    exact = solve_budget(errors, weights, WIDTHS, 3 * weights.sum())
    assert exact.tolist() == solve_budget(errors, weights, WIDTHS, 3 * weights.sum(), "milp").tolist()
    monkeypatch.setattr(module, "MILP_ITEMS", 11)
    monkeypatch.setattr(module, "milp", None)
    greedy = solve_budget(errors, weights, WIDTHS, 3 * weights.sum())
    assert greedy.tolist() == solve_budget(errors, weights, WIDTHS, 3 * weights.sum(), "hull").tolist()


@pytest.mark.parametrize("answer", [None, np.tile([0.0, 0, 0, 1], 12)])  # no solution, one beyond the budget
def test_the_greedy_stands_in_for_a_solver_that_fails(monkeypatch: pytest.MonkeyPatch, answer: object) -> None:
    errors, weights = problem(2, 12)
    greedy = solve_budget(errors, weights, WIDTHS, 3 * weights.sum(), "hull")
    monkeypatch.setattr(module, "milp", lambda *args, **kwargs: SimpleNamespace(x=answer))
    assert solve_budget(errors, weights, WIDTHS, 3 * weights.sum(), "milp").tolist() == greedy.tolist()


def test_convex_hull_worked_examples() -> None:
    assert convex_hull([2, 4, 6, 8], [16, 4, 1, 0]) == [0, 1, 2, 3]
    assert convex_hull([2, 4, 6, 8], [16, 15, 1, 0]) == [0, 2, 3]  # 4 bits save little: go straight to 6
    assert convex_hull([2, 4, 6, 8], [16, 20, 4, 4]) == [0, 2]  # no step without a gain
    assert convex_hull([2, 4, 6, 8], [1, 2, 3, 4]) == [0]


def test_solve_budget_refuses_what_has_no_answer() -> None:
    errors, weights = problem(0, 3)
    with pytest.raises(ValueError, match=r"`total_bits` must be at least .* \(2 bits for each weight\), got 5"):
        solve_budget(errors, weights, WIDTHS, 5)
    errors[1, 2] = np.nan
    errors[0, 0] = -1
    with pytest.raises(ValueError, match=r"`errors` must be finite and not negative, got 1 non-finite and 1 negative"):
        solve_budget(errors, weights, WIDTHS, 8 * weights.sum())


def test_relative_errors_worked_example() -> None:
    layer = make_layer(experts=2, datasets=3)
    name = "up_proj"
    layer = replace(
        layer,
        signal={name: torch.tensor([[1.0, 3], [5, 5], [0, 0]])},
        errors={
            name: {
                2: torch.tensor([[0.4, 1.2], [1, 3], [0, 0]]),
                4: torch.tensor([[0.0, 0.4], [0, 1], [0, 0]]),
            }
        },
    )
    # relative to 4 and 10 (the third is silent): width 2: 0.1 + 0.1, 0.3 + 0.3; width 4: 0, 0.1 + 0.1
    plain = torch.tensor([[0.2, 0], [0.6, 0.2]], dtype=torch.float64)
    torch.testing.assert_close(relative_errors(layer, name, (2, 4), 0.0), plain)
    # half of the mean of each width, 0.4 and 0.1
    insured = plain + torch.tensor([0.2, 0.05])
    torch.testing.assert_close(relative_errors(layer, name, (2, 4), 0.5), insured)
    sensitive = replace(layer, sensitivity=3.0)
    torch.testing.assert_close(relative_errors(sensitive, name, (2, 4), 0.5), 3 * insured)


def test_relative_errors_names_what_was_not_measured() -> None:
    layer = make_layer()
    with pytest.raises(
        ValueError,
        match=r"needs the measured `errors` and `signal` of linear 'down_proj' in layer 'layers.0.mlp'",
    ):
        relative_errors(replace(layer, errors=None), "down_proj", WIDTHS, 0.3)
    assert layer.errors is not None
    some = {name: {2: table[2]} for name, table in layer.errors.items()}
    with pytest.raises(ValueError, match=r"needs `errors` at the widths \[2, 4, 6, 8\] .* got errors at \[2\]"):
        relative_errors(replace(layer, errors=some), "down_proj", WIDTHS, 0.3)
