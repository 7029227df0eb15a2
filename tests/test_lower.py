"""Lowering: every architecture computes what it would with dequantized weights, eager and compiled."""

import copy
from typing import Any

import deepseek_v1
import pytest
import torch
from architectures import architecture_names, build, example_inputs, logits
from tiny import olmoe, qwen2_moe, tokens
from torch import Tensor, nn

from moe_compiler.kernels import ops
from moe_compiler.kernels.experts import PackedExpertLinear
from moe_compiler.kernels.pool import ChannelPool
from moe_compiler.passes.capture import MoEBlock, capture_moe_blocks, expert_weight
from moe_compiler.passes.lower import LoweredExperts, lower_block
from moe_compiler.passes.quantize import quantize_experts

WIDTHS = (2, 4, 6, 8)


def packed_linears(block: MoEBlock) -> dict[str, PackedExpertLinear]:
    """The block's experts at mixed widths, with a pool in which every slot but one is used."""
    packed = {}
    for number, projection in enumerate(block.spec.projections):
        weight = expert_weight(block.experts, block.spec, projection.name).detach()
        experts = weight.shape[0]
        bits = [WIDTHS[(expert + number) % 4] for expert in range(experts)]
        linear = PackedExpertLinear.from_quantized(quantize_experts("rtn", weight, None, bits, 32), 4)
        columns = torch.randn(3, weight.shape[1]) * float(weight.std())
        linear.pool.copy_(
            ChannelPool.from_columns(torch.tensor([0, 1, experts - 1]), torch.tensor([2, 0, 1]), columns, linear.pool)
        )
        packed[projection.name] = linear
    return packed


def shared_linears(block: MoEBlock) -> dict[str, PackedExpertLinear]:
    found = {}
    for path in block.shared_linears:
        weight = block.graph.get_submodule(path).weight.detach()
        found[path] = PackedExpertLinear.from_quantized(quantize_experts("rtn", weight[None], None, [8], 32))
    return found


@torch.no_grad()
def write_dequantized(block: MoEBlock, packed: dict[str, PackedExpertLinear]) -> None:
    """Gives the block's own experts the weights that the packed ones stand for."""
    for name, linear in packed.items():
        weight = linear.dequantize()
        if block.spec.kind != "list":
            target = expert_weight(block.experts, block.spec, name)
            target.copy_(weight)
            continue
        names = ("gate_proj", "up_proj") if name == "gate_up_proj" else ("down_proj",)
        for expert, one in zip(block.experts, weight, strict=True):
            for part, rows in zip(names, one.chunk(len(names)), strict=True):
                getattr(expert, part).weight.copy_(rows)


def lower_and_reference(model: Any, example: Any) -> tuple[Any, Any]:
    """The lowered model, and one of the same architecture with dequantized weights."""
    reference = copy.deepcopy(model)
    blocks, originals = capture_moe_blocks(model, example), capture_moe_blocks(reference, example)
    for path, block in blocks.items():
        packed, shared = packed_linears(block), shared_linears(block)
        write_dequantized(originals[path], packed)
        for name, linear in shared.items():
            originals[path].graph.get_submodule(name).weight.data.copy_(linear.dequantize()[0])
        lower_block(model, block, packed, shared)
    return model, reference


def relative_error(actual: Tensor, expected: Tensor) -> float:
    return float((actual.float() - expected.float()).norm() / expected.float().norm())


@pytest.mark.parametrize("name", [*architecture_names(), "deepseek_v1"])
def test_lowered_equals_dequantized(name: str) -> None:
    model = deepseek_v1.build() if name == "deepseek_v1" else build(name)
    example = example_inputs(model, 2, 5)
    lowered, reference = lower_and_reference(copy.deepcopy(model), example)
    assert any(isinstance(module, LoweredExperts) for module in lowered.modules())
    inputs = example_inputs(model, 3, 7)
    with torch.no_grad():
        error = relative_error(logits(lowered(**inputs)), logits(reference(**inputs)))
        assert error < 1e-3
        half, half_reference = lowered.to(torch.bfloat16), reference.to(torch.bfloat16)
        for module in half.modules():
            if isinstance(module, LoweredExperts):
                assert all(linear.scale.dtype == torch.float16 for linear in module.all_packed().values())
        experts = next(m for m in half.modules() if isinstance(m, LoweredExperts))
        hidden = torch.randn(9, experts.spec.hidden_size).bfloat16()
        index = torch.stack([torch.randperm(experts.spec.num_experts)[:2] for _ in range(9)])
        weights = torch.rand(9, 2).bfloat16()
        original = half_reference.get_submodule(experts.spec.path)
        if experts.spec.kind != "list":
            routed = experts.unfused() if experts.shared_packed() else experts
            error = relative_error(routed(hidden, index, weights), original(hidden, index, weights))
            assert error < 2e-2


@pytest.mark.parametrize("build_model", [olmoe, qwen2_moe, deepseek_v1.build])
def test_originals_are_gone(build_model: Any) -> None:
    model = build_model()
    before = {name: p.shape for name, p in model.named_parameters() if "experts." in name}
    lowered, _ = lower_and_reference(model, tokens(1, 4))
    experts = [m for m in lowered.modules() if isinstance(m, LoweredExperts)]
    assert before
    assert experts
    assert not any(list(m.parameters()) for m in experts)
    left = {name for name, _ in lowered.named_parameters()} & before.keys()
    assert not {name for name in left if ".experts." in name}


def test_lowered_graphs_hold_packed_operators_only() -> None:
    lowered, _ = lower_and_reference(qwen2_moe(), tokens(1, 4))
    for module in lowered.modules():
        if isinstance(module, LoweredExperts):
            targets = [node.target for node in module.graph.nodes]
            assert targets.count(ops.packed_experts) == 1
            assert ops.expert_linear not in targets
            unfused = [node.target for node in module.unfused().graph.nodes]
            assert unfused.count(ops.packed_expert_linear) == 2
            assert module.num_experts == 6
    block = lowered.model.layers[0].mlp
    assert isinstance(block.shared_expert_gate, nn.Linear)


def test_packed_planes_keep_the_parameter_name_of_the_weight() -> None:
    lowered, _ = lower_and_reference(olmoe(), tokens(1, 4))
    state = lowered.state_dict()
    assert state["model.layers.0.mlp.experts.gate_up_proj"].dtype == torch.int16
    assert state["model.layers.0.mlp.experts.down_proj_pool_value"].dtype == torch.int8
    with pytest.raises(RuntimeError, match=r"size mismatch for model\.layers\.0\.mlp\.experts\.gate_up_proj"):
        olmoe().load_state_dict(state)


def test_state_dict_round_trip_is_exact() -> None:
    lowered, _ = lower_and_reference(olmoe(), tokens(1, 4))
    other, _ = lower_and_reference(olmoe(), tokens(1, 4))
    ids = tokens(2, 6)
    with torch.no_grad():
        expected = lowered(input_ids=ids).logits
        for buffer in other.buffers():
            if buffer.dtype == torch.int8:
                buffer.zero_()
        assert not torch.equal(other(input_ids=ids).logits, expected)
        other.load_state_dict(lowered.state_dict())
        assert torch.equal(other(input_ids=ids).logits, expected)


@pytest.mark.parametrize(
    ("build_model", "backend"),
    [
        (lambda: olmoe(num_hidden_layers=1), "inductor"),
        (lambda: qwen2_moe(layers=1), "aot_eager"),
        (deepseek_v1.build, "aot_eager"),
    ],
    ids=["olmoe", "qwen2_moe", "deepseek_v1"],
)
def test_compiled_without_a_break_equals_eager(build_model: Any, backend: str) -> None:
    lowered, _ = lower_and_reference(build_model(), tokens(1, 4))
    torch._dynamo.reset()
    compiled = torch.compile(lowered, fullgraph=True, dynamic=True, backend=backend)
    for shape in ((2, 5), (3, 9), (4, 16)):
        ids = tokens(*shape)
        with torch.no_grad():
            error = relative_error(
                compiled(input_ids=ids, use_cache=False).logits,
                lowered(input_ids=ids, use_cache=False).logits,
            )
        assert error < 1e-5


def test_deepcopy_is_independent() -> None:
    lowered, _ = lower_and_reference(olmoe(), tokens(1, 4))
    ids = tokens(2, 6)
    with torch.no_grad():
        expected = lowered(input_ids=ids).logits
        copied = copy.deepcopy(lowered)
        assert torch.equal(copied(input_ids=ids).logits, expected)
        for buffer in copied.buffers():
            if buffer.dtype == torch.int8:
                buffer.zero_()
        assert torch.equal(lowered(input_ids=ids).logits, expected)
        assert not torch.equal(copied(input_ids=ids).logits, expected)


def test_biases_of_a_list_of_experts_are_stacked() -> None:
    model = deepseek_v1.build()
    for module in model.modules():
        if isinstance(module, deepseek_v1.DeepseekMLP):
            for name, linear in list(module.named_children()):
                if isinstance(linear, nn.Linear):
                    biased = nn.Linear(linear.in_features, linear.out_features)
                    biased.weight = linear.weight
                    setattr(module, name, biased)
    lowered, reference = lower_and_reference(model, tokens(1, 4))
    assert any(isinstance(m, LoweredExperts) and m.down_proj_bias.shape[0] > 1 for m in lowered.modules())
    with torch.no_grad():
        ids = tokens(2, 9)
        assert relative_error(lowered(input_ids=ids).logits, reference(input_ids=ids).logits) < 1e-3
