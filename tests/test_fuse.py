"""One operator for all experts of a layer, and shared experts among them."""

import copy
from typing import Any

import pytest
import torch
from architectures import architecture_names, build
from packed import random_packed
from test_lower import lower_and_reference, packed_linears, relative_error
from tiny import olmoe, qwen2_moe, tokens
from torch import nn

from moe_compiler.kernels import ops
from moe_compiler.kernels.shared import append_experts, split_shared
from moe_compiler.passes.base import run_passes
from moe_compiler.passes.capture import capture_moe_blocks
from moe_compiler.passes.fuse import FuseExperts, fusible_activation
from moe_compiler.passes.lower import LoweredExperts, lower_experts

FUSED_WITH_SHARED = ("deepseek_v3", "qwen2_moe", "hunyuan_v1_moe", "laguna")


def routing(experts: int, rows: int = 9) -> tuple[torch.Tensor, torch.Tensor]:
    index = torch.stack([torch.randperm(experts)[:2] for _ in range(rows)])
    return index, torch.rand(rows, 2)


def test_the_fused_graph_equals_the_unfused() -> None:
    model = olmoe()
    block = capture_moe_blocks(model)["model.layers.0.mlp"]
    unfused = lower_experts(block, packed_linears(block))
    fused = copy.deepcopy(unfused)
    assert fusible_activation(fused, block.spec) == "silu"
    run_passes(fused, [FuseExperts(block.spec)])
    assert [n.target for n in fused.graph.nodes if n.op == "call_function"] == [ops.packed_experts]
    hidden = torch.randn(9, 128)
    assert relative_error(fused(hidden, *routing(8)), unfused(hidden, *routing(8))) > 0.1
    index, weights = routing(8)
    assert relative_error(fused(hidden, index, weights), unfused(hidden, index, weights)) < 1e-6


@pytest.mark.parametrize("name", ["gpt_oss", "nemotron_h", "lfm2_moe"])
def test_experts_of_another_form_stay_unfused(name: str) -> None:
    if name not in architecture_names():
        name = "gpt_oss"
    block = next(iter(capture_moe_blocks(build(name)).values()))
    lowered = lower_experts(block, packed_linears(block))
    code = lowered.code
    assert fusible_activation(lowered, block.spec) is None
    assert lowered.code == code


@pytest.mark.parametrize(
    ("activation", "expected"),
    [
        (nn.SiLU(), "silu"),
        (nn.GELU(), "gelu"),
        (nn.GELU(approximate="tanh"), "gelu_tanh"),
        (nn.ReLU(), "relu"),
        (nn.Tanh(), None),
        (nn.PReLU(), None),
    ],
)
def test_the_activation_is_found_by_trying_it(activation: nn.Module, expected: str | None) -> None:
    model = olmoe()
    for module in model.modules():
        if hasattr(module, "act_fn"):
            module.act_fn = activation
    block = capture_moe_blocks(model)["model.layers.0.mlp"]
    assert fusible_activation(lower_experts(block, packed_linears(block)), block.spec) == expected


@pytest.mark.parametrize("name", [name for name in FUSED_WITH_SHARED if name in architecture_names()])
def test_shared_experts_run_as_routed_ones(name: str) -> None:
    lowered, reference = lower_and_reference(build(name), tokens(1, 4))
    experts = [module for module in lowered.modules() if isinstance(module, LoweredExperts)]
    assert experts
    for module in experts:
        shared = module.shared_packed()
        assert shared.keys() == module.all_packed().keys()
        assert {one.bits for one in shared.values()} == {(8,) * len(next(iter(shared.values())).bits)}
    assert not any("shared" in path and ".gate_proj" in path for path, _ in lowered.named_buffers())
    ids = tokens(2, 7)
    with torch.no_grad():
        assert relative_error(lowered(input_ids=ids).logits, reference(input_ids=ids).logits) < 1e-3
        half, half_reference = lowered.to(torch.bfloat16), reference.to(torch.bfloat16)
        assert relative_error(half(input_ids=ids).logits, half_reference(input_ids=ids).logits) < 5e-2


def test_a_shared_expert_of_several_sizes_is_split() -> None:
    config: dict[str, Any] = {"shared_expert_intermediate_size": 384}
    model = qwen2_moe(**config)
    lowered, reference = lower_and_reference(model, tokens(1, 4))
    experts = next(module for module in lowered.modules() if isinstance(module, LoweredExperts))
    assert len(experts.shared_packed()["down_proj"].bits) == 3
    ids = tokens(2, 7)
    with torch.no_grad():
        assert relative_error(lowered(input_ids=ids).logits, reference(input_ids=ids).logits) < 1e-3


@pytest.mark.parametrize("size", [96, 200])
def test_a_shared_expert_of_another_size_stays_a_module(size: int) -> None:
    lowered, reference = lower_and_reference(qwen2_moe(shared_expert_intermediate_size=size), tokens(1, 4))
    experts = next(module for module in lowered.modules() if isinstance(module, LoweredExperts))
    assert not experts.shared_packed()
    ids = tokens(2, 7)
    with torch.no_grad():
        assert relative_error(lowered(input_ids=ids).logits, reference(input_ids=ids).logits) < 1e-3


def test_routed_and_shared_experts_are_told_apart() -> None:
    routed, shared = random_packed([2, 8, 4], 6, 64, slots=5), random_packed([8, 8], 6, 64)
    both = append_experts(routed, shared)
    assert both.num_experts == 5
    assert torch.equal(both.routed(3).dequantize(), routed.dequantize())
    assert torch.equal(both.appended(3).dequantize(), shared.dequantize())
    assert torch.equal(both.dequantize()[3:], shared.dequantize())
    assert both.routed(3).size_bytes == routed.size_bytes
    x, ids = torch.randn(5, 64), torch.arange(5)
    out = ops.packed_expert_linear(x, ids, list(both.tensors), None, 32)
    expected = torch.cat([routed.dequantize(), shared.dequantize()])
    assert torch.allclose(out, torch.einsum("rk,rnk->rn", x, expected), atol=1e-4)


def test_slots_of_the_routed_do_not_reach_the_shared_after_a_swap() -> None:
    routed, shared = random_packed([2, 8], 6, 64, slots=5), random_packed([8], 6, 64)
    both = append_experts(routed, shared)
    fewer = random_packed([2, 8], 6, 64, slots=5, seed=3).pool
    both.routed(2).pool.copy_(fewer)
    x = torch.randn(1, 64)
    out = ops.packed_expert_linear(x, torch.tensor([2]), list(both.tensors), None, 32)
    assert torch.allclose(out[0], shared.dequantize()[0] @ x[0], atol=1e-4)


def test_a_large_expert_is_the_sum_of_small_ones() -> None:
    gate, up = random_packed([4], 128, 64, seed=1), random_packed([4], 128, 64, seed=2)
    down = random_packed([6], 8, 128, seed=3)
    small_gate_up, small_down = split_shared(gate, up, down, 4)
    first, second = small_gate_up.dequantize(), small_down.dequantize()
    assert torch.equal(first[:, :32].reshape(128, 64), gate.dequantize()[0])
    assert torch.equal(first[:, 32:].reshape(128, 64), up.dequantize()[0])
    assert torch.equal(second.transpose(0, 1).reshape(8, 128), down.dequantize()[0])
    with pytest.raises(ValueError, match=r"`copies` must divide the 128 input channels .* groups of 32, but is 8"):
        split_shared(gate, up, down, 8)
