"""What is chosen for a layer: pools of equal bits, the first profile, windows of layers, rules that cannot work."""

from pathlib import Path
from typing import Any

import pytest
import torch
from compiled import compiled_olmoe, new_data
from tiny import datasets, olmoe, tokens

from moe_compiler.api import dynamo_compile
from moe_compiler.config import CompileConfig
from moe_compiler.kernels.experts import overhead_bits
from moe_compiler.layer import check_master, pool_size
from moe_compiler.passes.calibrate import ObservedModel
from moe_compiler.passes.capture import capture_moe_blocks
from moe_compiler.passes.spec import Projection
from moe_compiler.runtime.adaptation import check_rule, choose_layer
from moe_compiler.runtime.observation import observe_layers, row_width

WIDTHS = (2, 4, 6, 8)
DATA = list(new_data())


@pytest.fixture(scope="module")
def compiled() -> Any:
    return compiled_olmoe(quantizer="rtn")


@pytest.fixture(scope="module")
def channels() -> Any:
    return compiled_olmoe(1, pool="channels", quantizer="rtn")


@pytest.mark.parametrize("shape", [(2048, 2048), (2048, 1024), (512, 256), (24, 128)])
@pytest.mark.parametrize("fraction", [0.0, 0.01, 0.02])
def test_both_kinds_of_pool_take_the_same_bits(shape: tuple[int, int], fraction: float) -> None:
    projection = Projection("down_proj", *shape, bias=None)
    bits = {}
    for kind in ("channels", "lowrank"):
        config = CompileConfig(pool=kind, pool_fraction=fraction)
        slots, directions = pool_size(projection, 64, config)
        assert directions == (slots if kind == "lowrank" else 0)
        bits[kind] = overhead_bits(64, *shape, 128, slots, directions) * 64 * shape[0] * shape[1]
    slot = 8 * sum(shape) + 64
    assert 0 <= bits["channels"] - bits["lowrank"] < slot


@pytest.mark.parametrize(
    ("options", "low_rank"),
    [({}, True), ({"quantizer": "rtn"}, False), ({"pool": "channels", "quantizer": "rtn"}, False)],
)
def test_the_first_profile_is_low_rank_where_there_are_hessians(options: dict[str, Any], low_rank: bool) -> None:
    model = compiled_olmoe(1, **options)
    for layer in model.runtime.layers.values():
        for packed in layer.experts.all_packed().values():
            assert packed.pool.used == packed.pool.capacity > 0
            assert bool((packed.pool.index >= packed.in_features).all()) == low_rank
            assert packed.pool.direction.shape[0] == (0 if "pool" in options else packed.pool.capacity)


def test_moqa_puts_its_int8_channels_into_the_pool() -> None:
    options: dict[str, Any] = {"strategy": "moqa", "target_bits": None, "pool": "channels", "pool_fraction": 0.05}
    model = dynamo_compile(olmoe(num_hidden_layers=1), datasets(), quantizer="rtn", progress=False, **options)
    for path, layer in model.runtime.layers.items():
        plan = model.moe_report.plan.layers[path]
        for name, packed in layer.experts.all_packed().items():
            assert plan.channels is not None
            assert packed.pool.offset.diff().tolist() == list(plan.channels[name])


@pytest.mark.parametrize("rule", ["restore", "cluster", "compensate", "lowrank"])
def test_every_rule_fills_a_low_rank_pool(compiled: Any, rule: str) -> None:
    layers = compiled.runtime.layers
    for path, statistics, moments in observe_layers(compiled, layers, DATA, rule):
        pools, change = choose_layer(layers[path], statistics, rule, "new", WIDTHS, moments)
        for linear in change.linears:
            pool = pools[linear.linear]
            assert 0 < linear.used == pool.used <= linear.capacity
            assert bool((pool.index[: pool.used] >= pool.direction.shape[1]).all()) == (rule == "lowrank")
            assert linear.error_after < linear.error_before or rule == "cluster"
            assert linear.moved > 0


def test_windows_of_layers_see_what_all_layers_see_at_once(compiled: Any) -> None:
    layers = compiled.runtime.layers
    one_layer = sum(sample.numel() for sample in DATA) * row_width(next(iter(layers.values()))) * 4
    together = list(observe_layers(compiled, layers, DATA, "lowrank", memory_bytes=2 * one_layer))
    apart = list(observe_layers(compiled, layers, DATA, "lowrank", memory_bytes=2 * one_layer - 1))
    assert [seen.path for seen in together] == [seen.path for seen in apart] == list(layers)
    for first, second in zip(together, apart, strict=True):
        assert first.moments is not None
        assert second.moments is not None
        for linear, moments in first.moments.items():
            held = sum(t.numel() for seen in (moments,) for t in (seen.rows,))
            assert held <= one_layer / 4
            # a layer that is not observed runs in its fused operator, which rounds differently
            torch.testing.assert_close(moments.rows, second.moments[linear].rows, rtol=1e-3, atol=1e-4)
            assert torch.equal(moments.expert_ids, second.moments[linear].expert_ids)
            torch.testing.assert_close(moments.gate, second.moments[linear].gate, rtol=1e-3, atol=1e-5)


def test_kept_rows_are_the_observers_hessians(compiled: Any) -> None:
    layers = compiled.runtime.layers
    observed = ObservedModel.of(compiled, {path: layer.block for path, layer in layers.items()}, hessian=True)
    statistics = observed.observe(DATA)
    for path, sums, moments in observe_layers(compiled, layers, DATA, "compensate"):
        assert moments is not None
        assert torch.equal(sums.count, statistics[path].count)
        for linear, seen in moments.items():
            expected = statistics[path].linears[linear].hessian
            assert expected is not None
            assert torch.equal(seen.count, sums.count)
            for expert in range(8):
                found = seen.expert(expert, expected.device).times(torch.eye(128))
                torch.testing.assert_close(found, expected[expert], rtol=1e-3, atol=1e-4)
        by_rows = choose_layer(layers[path], sums, "lowrank", "new", WIDTHS, moments)[1]
        by_hessian = choose_layer(layers[path], statistics[path], "lowrank", "new", WIDTHS)[1]
        for first, second in zip(by_rows.linears, by_hessian.linears, strict=True):
            assert first.error_before == pytest.approx(second.error_before, rel=1e-3)
            assert first.error_after == pytest.approx(second.error_after, rel=1e-2)


def test_sums_alone_are_observed_where_they_do(compiled: Any) -> None:
    layers = compiled.runtime.layers
    for path, statistics, moments in observe_layers(compiled, layers, DATA, "restore", memory_bytes=1):
        assert moments is None
        with pytest.raises(ValueError, match="rule 'lowrank' needs second moments of the new data, but `statistics`"):
            choose_layer(layers[path], statistics, "lowrank", "new", WIDTHS)


def test_rules_that_a_model_was_not_compiled_for_are_refused(channels: Any) -> None:
    with pytest.raises(
        ValueError, match=r"needs a pool with directions, but the pool of `gate_up_proj` in .*`pool` 'l"
    ):
        check_rule("lowrank", channels.runtime.layers)
    check_rule("compensate", channels.runtime.layers)
    cached = compiled_olmoe(1, pool="channels", master="cache", quantizer="rtn")
    check_rule("cluster", cached.runtime.layers)
    with pytest.raises(ValueError, match=r"'compensate' needs the whole original weights, .* 'memory' or 'checkpoint'"):
        cached.runtime.adapt(new_data(), rule="compensate")
    with pytest.raises(ValueError, match="`rule` must be one of 'restore', 'cluster', 'compensate', 'lowrank'"):
        check_rule("swap", {})


def test_the_bound_on_memory_is_positive(compiled: Any) -> None:
    with pytest.raises(ValueError, match="`memory_bytes` must be at least 1, but is 0"):
        next(observe_layers(compiled, compiled.runtime.layers, DATA, "lowrank", memory_bytes=0))


def test_the_same_data_twice_moves_no_direction_of_the_first_linear() -> None:
    model = compiled_olmoe(1, quantizer="rtn")
    model.runtime.adapt(new_data())
    report = model.runtime.adapt(new_data())
    assert report.layers[0].linears[0].moved == 0


def test_files_of_every_block_are_looked_for_before_anything_changes(tmp_path: Path) -> None:
    model = olmoe()
    model.save_pretrained(tmp_path)
    model.name_or_path = str(tmp_path)
    blocks = capture_moe_blocks(model, tokens(1, 8))
    check_master(model, blocks, CompileConfig(master="checkpoint"))
    with torch.no_grad():
        model.model.layers[1].mlp.experts.gate_up_proj[0, 3, 2] += 1
    check_master(model, blocks, CompileConfig())
    with pytest.raises(ValueError, match=r"agrees with the weights of `model.layers.1.mlp.experts.gate_up_proj`"):
        check_master(model, blocks, CompileConfig(master="checkpoint"))
