"""Adapting in place: what moves, what stays, nothing recompiled, nothing half done."""

import copy
from typing import Any

import pytest
import torch
from tiny import datasets, olmoe, qwen2_moe, tokens
from torch import Tensor
from torch._dynamo.utils import counters

from moe_compiler.api import dynamo_compile
from moe_compiler.kernels.experts import PackedExpertLinear
from moe_compiler.passes.quantize import quantize_experts
from moe_compiler.progress import RichProgress
from moe_compiler.runtime import adaptation as runtime_module
from moe_compiler.runtime.channels import (
    LinearMaster,
    assigned_channels,
    build_master,
    channel_error,
    expected_error,
    recluster,
    restore,
    worst_channels,
)
from moe_compiler.runtime.report import jensen_shannon, moved_slots

OPTIONS: dict[str, Any] = {"target_bits": 3.6, "master": "memory", "pool_fraction": 0.02, "progress": False}


@pytest.fixture(scope="module")
def compiled() -> Any:
    return dynamo_compile(olmoe(), datasets(), **OPTIONS)


@pytest.fixture
def model(compiled: Any) -> Any:
    compiled.runtime.revert()
    return compiled


def new_data() -> Tensor:
    return tokens(6, 32, 9, high=12)


def state(model: Any) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def unchanged(model: Any, before: dict[str, Tensor]) -> bool:
    return all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


@torch.no_grad()
def logits(model: Any, shape: tuple[int, int] = (2, 9)) -> Tensor:
    return model(input_ids=tokens(*shape, 3), use_cache=False).logits


@pytest.mark.parametrize("rule", ["restore", "cluster"])
def test_only_the_pools_contents_change(model: Any, rule: str) -> None:
    before, addresses = state(model), {name: t.data_ptr() for name, t in model.state_dict().items()}
    report = model.runtime.adapt(new_data(), rule=rule, name="new")
    changed = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
    assert changed
    assert all("_pool_" in name for name in changed)
    assert addresses == {name: t.data_ptr() for name, t in model.state_dict().items()}
    assert model.runtime.active == "new"
    assert sum(change.moved for layer in report.layers for change in layer.linears) > 0


def test_revert_restores_the_compiled_state_bit_for_bit(model: Any) -> None:
    before, expected = state(model), logits(model)
    model.runtime.adapt(new_data())
    model.runtime.adapt(tokens(6, 32, 10, low=80))
    assert not unchanged(model, before)
    model.runtime.revert()
    assert unchanged(model, before)
    assert torch.equal(logits(model), expected)
    assert model.runtime.active == "calibration"


def test_restore_lowers_the_expected_error_and_reports_it(model: Any) -> None:
    report = model.runtime.adapt(new_data(), rule="restore", name="new")
    changes = [change for layer in report.layers for change in layer.linears]
    assert all(change.error_after <= change.error_before * 1.0001 for change in changes)
    assert sum(c.error_after for c in changes) < 0.99 * sum(c.error_before for c in changes)
    assert all(change.used <= change.capacity for change in changes)
    assert report.tokens == new_data().numel()
    assert set(report.seconds) == {"observe", "choose", "swap"}
    text = str(report)
    assert "adapted to 'new' by rule 'restore' on 192 tokens" in text
    assert "model.layers.1.mlp" in text
    assert report.to_dict()["layers"][0]["linears"][0]["linear"] == "gate_up_proj"


def test_adapting_again_to_the_same_data_moves_nothing_where_the_inputs_are_the_same(model: Any) -> None:
    model.runtime.adapt(new_data())
    report = model.runtime.adapt(new_data())
    assert report.layers[0].linears[0].moved == 0  # later linears see what the first adaptation changed


def test_nothing_recompiles() -> None:
    model = dynamo_compile(qwen2_moe(layers=1), datasets(), **OPTIONS)
    torch._dynamo.reset()
    counters.clear()
    forward = torch.compile(model, fullgraph=True, dynamic=True)
    shapes = ((2, 9), (3, 17), (4, 33))
    outputs = {}
    for shape in shapes:
        logits(forward, shape)
    graphs = counters["stats"]["unique_graphs"]
    with torch.compiler.set_stance("fail_on_recompile"):
        for step in ("a", "b", None, "a"):
            if step is None:
                model.runtime.revert()
            else:
                model.runtime.adapt(tokens(4, 32, ord(step)), name=step)
            for shape in shapes:
                outputs[step, shape] = logits(forward, shape)
                torch.testing.assert_close(outputs[step, shape], logits(model, shape), rtol=1e-4, atol=1e-5)
    assert counters["stats"]["unique_graphs"] == graphs
    assert not torch.equal(outputs["a", (2, 9)], outputs[None, (2, 9)])


def test_model_compile_in_place_follows_adapt() -> None:
    model = dynamo_compile(olmoe(num_hidden_layers=1), datasets(), compile=True, **OPTIONS)
    torch._dynamo.reset()
    before = logits(model)
    with torch.compiler.set_stance("fail_on_recompile"):
        model.runtime.adapt(new_data())
        after = logits(model)
    assert not torch.equal(before, after)
    torch.testing.assert_close(after, model.forward(input_ids=tokens(2, 9, 3), use_cache=False).logits.detach())


def test_adapt_runs_beside_a_forward_that_was_compiled_on_the_model() -> None:
    model = dynamo_compile(olmoe(num_hidden_layers=1), datasets(), **OPTIONS)
    body = model.model  # what adapt runs
    body.forward = torch.compile(body.forward, dynamic=True, backend="eager")
    before = logits(model)
    with torch.compiler.set_stance("fail_on_recompile"):
        model.runtime.adapt(new_data())
        assert not torch.equal(logits(model), before)
        model.runtime.revert()
        assert torch.equal(logits(model), before)


@pytest.mark.parametrize("where", ["restore", "expected_error", "assign"])
def test_a_failure_at_any_step_changes_nothing(model: Any, monkeypatch: Any, where: str) -> None:
    model.runtime.adapt(tokens(4, 32, 5), name="first")
    before = state(model)
    calls = []

    def fail(*_: Any, **__: Any) -> None:
        calls.append(where)
        raise MemoryError("no memory left")

    real = getattr(runtime_module, where)
    monkeypatch.setattr(
        runtime_module,
        where,
        lambda *a, **k: fail() if len(calls) > 0 or calls.append("first") else real(*a, **k),
    )
    with pytest.raises(MemoryError, match="no memory left"):
        model.runtime.adapt(new_data(), name="second")
    assert unchanged(model, before)
    assert model.runtime.active == "first"


def test_activations_that_are_not_finite_change_nothing() -> None:
    model = dynamo_compile(olmoe(), datasets(), **OPTIONS)
    with torch.no_grad():
        model.model.embed_tokens.weight[77] = torch.nan
    before = state(model)
    with pytest.raises(FloatingPointError, match="held NaN or infinity on dataset 'bad'"):
        model.runtime.adapt(torch.full((2, 8), 77), name="bad")
    kept = {
        name: tensor for name, tensor in model.state_dict().items() if "embed" not in name and "lm_head" not in name
    }
    assert all(torch.equal(tensor, before[name]) for name, tensor in kept.items())


BAD = [
    (
        {"samples": tokens(1, 8), "rule": "swap"},
        ValueError,
        "`rule` must be one of 'restore', 'cluster', but is 'swap'",
    ),
    ({"samples": tokens(1, 8), "name": ""}, ValueError, "`name` must be a text that is not empty, but is ''"),
    ({"samples": tokens(1, 8), "name": 3}, ValueError, "`name` must be a text that is not empty, but is 3"),
    ({"samples": []}, ValueError, "dataset 'adapted' must hold at least one sample"),
    ({"samples": tokens(2, 1)}, ValueError, "every sample must have at least 2 tokens, but sample 0"),
    ({"samples": ["text"]}, ValueError, "`tokenizer` is needed because dataset 'adapted' holds text"),
    ({"samples": torch.full((1, 4), 96)}, ValueError, "holds 96"),
    ({"samples": torch.ones(2, 4)}, TypeError, "must hold integers, but is torch.float32"),
]


@pytest.mark.parametrize(("arguments", "error", "message"), BAD, ids=lambda value: str(value)[:40])
def test_bad_calls_change_nothing(model: Any, arguments: Any, error: Any, message: str) -> None:
    before = state(model)
    with pytest.raises(error, match=message):
        model.runtime.adapt(**arguments)
    assert unchanged(model, before)


def test_a_copy_adapts_on_its_own(model: Any) -> None:
    expected = logits(model)
    model.runtime._progress = RichProgress()  # as it is unless progress=False
    copied = copy.deepcopy(model)
    model.runtime._progress = None
    assert copied.runtime.model is copied
    copied.runtime.adapt(new_data())
    assert torch.equal(logits(model), expected)
    assert not torch.equal(logits(copied), expected)
    copied.runtime.revert()
    assert torch.equal(logits(copied), expected)


def quantized_pair() -> tuple[Tensor, PackedExpertLinear, Tensor]:
    weight = torch.randn(4, 24, 128, generator=torch.Generator().manual_seed(1))
    packed = PackedExpertLinear.from_quantized(quantize_experts("rtn", weight, None, [2, 4, 2, 8], 128), 6)
    energy = torch.rand(4, 128, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    return weight, packed, energy


def whole_master(weight: Tensor, packed: PackedExpertLinear) -> LinearMaster:
    return build_master(weight, channel_error(weight, packed), torch.zeros(0, dtype=torch.int64), 1.0)


def test_restore_takes_the_channels_with_the_largest_expected_error() -> None:
    weight, packed, energy = quantized_pair()
    master = whole_master(weight, packed)
    pool = restore(master, packed, energy)
    error = (weight - packed.dequantize(with_pool=False)).square().sum(1).double() * energy
    best = error.view(-1).topk(6).indices.sort().values
    chosen = (pool.experts() * 128 + pool.index[: pool.used]).sort().values
    assert torch.equal(chosen, best)
    before = expected_error(master, packed, packed.pool, energy)
    assert before == pytest.approx(float(error.sum()), rel=1e-4)
    after = expected_error(master, packed, pool, energy)
    assert after == pytest.approx(float(error.sum() - error.view(-1)[best].sum()), rel=1e-3)
    packed.pool.copy_(pool)
    dense = (weight - packed.dequantize()).square().sum(1).double() * energy
    assert after == pytest.approx(float(dense.sum()), rel=1e-4)


def test_restore_leaves_slots_idle_where_no_channel_carries_energy() -> None:
    weight, packed, energy = quantized_pair()
    master = whole_master(weight, packed)
    assert restore(master, packed, torch.zeros_like(energy)).used == 0


def test_recluster_requantizes_channels_of_experts_that_changed() -> None:
    weight, packed, energy = quantized_pair()
    master = whole_master(weight, packed)
    pool = recluster(master, packed, energy, [8, 4, 2, 2], 0 * energy)
    assert set(pool.experts().tolist()) <= {0, 3}
    packed.pool.copy_(pool)
    corrected = packed.dequantize()
    for expert, channel in zip(pool.experts().tolist(), pool.index[: pool.used].tolist(), strict=True):
        left = (weight - corrected)[expert, :, channel].norm() / weight[expert, :, channel].norm()
        assert left < 0.02 if expert == 0 else left > 0.1  # up to 8 bits, down to 2
    unchanged_clusters = recluster(master, packed, energy, packed.bits, energy)
    expected = restore(master, packed, energy)
    assert all(
        torch.equal(a, b)
        for a, b in zip(unchanged_clusters.tensors().values(), expected.tensors().values(), strict=True)
    )


def test_the_master_keeps_the_stated_share_with_the_first_channels_among_it() -> None:
    weight, packed, energy = quantized_pair()
    error = channel_error(weight, packed)
    energy[2] = 0  # an expert that the calibration data never used
    first = worst_channels(error, energy, 6)
    assert 2 not in (first // 128).tolist()
    master = build_master(weight, error, first, 0.05)
    assert master.columns.shape == (round(0.05 * 4 * 128), 24)
    torch.testing.assert_close(master.columns.float(), weight[master.experts, :, master.channels], rtol=1e-3, atol=1e-3)
    assert set((master.experts * 128 + master.channels).tolist()) >= set(first.tolist())
    assert 2 in master.experts.tolist()
    assert master.size_bytes < whole_master(weight, packed).size_bytes
    assert build_master(weight, error, first, 0.0).columns.shape[0] == 6


def test_channels_that_a_plan_assigns_are_those_with_the_largest_energy() -> None:
    energy = torch.tensor([[1.0, 5.0, 3.0], [9.0, 2.0, 8.0], [7.0, 7.5, 0.5]])
    assert sorted(assigned_channels(energy, [2, 0, 1], 9).tolist()) == [1, 2, 7]
    assert sorted(assigned_channels(energy, [2, 0, 1], 2).tolist()) == [1, 7]
    assert assigned_channels(energy, [0, 0, 0], 9).numel() == 0


def test_moqa_puts_its_int8_channels_into_the_pool() -> None:
    model = dynamo_compile(olmoe(), datasets(), strategy="moqa", target_bits=None, pool_fraction=0.05, progress=False)
    for path, layer in model.runtime.layers.items():
        plan = model.moe_report.plan.layers[path]
        for name, packed in layer.experts.all_packed().items():
            assert plan.channels is not None
            assert packed.pool.offset.diff().tolist() == list(plan.channels[name])


def test_a_state_from_another_compilation_is_noticed() -> None:
    weight, packed, energy = quantized_pair()
    error = channel_error(weight, packed)
    master = build_master(weight, error, worst_channels(error, energy, 6), 0.0)
    packed.pool.copy_(restore(whole_master(weight, packed), packed, energy.flip(1)))
    with pytest.raises(RuntimeError, match="the model's state was loaded from another compilation"):
        expected_error(master, packed, packed.pool, energy)


def test_jensen_shannon_is_a_divergence() -> None:
    p, q = torch.tensor([1.0, 0.0, 3.0]), torch.tensor([0.0, 5.0, 0.0])
    assert float(jensen_shannon(p, 7 * p)) == pytest.approx(0, abs=1e-12)
    assert float(jensen_shannon(p, q)) == pytest.approx(1)
    half, one = torch.tensor([1.0, 1.0]), torch.tensor([1.0, 0.0])
    assert float(jensen_shannon(half, one)) == pytest.approx(0.311278, abs=1e-6)
    assert jensen_shannon(torch.stack([p, q]), torch.stack([p, q])).tolist() == pytest.approx([0, 0], abs=1e-12)


def test_moved_slots_counts_new_keys() -> None:
    assert moved_slots(torch.tensor([1, 2, 3]), torch.tensor([3, 4, 5])) == 2
