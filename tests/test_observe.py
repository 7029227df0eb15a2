"""Observers: exact, additive, invisible to the output, removable without a trace."""

import copy
from typing import Any

import pytest
import torch
from tiny import datasets, olmoe, qwen2_moe, tokens
from torch import Tensor

from moe_compiler.api import dynamo_compile
from moe_compiler.kernels import ops
from moe_compiler.kernels.reference import observe_experts_reference
from moe_compiler.passes.base import run_passes
from moe_compiler.passes.calibrate import ObservedModel, collect_hessians, observe_datasets
from moe_compiler.passes.capture import capture_moe_blocks, expert_weight
from moe_compiler.passes.observe import ObserveLinears, RemoveObservers, observed_block, reset_statistics


def recorded(model: Any, ids: Tensor) -> dict[str, tuple[Tensor, Tensor, Tensor]]:
    """What the model's own experts were called with."""
    calls: dict[str, tuple[Tensor, Tensor, Tensor]] = {}
    hooks = [
        module.register_forward_pre_hook(lambda _, args, name=name: calls.__setitem__(name, args))
        for name, module in model.named_modules()
        if name.endswith(".experts")
    ]
    with torch.no_grad():
        model(input_ids=ids, use_cache=False)
    for hook in hooks:
        hook.remove()
    return calls


@pytest.mark.parametrize("build", [olmoe, qwen2_moe])
def test_statistics_equal_a_float64_oracle(build: Any) -> None:
    model, ids = build(), tokens(3, 16)
    blocks = capture_moe_blocks(model, ids)
    weight = torch.rand(96, dtype=torch.float64)
    seen = ObservedModel.of(model, blocks, hessian=True).observe(list(ids), token_weights=weight)
    for path, block in blocks.items():
        hidden, index, gates = recorded(model, ids)[block.spec.path]
        experts, top_k = block.spec.num_experts, index.shape[1]
        token_weight, expert_ids, gate = weight[ids.reshape(-1)], index.reshape(-1), gates.reshape(-1)
        up = expert_weight(block.experts, block.spec, "gate_up_proj").double()
        gate_up = torch.einsum("rk,rnk->rn", hidden.double().repeat_interleave(top_k, 0), up[expert_ids])
        inner = torch.nn.functional.silu(gate_up[:, :128]) * gate_up[:, 128:]
        statistics = seen[path]
        assert statistics.top_k == top_k
        assert statistics.tokens == ids.numel()
        assert statistics.token_weight_sum == pytest.approx(float(token_weight.sum()))
        assert torch.equal(statistics.count, torch.bincount(expert_ids, minlength=experts))
        rows = token_weight.repeat_interleave(top_k)
        mass = torch.zeros(experts, dtype=torch.float64)
        torch.testing.assert_close(statistics.token_mass, mass.index_add(0, expert_ids, rows))
        torch.testing.assert_close(statistics.gate_mass, mass.index_add(0, expert_ids, rows * gate.double()))
        for name, x in (("gate_up_proj", hidden.double()), ("down_proj", inner)):
            oracle = observe_experts_reference(x, expert_ids, gate, token_weight, experts)
            for field, expected in oracle.items():
                actual = getattr(statistics.linears[name], field).double()
                torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-6 * float(expected.max()))


@pytest.mark.parametrize("build", [olmoe, qwen2_moe])
def test_outputs_are_unchanged_to_the_bit(build: Any) -> None:
    model = build()
    observed = ObservedModel.of(model, capture_moe_blocks(model, tokens(1, 4)))
    for shape in ((2, 5), (3, 7), (1, 1)):
        ids = tokens(*shape)
        with torch.no_grad():
            expected = model(input_ids=ids, use_cache=False).logits
            assert torch.equal(observed.model(input_ids=ids, use_cache=False).logits, expected)


def test_statistics_add_up_over_batches_and_datasets() -> None:
    model = olmoe()
    blocks = capture_moe_blocks(model, tokens(1, 4))
    parts = observe_datasets(model, blocks, {name: list(ids) for name, ids in datasets().items()})
    together = [sample for ids in datasets().values() for sample in ids]
    whole = observe_datasets(model, blocks, {"all": together}, tokens_per_batch=96)
    for path in blocks:
        low, high = parts[path].values()
        total, expected = low + high, whole[path]["all"]
        assert total.tokens == expected.tokens == 512
        assert torch.equal(total.count, expected.count)
        for name in total.linears:
            torch.testing.assert_close(
                total.linears[name].abs_sum, expected.linears[name].abs_sum, rtol=1e-5, atol=1e-6
            )
            torch.testing.assert_close(total.linears[name].sq_sum, expected.linears[name].sq_sum, rtol=1e-5, atol=1e-6)


def test_hessians_weigh_datasets_by_weight_not_by_size() -> None:
    model = olmoe()
    blocks = capture_moe_blocks(model, tokens(1, 4))
    small, large = list(tokens(4, 32, 1)), list(tokens(12, 32, 2))
    found = collect_hessians(model, blocks, {"a": small, "b": large}, {"a": 1.0, "b": 3.0})
    path = next(iter(blocks))
    each = [
        ObservedModel.of(model, blocks, hessian=True).observe(data)[path].linears["down_proj"].hessian
        for data in (small, large)
    ]
    expected = 2 * (0.25 * each[0] * 256 / 128 + 0.75 * each[1] * 256 / 384)
    torch.testing.assert_close(found[path]["down_proj"], expected, rtol=1e-5, atol=1e-6)


def test_removing_the_observers_restores_the_graph() -> None:
    model = olmoe()
    for block in capture_moe_blocks(model, tokens(1, 4)).values():
        observed, _ = observed_block(block, hessian=False)
        assert "experts_observer" in observed.code
        assert observed.code != block.graph.code
        run_passes(observed, [RemoveObservers()])
        assert observed.code == block.graph.code
        assert dict(observed.named_modules()).keys() == dict(block.graph.named_modules()).keys()


def test_the_model_itself_is_not_touched() -> None:
    model = olmoe()
    before = copy.deepcopy(model)
    modules = dict(model.named_modules())
    observe_datasets(model, capture_moe_blocks(model, tokens(1, 4)), {"low": list(datasets()["low"])})
    assert all(a is b for a, b in zip(modules.values(), model.modules(), strict=True))
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), before.parameters(), strict=True))


def test_passes_say_what_they_need() -> None:
    model = olmoe()
    block = next(iter(capture_moe_blocks(model, tokens(1, 4)).values()))
    _, observer = observed_block(block, hessian=False)
    with pytest.raises(RuntimeError, match="is observed already"):
        run_passes(observer, [ObserveLinears(block.spec, False, torch.device("cpu"))])
    with pytest.raises(RuntimeError, match="should have 2 expert linears but has 0"):
        run_passes(block.graph, [ObserveLinears(block.spec, False, torch.device("cpu"))])
    with pytest.raises(RuntimeError, match="pass RemoveObservers matched no node"):
        run_passes(block.graph, [RemoveObservers()])


def test_passes_can_be_watched() -> None:
    block = next(iter(capture_moe_blocks(olmoe(), tokens(1, 4)).values()))
    observed, _ = observed_block(block, hessian=False)
    stages: dict[str, str] = {}
    run_passes(observed, [RemoveObservers()], dump=lambda name, graph: stages.__setitem__(name, graph.code))
    assert list(stages) == ["captured", "RemoveObservers"]
    assert "experts_observer" in stages["captured"]
    assert "experts_observer" not in stages["RemoveObservers"]


def test_activations_that_are_not_finite_are_named() -> None:
    model = olmoe()
    with torch.no_grad():
        model.model.layers[1].post_attention_layernorm.weight[3] = torch.nan
    blocks = capture_moe_blocks(model, tokens(1, 4))
    with pytest.raises(
        FloatingPointError, match=r"MoE block `model.layers.1.mlp` held NaN or infinity on dataset 'wiki'"
    ):
        ObservedModel.of(model, blocks).observe(list(tokens(2, 8)), name="wiki")


def test_the_observer_shows_in_the_graph_at_both_linears() -> None:
    block = next(iter(capture_moe_blocks(olmoe(), tokens(1, 4)).values()))
    _, observer = observed_block(block, hessian=False)
    targets = [node.target for node in observer.graph.nodes]
    assert targets.count(ops.observe_experts_) == 2
    assert targets.count(ops.observe_routing_) == 1
    assert targets.count(ops.expert_linear) == 1  # what comes after the last observer is cut off


def test_a_reset_zeroes_the_accumulators_alone() -> None:
    model = dynamo_compile(qwen2_moe(layers=1), datasets(), quantizer="rtn", progress=False)
    with torch.no_grad():
        model(input_ids=tokens(2, 9), use_cache=False)
    (layer,) = model.runtime.layers.values()
    _, observer = observed_block(layer.block, hessian=True)
    accumulators = {"tokens", "count", "token_mass", "gate_mass"} | {
        f"{linear}_{sums}" for linear in ("gate_up_proj", "down_proj") for sums in ("abs_sum", "sq_sum", "hessian")
    }
    for name in accumulators:
        observer.get_buffer(name).fill_(1)
    before = {name: buffer.clone() for name, buffer in observer.named_buffers()}
    assert bool(before["routing_histogram"].any())  # of the model itself, as the ids of its shared experts
    assert accumulators | {"shared_ids"} < before.keys()
    reset_statistics(observer)
    for name, buffer in observer.named_buffers():
        expected = torch.zeros_like(buffer) if name in accumulators else before[name]
        assert torch.equal(buffer, expected), name
