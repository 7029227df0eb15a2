"""Router calibration: finding routers, the ridge fit, and a model that routes more as it did before."""

from typing import Any

import pytest
import tiny
import torch
from architectures import architecture_names, build
from torch import Tensor, nn

from moe_compiler import dynamo_compile
from moe_compiler.passes.capture import capture_moe_blocks
from moe_compiler.passes.router import RouterCalibration, find_router, fit_router, mixed_batch

DATA = {"a": tiny.tokens(6, 32, seed=1), "b": tiny.tokens(6, 32, seed=2)}


@torch.no_grad()
def logits_of(model: Any, ids: Tensor) -> list[Tensor]:
    """The routing logits of every layer."""
    return list(model(input_ids=ids, output_router_logits=True).router_logits)


@pytest.mark.parametrize("name", ["olmoe", "qwen2_moe", "deepseek_v3", "gpt_oss", "granitemoe"])
def test_the_router_is_found_in(name: str) -> None:
    assert name in architecture_names()
    for block in capture_moe_blocks(build(name)).values():
        router = find_router(block)
        assert router is not None
        assert router.get_parameter("weight").shape[0] == block.spec.num_experts


def test_where_the_router_lies_outside_the_block_nothing_is_found() -> None:
    for block in capture_moe_blocks(build("gemma4")).values():
        assert find_router(block) is None


@torch.no_grad()
def test_a_fit_recovers_logits_that_a_linear_map_of_the_inputs_can_give() -> None:
    generator = torch.Generator().manual_seed(0)
    original = torch.randn(400, 16, generator=generator)
    shifted = original @ (torch.eye(16) + 0.1 * torch.randn(16, 16, generator=generator))
    router = nn.Linear(16, 4, bias=False)
    wanted = original @ router.weight.T
    change = fit_router(router, original, shifted, "mlp")
    torch.testing.assert_close(shifted @ router.weight.T, wanted, atol=5e-3, rtol=0)
    assert change.after < 0.02 * change.before


@torch.no_grad()
def test_a_router_that_sees_what_it_saw_stays_as_it_is() -> None:
    rows = torch.randn(50, 16, generator=torch.Generator().manual_seed(1))
    router = nn.Linear(16, 4, bias=False)
    before = router.weight.clone()
    change = fit_router(router, rows, rows.clone(), "mlp")
    assert torch.equal(router.weight, before)
    assert change.before == change.after == 0


def test_fewer_tokens_than_channels_do_not_throw_the_router_off() -> None:
    generator = torch.Generator().manual_seed(2)
    original = torch.randn(4, 64, generator=generator)
    router = nn.Linear(64, 8, bias=False)
    before = router.weight.detach().clone()
    with torch.no_grad():
        fit_router(router, original, original + 0.1 * torch.randn(4, 64, generator=generator), "mlp")
    assert float((router.weight.detach() - before).norm()) < 0.5 * float(before.norm())


def test_inputs_that_are_not_finite_are_an_error() -> None:
    router = nn.Linear(2, 2, bias=False)
    before = router.weight.detach().clone()
    with pytest.raises(FloatingPointError, match=r"router in MoE block `layers\.3\.mlp` must be finite"):
        fit_router(router, torch.ones(3, 2), torch.full((3, 2), torch.nan), "layers.3.mlp")
    assert torch.equal(router.weight, before)


def test_a_batch_takes_turns_among_datasets_and_the_most_frequent_length() -> None:
    short, long = [torch.tensor([i, i]) for i in range(3)], [torch.tensor([9, 9, 9])]
    batch = mixed_batch({"a": short, "b": [torch.tensor([7, 7]), *long]}, max_tokens=6)
    assert batch.tolist() == [[0, 0], [7, 7], [1, 1]]
    assert mixed_batch({"a": short}, max_tokens=1).tolist() == [[0, 0]]


def test_compiling_refits_the_routers_and_says_so() -> None:
    ids = torch.cat(list(DATA.values()))
    original = logits_of(tiny.olmoe(), ids)
    distance = []
    for tokens in (0, 8192):
        model = dynamo_compile(
            tiny.olmoe(),
            DATA,
            strategy="uniform",
            uniform_bits=2,
            target_bits=None,
            progress=False,
            router_tokens=tokens,
        )
        distance.append(float((logits_of(model, ids)[1] - original[1]).square().mean()))
        assert len(model.moe_report.routers) == (2 if tokens else 0)
    assert distance[1] < 0.9 * distance[0]
    first, second = model.moe_report.routers.values()
    assert first[0] == first[1] == 0  # nothing is quantized before the first router
    assert second[1] < second[0]


def test_hooks_are_gone_afterwards() -> None:
    model = tiny.olmoe()
    calibration = RouterCalibration(model, capture_moe_blocks(model), {"a": list(DATA["a"])}, 64)
    assert all(change.after == 0 for change in calibration.refit().values())
    assert not any(module._forward_pre_hooks for module in model.modules())
