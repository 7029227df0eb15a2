"""The rules of `adapt`: each lowers the error it claims to lower, on second moments however they were collected."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from rule_cases import COLUMNS, EXPERTS, ROWS, energy_of, hessian_moments, quantized_pair, row_moments, whole_master
from torch import Tensor

from moe_compiler.kernels.experts import PackedExpertLinear
from moe_compiler.kernels.pool import ChannelPool
from moe_compiler.passes.moments import Gram, HessianMoments, RowMoments, SecondMoments
from moe_compiler.passes.quantize import quantize_experts
from moe_compiler.runtime import lowrank as lowrank_module
from moe_compiler.runtime.errors import base_columns
from moe_compiler.runtime.lowrank import leading_outputs, leading_vectors, lowrank
from moe_compiler.runtime.quality import expected_error, output_errors
from moe_compiler.runtime.rules import (
    RULES,
    assigned_channels,
    compensate,
    needs,
    recluster,
    restore,
    worst_channels,
)
from moe_compiler.runtime.sketch import OutputSketch

CPU = torch.device("cpu")


def dense_error(weight: Tensor, packed: PackedExpertLinear, pool: ChannelPool, hessian: Tensor) -> float:
    """The oracle: `Σ_e tr((W − Ŵ)·H·(W − Ŵ)ᵀ)` of dense weights in float64."""
    left = (weight - packed.dequantize(with_pool=False) - pool.dense()).double()
    return float((left @ hessian.double() * left).sum())


def same(first: ChannelPool, second: ChannelPool) -> bool:
    """Whether two contents are equal, bit for bit."""
    return all(torch.equal(a, b) for a, b in zip(first.tensors().values(), second.tensors().values(), strict=True))


def test_restore_takes_the_channels_with_the_largest_expected_error() -> None:
    weight, packed, energy = quantized_pair()
    master = whole_master(weight, packed)
    pool = restore(master, packed, energy)
    error = (weight - packed.dequantize(with_pool=False)).square().sum(1).double() * energy
    best = error.view(-1).topk(6).indices.sort().values
    chosen = (pool.experts() * COLUMNS + pool.index[: pool.used]).sort().values
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
    assert restore(whole_master(weight, packed), packed, torch.zeros_like(energy)).used == 0


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
    assert same(recluster(master, packed, energy, packed.bits, energy), restore(master, packed, energy))


def test_channels_that_a_plan_assigns_are_those_with_the_largest_energy() -> None:
    energy = torch.tensor([[1.0, 5.0, 3.0], [9.0, 2.0, 8.0], [7.0, 7.5, 0.5]])
    assert sorted(assigned_channels(energy, [2, 0, 1], 9).tolist()) == [1, 2, 7]
    assert sorted(assigned_channels(energy, [2, 0, 1], 2).tolist()) == [1, 7]
    assert assigned_channels(energy, [0, 0, 0], 9).numel() == 0


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 10_000), st.integers(1, 40), st.integers(2, 200))
def test_each_rule_leaves_less_error_than_the_weaker_one(seed: int, slots: int, tokens: int) -> None:
    weight, packed, _ = quantized_pair(slots, slots, seed)
    master, moments = whole_master(weight, packed), row_moments(tokens, seed)
    energy = energy_of(hessian_moments(moments))
    pools = [
        lowrank(master, packed, moments),
        compensate(master, packed, energy, moments, 1e-6, 0),
        restore(master, packed, energy),
        packed.pool,
    ]
    assert all(pool.used <= slots for pool in pools)
    best, fitted, restored, nothing = output_errors(master, packed, pools, moments)
    small = 2e-3 * nothing  # INT8 slots
    assert best <= fitted + small
    assert fitted <= restored + small
    before, after = (expected_error(master, packed, pool, energy) for pool in (packed.pool, pools[2]))
    assert after < before
    assert best < nothing


def test_errors_are_those_of_dense_weights() -> None:
    weight, packed, _ = quantized_pair(9, 9)
    master, rows = whole_master(weight, packed), row_moments(300)
    moments = hessian_moments(rows)
    energy = energy_of(moments)
    pools = [packed.pool, restore(master, packed, energy), lowrank(master, packed, moments)]
    for seen in (rows, moments):
        found = output_errors(master, packed, pools, seen)
        expected = [dense_error(weight, packed, pool, moments.hessian) for pool in pools]
        assert found == pytest.approx(expected, rel=1e-4)
    diagonal = torch.diag_embed(energy)
    for pool in pools:
        expected_value = dense_error(weight, packed, pool, diagonal)
        assert expected_error(master, packed, pool, energy) == pytest.approx(expected_value, rel=1e-4)


@pytest.mark.parametrize("exact_rows", [0, 512])
def test_lowrank_at_full_rank_recovers_the_weight(monkeypatch: pytest.MonkeyPatch, exact_rows: int) -> None:
    monkeypatch.setattr(lowrank_module, "EXACT_ROWS", exact_rows)
    slots = EXPERTS * ROWS
    weight, packed, _ = quantized_pair(slots, slots)
    moments = HessianMoments(torch.eye(COLUMNS).expand(EXPERTS, -1, -1), torch.full((EXPERTS,), COLUMNS))
    pool = lowrank(whole_master(weight, packed), packed, moments)
    assert pool.used == slots
    base = packed.dequantize(with_pool=False)
    left = (weight - base - pool.dense()).norm() / (weight - base).norm()
    assert left < 0.02


def test_lowrank_spends_its_slots_where_the_new_data_are() -> None:
    weight, packed, _ = quantized_pair(5, 5)
    moments = row_moments(60)
    only = replace(moments, expert_ids=torch.where(moments.expert_ids == 2, 2, EXPERTS))
    pool = lowrank(whole_master(weight, packed), packed, only)
    assert pool.experts().tolist() == [2] * 5
    nobody = replace(moments, expert_ids=torch.full_like(moments.expert_ids, EXPERTS))
    assert lowrank(whole_master(weight, packed), packed, nobody).used == 0


def test_lowrank_without_room_changes_nothing() -> None:
    weight, packed, _ = quantized_pair(0, 0)
    assert lowrank(whole_master(weight, packed), packed, row_moments()).used == 0


@pytest.mark.parametrize("rule", ["lowrank", "compensate"])
def test_rows_and_their_hessians_give_the_same_contents_every_time(rule: str) -> None:
    weight, packed, _ = quantized_pair(7, 7)
    master, rows = whole_master(weight, packed), row_moments(80)
    moments = hessian_moments(rows)

    def contents(seen: SecondMoments) -> ChannelPool:
        if rule == "lowrank":
            return lowrank(master, packed, seen)
        return compensate(master, packed, energy_of(moments), seen)

    assert same(contents(rows), contents(rows))
    torch.testing.assert_close(contents(rows).dense(), contents(moments).dense(), rtol=0.02, atol=0.02)


def test_subspace_iteration_finds_what_the_exact_method_finds(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(3)
    error = torch.randn(60, 100, generator=generator)
    rows = torch.randn(150, 100, generator=generator) * torch.logspace(0, -2, 100)
    gram = Gram(rows.T @ rows, torch.full((100,), 0.01), is_hessian=True)
    captured = []
    for exact_rows in (0, 60):
        monkeypatch.setattr(lowrank_module, "EXACT_ROWS", exact_rows)
        gain, outputs = leading_outputs(error, gram, 10)
        assert gain.shape == (10,)
        torch.testing.assert_close(outputs.T @ outputs, torch.eye(10), rtol=0, atol=1e-4)
        assert bool((gain.diff() <= 1e-4 * gain[0]).all())
        direction = outputs.T @ error
        captured.append(float((direction @ gram.times(direction.T)).trace()))
        assert float(gain.sum()) == pytest.approx(captured[-1], rel=1e-3)
    assert captured[0] == pytest.approx(captured[1], rel=0.01)


@pytest.mark.parametrize("is_hessian", [True, False])
def test_damping_shrinks_correlations_and_keeps_the_diagonal(is_hessian: bool) -> None:
    rows = torch.randn(30, 8, generator=torch.Generator().manual_seed(0))
    matrix = rows.T @ rows
    gram = Gram(matrix if is_hessian else rows, torch.zeros(8), is_hessian)
    damped = gram.damped(0.1, 10, 30).times(torch.eye(8))
    expected = 0.75 * matrix + torch.diag(0.25 * matrix.diagonal()) + 0.1 * matrix.diagonal().mean() * torch.eye(8)
    torch.testing.assert_close(damped, expected)
    torch.testing.assert_close(gram.damped(0.1, 10, 30).diagonal(), expected.diagonal())
    other = torch.randn(5, 8, generator=torch.Generator().manual_seed(1))
    assert gram.damped(0.1, 10, 30).energy(other) == pytest.approx(float((other @ expected * other).sum()), rel=1e-5)
    assert gram.damped(0.1, 10, 0) is gram


def test_worst_channels_leaves_out_those_without_error() -> None:
    error = torch.tensor([[0.0, 2.0], [1.0, 3.0]])
    assert worst_channels(error, torch.tensor([[1.0, 1.0], [1.0, 0.0]]), 4).tolist() == [1, 2]


@pytest.mark.parametrize("rule", ["lowrank", "compensate"])
def test_second_moments_that_are_not_finite_are_refused(rule: str) -> None:
    weight, packed, energy = quantized_pair(4, 4)
    moments = row_moments()
    pair = int((moments.expert_ids == 1).nonzero()[0])
    moments.rows[pair // 2, 5] = torch.nan
    master, room = whole_master(weight, packed), replace_pool(packed)
    with pytest.raises(FloatingPointError, match="second moments must be finite, but those of expert"):
        lowrank(master, packed, moments) if rule == "lowrank" else compensate(master, room, 0 * energy + 1, moments)


def replace_pool(packed: PackedExpertLinear) -> PackedExpertLinear:
    """The linear with room for every channel."""
    return replace(packed, pool=ChannelPool.empty(EXPERTS, EXPERTS * COLUMNS, ROWS, COLUMNS))


def test_needs_names_the_rules() -> None:
    assert [needs(rule) for rule in RULES] == ["sums", "sums", "hessian", "hessian"]
    with pytest.raises(ValueError, match="`rule` must be one of 'restore', 'cluster', 'compensate', 'lowrank', but is"):
        needs("swap")


def test_rows_of_both_layouts_are_the_same_second_moments() -> None:
    tokens = row_moments(40)
    pairs = RowMoments(tokens.rows.repeat_interleave(2, 0), tokens.expert_ids, tokens.gate, EXPERTS)
    for expert in range(EXPERTS):
        block = torch.eye(COLUMNS)
        expected = hessian_moments(tokens).expert(expert, CPU).times(block)
        torch.testing.assert_close(tokens.expert(expert, CPU).times(block), expected, rtol=1e-3, atol=1e-4)
        torch.testing.assert_close(pairs.expert(expert, CPU).times(block), expected, rtol=1e-3, atol=1e-4)


def test_lowrank_gives_one_expert_as_many_slots_as_it_gains_most_with() -> None:
    weight, packed, _ = quantized_pair(20, 20)
    moments = row_moments(300)
    strong = replace(moments, gate=torch.where(moments.expert_ids == 0, 1e3, 1e-3))
    pool = lowrank(whole_master(weight, packed), packed, strong)
    assert pool.experts().tolist() == [0] * 20


@settings(max_examples=10, deadline=None)
@given(st.integers(0, 1000), st.sampled_from([(24, 128), (10, 72), (33, 200)]), st.sampled_from([32, 128]))
def test_columns_of_the_base_are_those_of_its_dense_weight(seed: int, size: tuple[int, int], group_size: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(4, *size, generator=generator)
    packed = PackedExpertLinear.from_quantized(quantize_experts("rtn", weight, None, [2, 4, 6, 8], group_size))
    places = torch.randperm(4 * size[1], generator=generator)[:30]
    dense = packed.dequantize(with_pool=False)
    expected = dense[places // size[1], :, places % size[1]]
    torch.testing.assert_close(base_columns(packed, places), expected, rtol=1e-6, atol=1e-7)
    assert base_columns(packed, places[:0]).shape == (0, size[0])


@pytest.mark.parametrize("size", [(160, 256), (256, 160)])
def test_leading_vectors_are_those_of_the_singular_value_decomposition(size: tuple[int, int]) -> None:
    generator = torch.Generator().manual_seed(5)
    scale = torch.logspace(0, -3, min(size))
    left, right = (torch.linalg.qr(torch.randn(n, min(size), generator=generator)).Q for n in size)
    image = (left * scale) @ right.t()
    for dtype, tolerance in ((torch.float32, 5e-3), (torch.bfloat16, 0.03)):
        gain, vectors = leading_vectors(image.to(dtype), 8)
        torch.testing.assert_close(gain, scale[:8].square(), rtol=tolerance, atol=0)
        agreement = (vectors * left[:, :8]).sum(dim=0).abs()
        assert bool((agreement > 1 - tolerance).all())
        assert torch.equal(vectors, leading_vectors(image.to(dtype), 8)[1])


@pytest.mark.parametrize("tokens", [200, 600])  # fewer and more rows of an expert than channels
def test_lowrank_in_bfloat16_leaves_as_much_error(tokens: int) -> None:
    weight, packed, _ = quantized_pair(12, 12)
    weight = weight.bfloat16()
    master, exact = whole_master(weight, packed), row_moments(tokens)
    rows = replace(exact, rows=exact.rows.bfloat16())
    pools = [lowrank(master, packed, moments) for moments in (exact, rows)]
    slow, fast = output_errors(master, packed, pools, exact)
    assert fast == pytest.approx(slow, rel=0.02)
    assert output_errors(master, packed, pools, rows) == pytest.approx([slow, fast], rel=0.02)


def test_lowrank_leaves_out_experts_that_cannot_win_a_slot() -> None:
    weight, packed, _ = quantized_pair(6, 6)
    moments = row_moments(300)
    energy = energy_of(hessian_moments(moments))
    gate = torch.where(moments.expert_ids == 3, 1e-4, moments.gate)  # what its error weighs falls with it
    weak = replace(moments, gate=gate)
    energy[3] *= 1e-8
    sketches: dict[int, OutputSketch] = {}
    master = whole_master(weight, packed)
    pool = lowrank(master, packed, weak, sketches)
    assert set(sketches) <= {0, 1, 2}
    assert same(pool, lowrank(master, packed, weak))
    errors = output_errors(master, packed, [packed.pool, pool], weak, energy, sketches)
    assert errors == pytest.approx(output_errors(master, packed, [packed.pool, pool], weak), rel=0.05)
