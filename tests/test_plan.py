"""The precision plan: its averages by hand, JSON both ways, what it refuses."""

import json
from dataclasses import replace
from typing import Any

import pytest

from moe_compiler.passes.plan import LayerPlan, PrecisionPlan

LAYER = LayerPlan(
    path="layers.1.mlp",
    bits={"up_proj": (2, 4, 8), "down_proj": (2, 2, 6)},
    shapes={"up_proj": (10, 20), "down_proj": (20, 5)},
    overhead_bits={"up_proj": 0.25, "down_proj": 0.4},
    clusters=(0, 1, 3),
    channels={"up_proj": (0, 1, 2), "down_proj": (0, 0, 1)},
    notes={"pattern": 1, "centers": (0.1, 0.5), "rule": "x", "cv": 0.7},
)
SMALL = LayerPlan("layers.2.mlp", {"up_proj": (4,)}, {"up_proj": (10, 10)}, {"up_proj": 0.1})
PLAN = PrecisionPlan(
    "moqa",
    {LAYER.path: LAYER, SMALL.path: SMALL},
    target_bits=4.5,
    options={"widths": (2, 4), "seed": 0, "x": None},
)


def test_averages_weigh_by_the_number_of_weights() -> None:
    # up: 200 weights an expert at 14 bits together, down: 100 at 10; 900 weights in all
    assert LAYER.num_experts == 3
    assert LAYER.num_weights == 900
    assert LAYER.code_bits == pytest.approx((200 * 14 + 100 * 10) / 900)
    assert LAYER.mean_overhead_bits == pytest.approx(0.3)  # (2·0.25 + 0.4) / 3
    assert LAYER.effective_bits == pytest.approx(LAYER.code_bits + 0.3)
    assert PLAN.num_weights == 1000
    assert PLAN.code_bits == pytest.approx((3800 + 400) / 1000)
    assert PLAN.effective_bits == pytest.approx(4.2 + (900 * 0.3 + 100 * 0.1) / 1000)
    assert PLAN.histogram() == pytest.approx({2: 0.4, 4: 0.3, 6: 0.1, 8: 0.2})


def test_json_both_ways() -> None:
    assert PrecisionPlan.from_dict(json.loads(json.dumps(PLAN.to_dict()))) == PLAN
    assert list(PLAN.to_dict()["layers"][0]["bits"]) == ["up_proj", "down_proj"]


def test_three_bits_are_not_packable() -> None:
    assert PLAN.is_packable
    three = replace(SMALL, bits={"up_proj": (3,)})
    assert not PrecisionPlan("uniform", {three.path: three}).is_packable


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"bits": {"up_proj": (2, 4, 8)}},
            r"must name the same linears, got \['up_proj'\], \['down_proj', 'up_proj'\]",
        ),
        (
            {"bits": {"up_proj": (2, 4, 8), "down_proj": (2, 2)}},
            r"one entry per expert everywhere, got lengths \[3, 2",
        ),
        ({"clusters": (0, 1)}, r"layer 'layers.1.mlp' must have one entry per expert"),
        (
            {"bits": {"up_proj": (2, 4, 5), "down_proj": (7, 2, 6)}},
            r"must be among \(2, 3, 4, 6, 8\), got \[5, 7\]",
        ),
    ],
)
def test_a_layer_refuses_what_does_not_fit_together(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(LAYER, **change)


def test_a_plan_refuses_what_it_cannot_read() -> None:
    with pytest.raises(ValueError, match=r"`layers` must hold at least one MoE block, got none"):
        PrecisionPlan("uniform", {})
    with pytest.raises(ValueError, match=r"`format_version` of a precision plan must be 1, got 9"):
        PrecisionPlan.from_dict({**PLAN.to_dict(), "format_version": 9})
    data = PLAN.to_dict()
    del data["layers"][0]["shapes"]
    with pytest.raises(ValueError, match=r"the precision plan lacks the field 'shapes'"):
        PrecisionPlan.from_dict(data)
