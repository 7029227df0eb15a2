"""The native CPU kernels against the oracle, where this CPU has the instructions, and what happens where it has not."""

import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from packed import random_packed

from moe_compiler.kernels import cpu_native, cpu_packed, ops
from moe_compiler.kernels.activation import ACTIVATIONS
from moe_compiler.kernels.cpu_compile import set_compile_threshold
from moe_compiler.kernels.reference import (
    packed_expert_linear_reference,
    packed_experts_hidden_reference,
    packed_experts_reference,
)

DTYPES = [torch.bfloat16, torch.float16, torch.float32]
needs_native = pytest.mark.skipif(
    not cpu_native.cpu_flags() >= cpu_native._NEEDED, reason="the CPU has no AVX512-VNNI: other kernels run there"
)


@needs_native
@settings(deadline=None, max_examples=30)
@given(
    bits=st.lists(st.sampled_from([2, 4, 6, 8]), min_size=1, max_size=4),
    out_features=st.integers(1, 70),
    in_features=st.integers(1, 300),
    group_size=st.sampled_from([128, 256]),
    counts=st.lists(st.integers(1, 20), min_size=1, max_size=3),
    dtype=st.sampled_from(DTYPES),
    slots=st.integers(0, 5),
    directions=st.sampled_from([0, 3]),
)
def test_few_rows_equal_the_oracle(  # type: ignore[no-untyped-def]
    bits, out_features, in_features, group_size, counts, dtype, slots, directions
) -> None:
    slots = min(slots, len(bits) * in_features)
    packed = random_packed(bits, out_features, in_features, slots=slots, directions=directions, group_size=group_size)
    blocks = [(number % len(bits), count) for number, count in enumerate(counts)]
    ids = torch.tensor([expert for expert, count in blocks for _ in range(count)])
    x = torch.randn(ids.shape[0], in_features, generator=torch.Generator().manual_seed(0)).to(dtype)
    out = cpu_native.expert_linear(x, ids, packed.tensors, None, group_size)
    expected = packed_expert_linear_reference(x.double(), ids, list(packed.tensors), None, group_size)
    assert out.dtype == torch.float32
    assert float((out - expected).abs().max()) <= 1e-5 * max(float(expected.abs().max()), 1.0)


@needs_native
@pytest.mark.parametrize(("out_features", "in_features"), [(64, 256), (33, 200), (1, 128)])
@pytest.mark.parametrize(("dtype", "rounding"), [(torch.bfloat16, 1 / 128), (torch.float32, 0.0)])
def test_a_dequantized_weight_is_the_rounded_one(
    out_features: int, in_features: int, dtype: torch.dtype, rounding: float
) -> None:
    packed = random_packed([2, 4, 6, 8], out_features, in_features, slots=9, group_size=128)
    for expert in range(4):
        weight = cpu_native.dequantize(packed.tensors, expert, in_features, 128, dtype)
        expected = packed.dequantize()[expert]
        assert weight.dtype == dtype
        assert weight.shape[1] % 128 == 0
        error = (weight[:, :in_features].float() - expected).abs()
        largest = torch.maximum(expected.abs(), packed.dequantize_expert(expert).abs())
        assert bool((error <= rounding * largest + 1e-5).all())


@needs_native
@pytest.mark.parametrize(("out_features", "in_features"), [(40, 256), (1, 128)])
def test_what_an_original_exceeds_a_weight_by(out_features: int, in_features: int) -> None:
    packed = random_packed([2, 4, 6, 8], out_features, in_features, group_size=128)
    original = torch.randn(out_features, in_features).bfloat16()
    for expert in range(4):
        expected = original - cpu_native.dequantize(packed.tensors, expert, in_features, 128)
        assert torch.equal(
            cpu_native.subtract_weight(original.t().contiguous().t(), packed.tensors, expert, 128), expected
        )


@needs_native
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("tokens", "channels"), [(0, 5), (3, 300), (400, 128)])
def test_sums_over_rows_equal_those_of_pytorch(
    dtype: torch.dtype, tokens: int, channels: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    x, ids = torch.randn(tokens, channels).to(dtype), torch.randint(0, 4, (2 * tokens,))  # 3 is another rank's
    gate, weight = torch.rand(2 * tokens), torch.rand(tokens)
    found = []
    for native in (True, False):
        monkeypatch.setattr(cpu_native, "can_observe", lambda _, native=native: native)
        sums = [torch.ones(3, channels, dtype=torch.float64) for _ in range(2)]
        ops.observe_experts_(x, ids, gate, weight, *sums, torch.empty(0))
        found.append(sums)
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


@needs_native
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("directions", [0, 3])
@pytest.mark.parametrize("tokens", [1, 9, 80])
def test_a_layer_takes_them(dtype: torch.dtype, tokens: int, directions: int, monkeypatch: pytest.MonkeyPatch) -> None:
    gate_up = random_packed([2, 4, 8], 256, 128, slots=4, directions=directions, group_size=128, seed=1)
    down = random_packed([8, 2, 6], 128, 128, slots=4, directions=directions, group_size=128, seed=2)
    calls = []
    real = cpu_native.experts
    monkeypatch.setattr(cpu_native, "experts", lambda *a: calls.append(1) or real(*a))
    x = torch.randn(tokens, 128).to(dtype) / 8
    index = torch.randint(0, 4, (tokens, 2))  # 3 is another rank's
    biases = [torch.randn(3, n).to(dtype) for n in (256, 128)]
    arguments = (
        x, index, torch.rand(tokens, 2), list(gate_up.tensors), biases[0], list(down.tensors), biases[1], "silu", 128,
    )  # fmt: skip
    actual, expected = ops.packed_experts(*arguments), packed_experts_reference(*arguments)
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    assert float((actual - expected).abs().max() / expected.abs().max()) < tolerance
    assert calls or tokens == 80 or not bool((index < 3).any())


@needs_native
@pytest.mark.parametrize("most", [0, 3])
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_layer_of_any_size_and_activation(
    dtype: torch.dtype, activation: str, most: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Up to `most` rows of an expert are few: experts of both kinds in one layer, odd sizes, low-rank slots."""
    monkeypatch.setattr(cpu_packed, "MAX_FEW_ROWS_NATIVE", most)
    gate_up = random_packed([2, 4, 6, 8], 2 * 37, 150, slots=4, directions=3, group_size=128, seed=1)
    down = random_packed([8, 6, 4, 2], 150, 37, slots=4, directions=3, group_size=128, seed=2)
    x = torch.randn(23, 150, generator=torch.Generator().manual_seed(0)).to(dtype) / 8
    index = torch.tensor([[token % 5, 3 * (token % 2)] for token in range(23)])  # 4 is another rank's
    biases = [torch.randn(4, n).to(torch.float64 if dtype == torch.float32 else dtype) for n in (74, 150)]
    arguments = (
        x, index, torch.rand(23, 2), list(gate_up.tensors), biases[0], list(down.tensors), biases[1], activation, 128,
    )  # fmt: skip
    actual, expected = ops.packed_experts(*arguments), packed_experts_reference(*arguments)
    assert actual.dtype == dtype
    tolerance = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 2e-2}[dtype]
    assert float((actual - expected).abs().max() / expected.abs().max()) < tolerance
    same, hidden = ops.packed_experts_hidden(*arguments)
    assert torch.equal(same, actual)
    states = packed_experts_hidden_reference(*arguments)[1]
    assert hidden.dtype == dtype
    assert float((hidden - states).abs().max() / states.abs().max()) < tolerance


def test_the_native_code_knows_every_activation() -> None:
    assert set(cpu_native.ACTIVATIONS) == set(ACTIVATIONS)


@needs_native
@pytest.mark.parametrize("broken", [float("nan"), float("inf")])
@pytest.mark.parametrize("rows", [1, 5])
def test_a_row_that_is_not_finite_spoils_no_other(rows: int, broken: float) -> None:
    packed = random_packed([4], 20, 200, slots=2, group_size=128).tensors
    x, ids = torch.randn(rows + 1, 200), torch.zeros(rows + 1, dtype=torch.int64)
    x[0, 7] = broken
    out = ops.packed_expert_linear(x, ids, list(packed), None, 128)
    assert not bool(torch.isfinite(out[0]).any())
    assert bool(torch.isfinite(out[1:]).all())


@needs_native
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scale", [0.0, 1e-30, 1e30])
def test_inputs_of_any_size(scale: float, dtype: torch.dtype) -> None:
    scale = min(scale, 1e3) if dtype == torch.float16 else scale
    packed = random_packed([2, 8], 20, 200, group_size=128).tensors
    x = (torch.randn(3, 200) * scale).to(dtype)
    ids = torch.tensor([0, 1, 1])
    out = cpu_native.expert_linear(x, ids, packed, None, 128)
    expected = packed_expert_linear_reference(x.double(), ids, list(packed), None, 128)
    assert float((out - expected).abs().max()) <= 1e-5 * float(expected.abs().max())


@needs_native
def test_threads_do_not_disturb_each_other() -> None:
    packed = random_packed([2, 4, 8], 96, 256, group_size=128)
    x = torch.randn(12, 256)
    ids = torch.arange(3).repeat_interleave(4)
    expected = ops.packed_expert_linear(x, ids, list(packed.tensors), None, 128)
    threads = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        assert torch.equal(ops.packed_expert_linear(x, ids, list(packed.tensors), None, 128), expected)
    finally:
        torch.set_num_threads(threads)


@needs_native
def test_without_tile_registers_vectors_do_the_same(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv(cpu_native.CACHE_VARIABLE, str(tmp_path))
    monkeypatch.setattr(cpu_native, "_FLAGS", (*cpu_native._FLAGS, "-mno-amx-int8", "-mno-amx-bf16", "-mno-amx-tile"))
    packed = random_packed([2, 4, 6, 8], 33, 200, slots=5, directions=3, group_size=128)
    blocks = [(0, 1), (1, 2), (2, 3), (3, 7)]
    ids = torch.tensor([expert for expert, count in blocks for _ in range(count)])
    x = torch.randn(ids.shape[0], 200)
    cpu_native._library.cache_clear()
    try:
        out = cpu_native.expert_linear(x, ids, packed.tensors, None, 128)
    finally:
        cpu_native._library.cache_clear()
    expected = packed_expert_linear_reference(x.double(), ids, list(packed.tensors), None, 128)
    assert float((out - expected).abs().max() / expected.abs().max()) < 1e-5


@pytest.fixture
def fresh(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Path]:
    """A library that is not loaded yet, with a cache folder of its own."""
    monkeypatch.setenv(cpu_native.CACHE_VARIABLE, str(tmp_path))
    monkeypatch.setattr(cpu_native, "cpu_flags", lambda: frozenset(cpu_native._NEEDED))
    cpu_native._library.cache_clear()
    yield tmp_path
    cpu_native._library.cache_clear()


def test_a_compiler_that_fails_is_said_once_and_other_kernels_run(
    fresh: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise subprocess.CalledProcessError(1, "g++", stderr="no such instruction")

    monkeypatch.setattr(cpu_native.subprocess, "run", fail)
    packed = random_packed([2, 4], 16, 128, group_size=128)
    x, ids = torch.randn(2, 128), torch.tensor([0, 1])
    out = ops.packed_expert_linear(x, ids, list(packed.tensors), None, 128)
    assert torch.allclose(out, packed_expert_linear_reference(x, ids, list(packed.tensors), None, 128), atol=1e-4)
    assert not cpu_native.serves(x, 128)
    assert [record.message for record in caplog.records if record.levelname == "WARNING"] == [
        "the native CPU kernels could not be compiled, slower ones run: no such instruction"
    ]
    assert not list(fresh.iterdir())


def test_another_cpu_takes_other_kernels(fresh: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu_native, "cpu_flags", lambda: frozenset({"avx2"}))
    x = torch.randn(2, 128)
    packed = random_packed([2, 4], 16, 128, group_size=128)
    assert cpu_native.library() is None
    assert not cpu_packed.has_kernels(x, packed.tensors, 128)
    set_compile_threshold(1)
    try:
        assert cpu_packed.has_kernels(x, packed.tensors, 128)
    finally:
        set_compile_threshold(None)


def test_groups_that_cut_a_tile_are_left_to_other_kernels() -> None:
    assert not cpu_native.serves(torch.randn(2, 128), 64)
    assert not cpu_native.serves(torch.randn(2, 128).double(), 128)
