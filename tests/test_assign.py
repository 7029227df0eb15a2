"""The allocation strategies through `assign`: what holds for each, worked examples, and what is refused."""

import json
from dataclasses import replace
from typing import Any

import pytest
import torch
from allocation_cases import make_block, make_layer, permute_datasets, permute_experts
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_compiler.passes.assign import assign
from moe_compiler.passes.budget import relative_errors
from moe_compiler.passes.plan import PrecisionPlan
from moe_compiler.passes.significance import expert_significance, fit_joint_distribution, layer_significance
from moe_compiler.passes.statistics import LayerEvidence
from moe_compiler.passes.strategies import STRATEGIES, pool_statistics

EVIDENCE = [make_layer(seed, path=f"layers.{seed}.mlp", experts=16) for seed in range(3)]
OVERHEAD = (0.25 * 24 * 16 + 0.5 * 16 * 12) / (24 * 16 + 16 * 12)  # bits per weight, the same in every layer
RANKED = ["dynamo", "pooled", "moqa"]
seeds = st.integers(0, 10_000)


def with_loads(*loads: list[int], experts: int) -> LayerEvidence:
    """A layer in which significance is the share of the load: one linear, one channel, norms of one."""
    return LayerEvidence(
        path="mlp",
        statistics={
            f"data{i}": make_block({"up_proj": [[float(x)] for x in load]}, load, tokens=sum(load), top_k=1)
            for i, load in enumerate(loads)
        },
        column_norm={"up_proj": torch.ones(experts, 1)},
        shapes={"up_proj": (1, 1)},
        overhead_bits={"up_proj": 0.5},
    )


@pytest.mark.parametrize("strategy", STRATEGIES)
@settings(max_examples=10, deadline=None)
@given(seeds, st.integers(1, 20), st.floats(2.4, 9))
def test_no_plan_exceeds_its_target(strategy: str, seed: int, experts: int, target: float) -> None:
    evidence = [make_layer(seed + i, path=f"mlp{i}", experts=experts) for i in range(2)]
    plan = assign(evidence, strategy, target_bits=target)
    assert plan.effective_bits <= target + 1e-6
    assert plan.is_packable
    assert list(plan.layers) == ["mlp0", "mlp1"]
    assert plan.layers["mlp0"].effective_bits - plan.layers["mlp0"].code_bits == pytest.approx(OVERHEAD)
    assert PrecisionPlan.from_dict(json.loads(json.dumps(plan.to_dict()))) == plan


@pytest.mark.parametrize("strategy", ["dynamo", "pooled", "moqa", "random", "budget"])
def test_a_plan_comes_as_close_as_one_expert_allows(strategy: str) -> None:
    for target in (2.4, 2.75, 3.1, 4.0):
        plan = assign(EVIDENCE, strategy, target_bits=target)
        assert target - 2 / 16 < plan.effective_bits <= target + 1e-6


@pytest.mark.parametrize("strategy", sorted(set(STRATEGIES) - {"random"}))
@pytest.mark.parametrize("target", [None, 3.3])
@settings(max_examples=5, deadline=None)
@given(seeds)
def test_plans_follow_experts_and_ignore_the_order_of_datasets(strategy: str, target: float | None, seed: int) -> None:
    options: dict[str, Any] = {"target_bits": target, "uniform_bits": 4 if target is None else None}
    if strategy == "budget" and target is None:
        options["target_bits"] = 2.6
    evidence = [make_layer(seed + i, path=f"mlp{i}", experts=9) for i in range(2)]
    plan = assign(evidence, strategy, **options)
    order = torch.randperm(9, generator=torch.Generator().manual_seed(seed))
    renumbered = assign([permute_experts(evidence[0], order), evidence[1]], strategy, **options)
    for name, widths in plan.layers["mlp0"].bits.items():
        assert renumbered.layers["mlp0"].bits[name] == tuple(widths[i] for i in order)
    assert renumbered.layers["mlp1"].bits == plan.layers["mlp1"].bits
    reordered = assign([permute_datasets(layer, (2, 0, 1)) for layer in evidence], strategy, **options)
    assert [layer.bits for layer in reordered.layers.values()] == [layer.bits for layer in plan.layers.values()]


@pytest.mark.parametrize("strategy", RANKED)
@pytest.mark.parametrize("target", [None, 2.9, 4.7])
@settings(max_examples=5, deadline=None)
@given(seeds)
def test_a_more_significant_expert_never_gets_fewer_bits(strategy: str, target: float | None, seed: int) -> None:
    layer = make_layer(seed, experts=16)
    if strategy == "dynamo":
        significance = fit_joint_distribution(layer_significance(layer)).baseline
    elif strategy == "pooled":
        significance = expert_significance(pool_statistics(layer), layer.column_norm)
    else:
        significance = pool_statistics(layer).token_mass
    plan = assign([layer], strategy, target_bits=target).layers[layer.path]
    assert plan.bits["gate_up_proj"] == plan.bits["down_proj"]
    widths = torch.tensor(plan.bits["down_proj"])[significance.argsort()]
    assert bool((widths.diff() >= 0).all())


def test_dynamo_worked_example() -> None:
    # four groups of loads, on both datasets the same but for their size: centres are 2, 4, 6, 8 bits
    layer = with_loads([800, 10, 11, 401, 201, 12, 200, 402], [1600, 20, 22, 802, 402, 24, 400, 804], experts=8)
    plan = assign([layer], "dynamo").layers["mlp"]
    assert plan.bits["up_proj"] == (8, 2, 2, 6, 4, 2, 4, 6)
    assert plan.clusters == (3, 0, 0, 2, 1, 0, 1, 2)
    assert plan.effective_bits == pytest.approx(34 / 8 + 0.5)
    assert plan.notes["dataset_weights"] == pytest.approx((0.5, 0.5))


def test_a_target_moves_the_boundaries_of_dynamo_both_ways() -> None:
    layer = with_loads([800, 10, 11, 401, 201, 12, 200, 402], experts=8)
    free = torch.tensor(assign([layer], "dynamo").layers["mlp"].bits["up_proj"])
    previous = torch.full((8,), 2)
    for code_bits in (2.0, 2.75, 3.25, 4.25, 5.0, 6.5, 8.0):
        plan = assign([layer], "dynamo", target_bits=code_bits + 0.5).layers["mlp"]
        widths = torch.tensor(plan.bits["up_proj"])
        assert plan.code_bits == pytest.approx(code_bits)
        assert bool((widths >= previous).all())
        if code_bits == 4.25:
            assert torch.equal(widths, free)
        previous = widths


def test_the_overlap_moves_experts_down() -> None:
    bits = [assign(EVIDENCE, "dynamo", overlap=overlap).code_bits for overlap in (0.0, 0.2, 0.6, 1.0)]
    assert bits == sorted(bits, reverse=True)
    assert bits[0] > bits[-1]


def test_dynamo_and_pooled_differ_where_a_large_dataset_drowns_a_small_one() -> None:
    # expert 0 carries the large dataset and expert 1 the small one; expert 2 half of each
    layer = with_loads([6000, 1000, 5000], [1, 6, 5], experts=3)
    pooled = assign([layer], "pooled", widths=(2, 8)).layers["mlp"]
    assert pooled.bits["up_proj"] == (8, 2, 8)
    dynamo = assign([layer], "dynamo", widths=(2, 8), target_bits=4.5).layers["mlp"]
    assert dynamo.bits["up_proj"] == (2, 2, 8)


def test_pooling_adds_all_but_the_hessians() -> None:
    layer = with_loads([6, 2], [1, 3], experts=2)
    linear = replace(layer.statistics["data0"].linears["up_proj"], hessian=torch.ones(2, 1, 1))
    blocks = [replace(block, linears={"up_proj": linear}) for block in layer.statistics.values()]
    pooled = pool_statistics(replace(layer, statistics=dict(zip("ab", blocks, strict=True))))
    assert pooled.count.tolist() == [7, 5]
    assert pooled.linears["up_proj"].abs_sum.tolist() == [[12.0], [4.0]]
    assert pooled.linears["up_proj"].hessian is None


def test_layers_with_equal_experts_get_one_width() -> None:
    layer = with_loads([5] * 6, experts=6)
    assert assign([layer], "dynamo").histogram() == {2: 1.0}
    assert assign([layer], "dynamo", target_bits=5).histogram() == {4: 1.0}
    assert assign([layer], "moqa").histogram() == {4: 1.0}
    empty = with_loads([0] * 6, experts=6)
    assert assign([empty], "pooled", target_bits=6.5).histogram() == {6: 1.0}
    assert assign([empty], "moqa", target_bits=4.4).histogram() == {2: 1.0}


def test_moqa_worked_example() -> None:
    # S_E is 0.05, 0.1, 0.3, 0.55: pattern 1, mean 0.25
    layer = replace(with_loads([5, 10, 30, 55], experts=4), shapes={"up_proj": (8, 1000)})
    plan = assign([layer], "moqa").layers["mlp"]
    assert plan.bits["up_proj"] == (2, 2, 4, 4)
    assert plan.notes["pattern"] == 1
    assert plan.notes["partition_threshold"] == pytest.approx(0.25)
    # 2 % of 1000 channels in the most significant expert, 0.3/0.55 of that in the next, no others
    assert plan.channels == {"up_proj": (0, 0, 11, 20)}
    shifted = assign([layer], "moqa", target_bits=3.0, channel_fraction=0.1).layers["mlp"]
    assert shifted.bits["up_proj"] == (2, 2, 2, 4)
    assert shifted.channels == {"up_proj": (0, 0, 0, 100)}
    assert assign([layer], "moqa", pattern_threshold=2).layers["mlp"].notes["pattern"] == 2
    wider = assign([layer], "moqa", widths=(4, 8)).layers["mlp"]
    assert wider.bits["up_proj"] == (4, 4, 8, 8)
    assert wider.channels is None


@pytest.mark.parametrize("width", [2, 3, 4, 6, 8])
def test_uniform_is_one_width(width: int) -> None:
    plan = assign(EVIDENCE, "uniform", uniform_bits=width)
    assert plan.histogram() == {width: 1.0}
    assert plan.effective_bits == pytest.approx(width + OVERHEAD)
    assert plan.is_packable == (width != 3)


def test_uniform_takes_the_widest_that_meets_the_target() -> None:
    assert assign(EVIDENCE, "uniform", target_bits=6 + OVERHEAD).histogram() == {6: 1.0}
    assert assign(EVIDENCE, "uniform", target_bits=5.9 + OVERHEAD).histogram() == {4: 1.0}
    assert assign(EVIDENCE, "uniform", target_bits=4, uniform_bits=3).histogram() == {3: 1.0}


def test_random_takes_half_of_the_experts() -> None:
    plan = assign(EVIDENCE, "random")
    assert plan.histogram() == {2: 0.5, 4: 0.5}
    assert plan == assign(EVIDENCE, "random")
    assert plan.layers["layers.1.mlp"] == assign(EVIDENCE[1:2], "random").layers["layers.1.mlp"]
    assert plan.layers != assign(EVIDENCE, "random", seed=1).layers
    assert plan.layers["layers.0.mlp"].bits != plan.layers["layers.1.mlp"].bits
    assert assign([make_layer(experts=5)], "random").histogram() == {2: 0.6, 4: 0.4}
    assert assign(EVIDENCE, "random", target_bits=2.5 + OVERHEAD).histogram() == {2: 0.75, 4: 0.25}


def test_budget_beats_every_other_strategy_at_its_own_measure() -> None:
    def measured(plan: PrecisionPlan) -> float:
        error = 0.0
        for layer in EVIDENCE:
            assert layer.errors is not None
            assert layer.signal is not None
            for name, widths in plan.layers[layer.path].bits.items():
                whole = layer.signal[name].sum(dim=1)
                error += sum((layer.errors[name][b][:, e] / whole).sum().item() for e, b in enumerate(widths))
        return error

    for target in (2.6, 3.3, 4.5):
        least = measured(assign(EVIDENCE, "budget", target_bits=target, insurance=0.0))
        for strategy in ("dynamo", "pooled", "moqa", "random", "uniform"):
            assert least <= measured(assign(EVIDENCE, strategy, target_bits=target)) + 1e-9


def test_insurance_trades_the_error_seen_for_the_mean_error() -> None:
    def seen_and_mean(insurance: float) -> tuple[float, float]:
        plan = assign(EVIDENCE, "budget", target_bits=3.3, insurance=insurance)
        seen = mean = 0.0
        for layer in EVIDENCE:
            for name, widths in plan.layers[layer.path].bits.items():
                errors = relative_errors(layer, name, (2, 4, 6, 8), 0.0)
                chosen = [width // 2 - 1 for width in widths]
                seen += errors[range(16), chosen].sum().item()
                mean += errors.mean(dim=0)[chosen].sum().item()
        return seen, mean

    seen, mean = zip(*(seen_and_mean(insurance) for insurance in (0.0, 0.3, 3.0, 1000.0)), strict=True)
    assert list(seen) == sorted(seen)
    assert list(mean) == sorted(mean, reverse=True)
    assert seen[0] < seen[-1]


def test_the_plan_records_its_options() -> None:
    plan = assign(EVIDENCE, "budget", target_bits=3.3, insurance=0.1, widths=[4, 2])
    assert plan.strategy == "budget"
    assert plan.target_bits == 3.3
    assert plan.options["widths"] == (2, 4)
    assert plan.options["insurance"] == 0.1


@pytest.mark.parametrize(
    ("strategy", "options", "message"),
    [
        ("best", {}, r"`strategy` must be one of \['budget', 'dynamo', .*\], got 'best'"),
        (
            "dynamo",
            {"widths": (2, 3)},
            r"`widths` must be different widths among \(2, 4, 6, 8\), got \[2, 3\]",
        ),
        ("dynamo", {"widths": (2, 2)}, r"`widths` must be different widths .* got \[2, 2\]"),
        ("dynamo", {"widths": ()}, r"`widths` must be different widths .* got \[\]"),
        (
            "moqa",
            {"widths": (2, 4, 8)},
            r"`widths` of the strategy 'moqa' must be two widths, got \[2, 4, 8\]",
        ),
        ("uniform", {"uniform_bits": 5}, r"`uniform_bits` must be among \(2, 3, 4, 6, 8\), got 5"),
        ("uniform", {}, r"the strategy 'uniform' needs `uniform_bits` or `target_bits`, got neither"),
        ("budget", {}, r"`target_bits` is required by the strategy 'budget'"),
        (
            "dynamo",
            {"target_bits": float("nan")},
            r"`target_bits` must be a positive, finite number of bits, got nan",
        ),
        ("dynamo", {"overlap": -0.1}, r"`overlap` must be in \[0, 1\], got -0.1"),
        ("moqa", {"channel_fraction": 2}, r"`channel_fraction` must be in \[0, 1\], got 2"),
        ("budget", {"target_bits": 3, "insurance": -1}, r"`insurance` must be finite and at least 0, got -1"),
        ("moqa", {"pattern_threshold": -1}, r"`pattern_threshold` must be finite and at least 0, got -1"),
        (
            "dynamo",
            {"target_bits": 2.3},
            r"`target_bits` must be at least 2.33333 effective bits in layer 'layers.0",
        ),
        (
            "pooled",
            {"target_bits": 2.3},
            r"\(codes of 2 bits and 0.333333 bits of overhead per weight\), got 2.3",
        ),
        ("moqa", {"target_bits": 4, "widths": (4, 8)}, r"at least 4.33333 effective bits in layer"),
        ("random", {"target_bits": 2.3}, r"at least 2.33333 effective bits in layer"),
        ("budget", {"target_bits": 2.3}, r"at least 2.33333 effective bits over the model"),
        (
            "uniform",
            {"target_bits": 3, "uniform_bits": 4},
            r"at least 4.33333 effective bits for 4 bits everywhere",
        ),
    ],
)
def test_refuses_what_cannot_be_done(strategy: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        assign(EVIDENCE, strategy, **options)


def test_refuses_evidence_that_is_missing_or_double() -> None:
    with pytest.raises(ValueError, match=r"`evidence` must hold at least one MoE block and each block once, got \[\]"):
        assign([], "dynamo")
    with pytest.raises(ValueError, match=r"each block once, got \['layers.0.mlp', 'layers.0.mlp'\]"):
        assign([EVIDENCE[0], EVIDENCE[0]], "dynamo")
    with pytest.raises(ValueError, match=r"needs the measured `errors`"):
        assign([make_layer(measured=False)], "budget", target_bits=3)
