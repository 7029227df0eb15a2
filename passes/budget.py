"""Choosing a width for every item so that the summed error is least under a budget of bits.

An item is one expert's linear. This is the multiple-choice knapsack problem; `solve_budget` solves it as an
integer program (HiGHS, through `scipy.optimize.milp`) or by the greedy on the lower convex hulls of the
items' errors.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Literal, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import coo_array
from torch import Tensor

from moe_compiler.passes.significance import ordered_sum
from moe_compiler.passes.statistics import LayerEvidence

Method = Literal["auto", "milp", "hull"]
Errors = NDArray[np.float64]
Choice = NDArray[np.int64]
Number = TypeVar("Number", bound=np.generic)

MILP_ITEMS = 20_000  # above, `auto` takes the greedy: the integer program of 12,000 items takes seconds
RELATIVE_GAP = 1e-6  # HiGHS may stop this close to the optimum


def relative_errors(evidence: LayerEvidence, linear: str, widths: Sequence[int], insurance: float) -> Tensor:
    """Return the error of each expert of a linear at each width, summed over datasets, with insurance.

    `sensitivity · Σ_d errors[width][d, e] / Σ_e' signal[d, e']` is the expert's share of the linear's relative
    squared output error (dimensionless), so that every dataset weighs the same whatever its number of tokens,
    times what such an error costs in this layer (see `moe_compiler.passes.sensitivity`). A dataset without
    signal is left out. Our decision: *insurance* adds `insurance` times the mean of that over
    the experts, at that width: an allocation fitted to the datasets seen starves the experts that only unseen
    data use. The experts of a linear have equally many weights, so that each weight is insured alike.

    Returns:
        `(E, c)` float64.

    Raises:
        ValueError: if the errors or the signal were not measured, or not at one of the widths.
    """
    where = f"of linear {linear!r} in layer {evidence.path!r}"
    if evidence.errors is None or evidence.signal is None:
        raise ValueError(
            f"the strategy 'budget' needs the measured `errors` and `signal` {where}; the evidence has none"
        )
    measured = evidence.errors.get(linear, {})
    missing = [width for width in widths if width not in measured]
    if missing or linear not in evidence.signal:
        raise ValueError(
            f"the strategy 'budget' needs `errors` at the widths {list(widths)} and `signal` {where}, "
            f"got errors at {sorted(measured)}"
        )
    signal = ordered_sum(evidence.signal[linear].double())[:, None]  # (n, 1)
    columns = []
    for width in widths:
        share = torch.where(signal > 0, measured[width].double() / torch.where(signal > 0, signal, 1.0), 0.0)
        per_expert = ordered_sum(share.T)
        columns.append(per_expert + insurance * ordered_sum(per_expert) / per_expert.numel())
    return evidence.sensitivity * torch.stack(columns, dim=1)


def solve_budget(
    errors: Errors, weights: Choice, widths: Sequence[int], total_bits: float, method: Method = "auto"
) -> Choice:
    """Choose a width for each item with the least summed error within a budget of bits.

    Our decision, after MC-MoE, GEMQ and MxMoE, which allocate bits to experts by integer programs; neither
    DynaMo nor MoQa has a global budget. The integer program is exact up to a relative gap of 1e-6 (should
    HiGHS find nothing better than the greedy, the greedy counts); the greedy takes the steps along the convex
    hulls by error saved per bit, and is worse than the optimum by no more than what the first step that it
    could not afford would have saved. Both end by spending what is left where it still lowers the error.
    Items are put in a canonical order first: the choice does not depend on the order they come in, up to
    items that are equal.

    Args:
        errors: `(items, c)`, the error of each item at each width, finite and not negative.
        weights: `(items,)`, weights of each item (an item costs `weights·width` bits).
        widths: the `c` widths, ascending, in bits.
        total_bits: the budget in bits.
        method: `milp`, `hull`, or `auto`: the integer program for up to 20,000 items, else the greedy.

    Returns:
        `(items,)` the index of each item's width.

    Raises:
        ValueError: if an error is negative or not finite, or the budget is below the narrowest width
            everywhere.
    """
    if not bool(np.isfinite(errors).all()) or bool((errors < 0).any()):
        raise ValueError(
            "`errors` must be finite and not negative, got "
            f"{int((~np.isfinite(errors)).sum())} non-finite and {int((errors < 0).sum())} negative ones"
        )
    least = int(weights.sum()) * widths[0]
    if total_bits < least:
        raise ValueError(
            f"`total_bits` must be at least {least} ({widths[0]} bits for each weight), got {total_bits:.10g}"
        )
    order = np.lexsort((*errors.T[::-1], weights))
    unit = math.gcd(*(int(weight) for weight in weights))
    cost = (weights[order] // unit)[:, None] * np.asarray(widths, dtype=np.int64)
    capacity = math.floor(total_bits / unit)
    use_milp = method == "milp" or (method == "auto" and len(weights) <= MILP_ITEMS)
    solve = _integer_program if use_milp else _hull_greedy
    choice = _spend_rest(errors[order], cost, capacity, solve(errors[order], cost, capacity))
    result = np.empty_like(choice)
    result[order] = choice
    return result


def convex_hull(cost: Sequence[int], error: Sequence[float]) -> list[int]:
    """Find the lower convex hull of one item's (cost, error) points, from the cheapest on.

    Args:
        cost: ascending.
        error: at each cost.

    Returns:
        Indices, the first is 0; errors fall strictly and each step saves less error per unit of cost than the
        last.
    """
    hull = [0]
    for i in range(1, len(cost)):
        if error[i] >= error[hull[-1]]:
            continue
        while len(hull) > 1:
            a, b = hull[-2], hull[-1]
            if (error[a] - error[b]) * (cost[i] - cost[b]) > (error[b] - error[i]) * (cost[b] - cost[a]):
                break
            hull.pop()
        hull.append(i)
    return hull


def _hull_greedy(errors: Errors, cost: Choice, capacity: int) -> Choice:
    steps: list[tuple[float, int, int, int]] = []  # (− error saved per cost, item, from, to)
    for item, (item_cost, item_error) in enumerate(zip(cost.tolist(), errors.tolist(), strict=True)):
        hull = convex_hull(item_cost, item_error)
        for a, b in pairwise(hull):
            steps.append(((item_error[b] - item_error[a]) / (item_cost[b] - item_cost[a]), item, a, b))
    choice = np.zeros(len(cost), dtype=np.int64)
    left = capacity - int(cost[:, 0].sum())
    for _, item, a, b in sorted(steps):
        price = int(cost[item, b] - cost[item, a])
        if choice[item] == a and price <= left:
            choice[item] = b
            left -= price
    return choice


def _integer_program(errors: Errors, cost: Choice, capacity: int) -> Choice:
    greedy = _hull_greedy(errors, cost, capacity)
    items, count = errors.shape
    scale = errors.max()
    if scale == 0:
        return greedy
    variable = np.arange(items * count)
    rows = np.concatenate([variable // count, np.full(items * count, items)])
    values = np.concatenate([np.ones(items * count), cost.ravel().astype(np.float64)])
    matrix = coo_array((values, (rows, np.concatenate([variable, variable])))).tocsr()
    lower = np.concatenate([np.ones(items), [-np.inf]])
    upper = np.concatenate([np.ones(items), [float(capacity)]])
    solution = milp(
        (errors / scale).ravel(),
        integrality=np.ones(items * count),
        bounds=Bounds(0, 1),
        constraints=LinearConstraint(matrix, lower, upper),
        options={"mip_rel_gap": RELATIVE_GAP},
    )
    if solution.x is None:
        return greedy
    choice: Choice = solution.x.reshape(items, count).argmax(axis=1)
    # HiGHS works to tolerances: its answer counts if it is within the budget and no worse than the greedy.
    affordable = int(_picked(cost, choice).sum()) <= capacity
    better = _picked(errors, choice).sum() <= _picked(errors, greedy).sum()
    return choice if affordable and better else greedy


def _spend_rest(errors: Errors, cost: Choice, capacity: int, choice: Choice) -> Choice:
    """Raise items, the most error saved per bit first, while any rise that is affordable lowers the error."""
    choice = choice.copy()
    while True:
        extra = cost - _picked(cost, choice)[:, None]
        saved = _picked(errors, choice)[:, None] - errors
        usable = (extra > 0) & (extra <= capacity - int(_picked(cost, choice).sum())) & (saved > 0)
        if not usable.any():
            return choice
        rate = np.where(usable, saved / np.where(usable, extra, 1), -1.0)
        item, index = divmod(int(rate.argmax()), errors.shape[1])
        choice[item] = index


def _picked(table: NDArray[Number], choice: Choice) -> NDArray[Number]:
    return np.take_along_axis(table, choice[:, None], axis=1)[:, 0]
