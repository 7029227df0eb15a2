"""The CPU kernels: their formulas against the oracles, and what compiling them promises."""

import logging
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from packed import op_arguments, random_packed
from torch import Tensor

from moe_compiler.kernels import cpu_compile, cpu_native, cpu_packed, ops
from moe_compiler.kernels.activation import ACTIVATIONS
from moe_compiler.kernels.cpu_compile import compile_threshold, compiled, set_compile_threshold
from moe_compiler.kernels.cpu_gemv import row_blocks
from moe_compiler.kernels.cpu_packed import MAX_FEW_ROWS, plan_rows
from moe_compiler.kernels.cpu_words import BYTES, INTEGERS, expert_words, fields
from moe_compiler.kernels.planes import pack
from moe_compiler.kernels.reference import packed_expert_linear_reference, packed_experts_reference

WIDTH = st.sampled_from([2, 4, 6, 8])
GROUP = st.sampled_from([16, 32, 64, 128, 256])


def assert_close(actual: Tensor, expected: Tensor, tolerance: float = 1e-5) -> None:
    assert actual.shape == expected.shape
    assert actual.dtype == expected.dtype
    if expected.numel():
        error = float((actual.double() - expected.double()).abs().max())
        assert error <= tolerance * max(float(expected.double().abs().max()), 1e-6)


@pytest.fixture(autouse=True, scope="module")
def without_native_kernels() -> Iterator[None]:
    """A CPU that has no native kernels: these are the others."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cpu_native, "library", lambda: None)
        yield


@pytest.fixture(autouse=True)
def fresh(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is compiled yet, and everything is worth compiling."""
    monkeypatch.setattr(cpu_compile, "_state", cpu_compile._State())
    set_compile_threshold(0)


@pytest.fixture
def uncompiled(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Formulas run as they stand; the names of those that would have been compiled."""
    names: list[str] = []

    def keep(name: str, formula: Callable[..., Tensor], *_: Any) -> Callable[..., Tensor]:
        names.append(name)
        return formula

    monkeypatch.setattr(cpu_compile, "_compile", keep)
    return names


@pytest.mark.parametrize("form", [BYTES, INTEGERS], ids=["bytes", "integers"])
@given(bits=WIDTH, rows=st.integers(1, 5), columns=st.integers(1, 300), data=st.data())
@settings(deadline=None, max_examples=20)
def test_fields_are_the_codes_of_their_channels(form: Any, bits: int, rows: int, columns: int, data: Any) -> None:
    codes = torch.randint(0, 1 << bits, (rows, columns), dtype=torch.uint8)
    first = data.draw(st.integers(0, rows - 1))
    words = expert_words(pack(codes, bits).view(-1), form, 0, bits // 2, rows, -(-columns // 128), slice(first, rows))
    expected = form.channels(codes[first:].int())  # (rows, tiles, digits, lanes)
    seen = set()
    for field in fields(words.int().unbind(1), form):
        code = expected[:, :, field.digit].transpose(0, 1)
        assert torch.equal(field.codes(), code)
        assert torch.equal(field.shifted_codes(), code << field.shift)
        seen.add(field.digit)
    assert seen == set(range(form.digits))


@given(st.integers(1, 40))
def test_blocks_hold_all_rows_of_an_expert(rows: int) -> None:
    sizes = row_blocks(rows)
    assert rows <= sum(sizes) <= rows + 1
    assert set(sizes) <= {1, 2, 4}


@given(ids=st.lists(st.integers(0, 4), max_size=40))
@settings(deadline=None)
def test_a_plan_has_every_row_of_a_known_expert_once(ids: list[int]) -> None:
    plan = plan_rows(torch.tensor(ids, dtype=torch.int64), 4)
    few, start = [], 0
    for block in plan.blocks:
        assert all(ids[row] == block.expert for row in plan.rows[start : start + block.rows].tolist())
        start += block.rows
    few = plan.rows[plan.once].tolist()
    many = [row for _, rows in plan.many for row in rows.tolist()]
    assert sorted(few + many) == [row for row, expert in enumerate(ids) if expert < 4]
    assert all(len(rows) > MAX_FEW_ROWS for _, rows in plan.many)


@given(
    bits=st.lists(WIDTH, min_size=1, max_size=4),
    shape=st.tuples(st.integers(1, 20), st.integers(1, 300)),
    group_size=GROUP,
    tokens=st.integers(0, 14),
    top_k=st.integers(1, 3),
    per_row=st.booleans(),
    data=st.data(),
)
@settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_linear_formulas_equal_the_oracle(  # type: ignore[no-untyped-def]
    uncompiled, bits, shape, group_size, tokens, top_k, per_row, data
) -> None:
    slots = data.draw(st.integers(0, min(8, len(bits) * shape[1])))
    directions = data.draw(st.sampled_from([0, 0, 3]))
    seed = data.draw(st.integers(0, 9))
    packed = random_packed(bits, *shape, slots=slots, directions=directions, group_size=group_size, seed=seed)
    rows = tokens * top_k
    experts = data.draw(st.integers(1, len(bits)))  # fewer give more rows to each
    ids = torch.tensor(data.draw(st.lists(st.integers(0, experts), min_size=rows, max_size=rows)), dtype=torch.int64)
    x = torch.randn(shape[1], rows if per_row else tokens).t()  # not contiguous
    bias = torch.randn(len(bits), shape[0]) if data.draw(st.booleans()) else None
    arguments = op_arguments(packed, x, ids, bias)
    assert_close(ops.packed_expert_linear(*arguments), packed_expert_linear_reference(*arguments))


def layer(
    bits: Sequence[int], hidden: int, intermediate: int, tokens: int, dtype: torch.dtype = torch.float32, **options: Any
) -> list[Any]:
    """The arguments of `packed_experts`; one id in a few is another rank's."""
    torch.manual_seed(tokens)
    group_size = options.pop("group_size", 128)
    gate_up = random_packed(bits, 2 * intermediate, hidden, slots=4, group_size=group_size)
    down = random_packed(bits[::-1], hidden, intermediate, directions=2, group_size=group_size)
    biases = [
        torch.randn(len(bits), size) if options.get("bias", True) else None for size in (2 * intermediate, hidden)
    ]
    x = (torch.randn(tokens, hidden) * 0.05).to(dtype)
    index, weights = torch.randint(0, len(bits) + 1, (tokens, 2)), torch.rand(tokens, 2)
    activation = options.get("activation", "silu")
    return [x, index, weights, list(gate_up.tensors), biases[0], list(down.tensors), biases[1], activation, group_size]


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("tokens", [0, 1, 5, 40])
def test_layer_formulas_equal_the_oracle(uncompiled: list[str], activation: str, bias: bool, tokens: int) -> None:
    arguments = layer([2, 4, 6, 8], 140, 33, tokens, activation=activation, bias=bias)
    assert_close(ops.packed_experts(*arguments), packed_experts_reference(*arguments))
    assert set(uncompiled) == {0: set(), 1: {"gemv"}, 5: {"gemv"}, 40: {"dequantize"}}[tokens]


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.bfloat16, 1.5e-2), (torch.float16, 2e-3), (torch.float64, 1e-6)]
)
@pytest.mark.parametrize("tokens", [3, 40])
def test_layer_formulas_keep_the_dtype(
    uncompiled: list[str], dtype: torch.dtype, tolerance: float, tokens: int
) -> None:
    arguments = layer([4, 8], 300, 40, tokens, dtype, group_size=64)
    assert_close(ops.packed_experts(*arguments), packed_experts_reference(*arguments), tolerance)
    assert bool(uncompiled) == (dtype != torch.float64)


def test_dequantized_bfloat16_is_rounded_to_the_nearest(uncompiled: list[str]) -> None:
    packed = random_packed([2, 4, 6, 8], 30, 260, group_size=128)
    for expert in range(4):
        ids = torch.full((260,), expert)
        identity = torch.eye(260, dtype=torch.bfloat16)
        weight = ops.packed_expert_linear(*op_arguments(packed, identity, ids)).t()
        exact = packed.dequantize_expert(expert)
        assert torch.all((weight.float() - exact).abs() <= exact.abs() * 2.0**-8)


@pytest.fixture
def log(caplog: pytest.LogCaptureFixture) -> Iterator[pytest.LogCaptureFixture]:
    with caplog.at_level(logging.INFO, logger=cpu_compile.logger.name):
        yield caplog


def test_compiled_layers_equal_the_oracle_in_and_out_of_a_compiled_caller(log: pytest.LogCaptureFixture) -> None:
    """Few and many rows, in float32 and bfloat16, within `torch.compile` and under a stance against recompiling."""
    caller = torch.compile(lambda *args: ops.packed_experts(*args) * 2, fullgraph=True, dynamic=True)
    for tokens in (2, 40):
        arguments = layer([4], 128, 64, tokens)
        expected = packed_experts_reference(*arguments)
        assert_close(caller(*arguments), 2 * expected)
        compiled_so_far = len(cpu_compile._state.kernels)
        with torch.compiler.set_stance("fail_on_recompile"):
            half = layer([4], 128, 64, tokens, torch.bfloat16)
            assert_close(ops.packed_experts(*half), packed_experts_reference(*half), 1.5e-2)
        torch.compiler.reset()
        assert_close(ops.packed_experts(*arguments), expected)
        assert len(cpu_compile._state.kernels) <= compiled_so_far + 2
    assert "compiling the CPU kernel gemv for" in log.text
    assert "compiling the CPU kernel dequantize for" in log.text


def test_one_kernel_serves_any_number_of_experts_and_planes() -> None:
    for experts in (1, 3, 2):
        packed = random_packed([2] * experts + [8] * (3 - experts), 16, 128, group_size=128, seed=experts)
        arguments = op_arguments(packed, torch.randn(experts, 128), torch.arange(experts))
        assert_close(ops.packed_expert_linear(*arguments), packed_expert_linear_reference(*arguments))
    assert len(cpu_compile._state.kernels) == 1


@pytest.mark.parametrize("rows", [1, MAX_FEW_ROWS + 1])
def test_a_kernel_compiled_for_one_group_a_row_serves_two(rows: int) -> None:
    for group_size in (256, 128):
        packed = random_packed([4], 16, 256, group_size=group_size, seed=group_size)
        ids = torch.zeros(rows, dtype=torch.int64)
        arguments = op_arguments(packed, torch.randn(rows, 256), ids)
        assert_close(ops.packed_expert_linear(*arguments), packed_expert_linear_reference(*arguments))


def test_threads_share_one_compilation() -> None:
    packed = random_packed([4], 16, 128, group_size=128)
    arguments = op_arguments(packed, torch.randn(1, 128), torch.zeros(1, dtype=torch.int64))
    with ThreadPoolExecutor(4) as threads:
        results = list(threads.map(lambda _: ops.packed_expert_linear(*arguments), range(16)))
    for result in results:
        assert_close(result, packed_expert_linear_reference(*arguments))
    assert len(cpu_compile._state.kernels) == 1


def test_more_classes_than_dynamo_would_compile() -> None:
    x = torch.arange(4.0)
    kernels = [
        compiled("power", power, partial(torch.mul, other=2.0**power), (x,), half_vectors=False) for power in range(9)
    ]
    assert all(torch.equal(kernel(x), x * 2.0**power) for power, kernel in enumerate(kernels))
    assert len(set(map(id, kernels))) == 9


def test_few_weights_are_not_worth_compiling(uncompiled: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = op_arguments(random_packed([4], 8, 128), torch.randn(1, 128), torch.zeros(1, dtype=torch.int64))
    set_compile_threshold(8 * 128 + 1)
    ops.packed_expert_linear(*arguments)
    assert not uncompiled
    set_compile_threshold(8 * 128)
    ops.packed_expert_linear(*arguments)
    assert uncompiled == ["gemv"]
    set_compile_threshold(None)
    monkeypatch.delenv(cpu_compile.THRESHOLD_VARIABLE, raising=False)
    assert compile_threshold() == cpu_compile.DEFAULT_THRESHOLD
    monkeypatch.setenv(cpu_compile.THRESHOLD_VARIABLE, "12")
    assert compile_threshold() == 12


def test_a_bad_threshold_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="`weights` must be a number of weights, 0 or more, but is -1"):
        set_compile_threshold(-1)
    set_compile_threshold(None)
    monkeypatch.setenv(cpu_compile.THRESHOLD_VARIABLE, "many")
    with pytest.raises(ValueError, match=r"`MOE_COMPILER_CPU_COMPILE_THRESHOLD` must be a number .* but is 'many'"):
        compile_threshold()


def test_other_group_sizes_take_the_plain_form(uncompiled: list[str]) -> None:
    packed = random_packed([4], 8, 96, group_size=24)
    arguments = op_arguments(packed, torch.randn(2, 96), torch.zeros(2, dtype=torch.int64))
    assert_close(ops.packed_expert_linear(*arguments), packed_expert_linear_reference(*arguments))
    assert not uncompiled


def test_without_a_compiler_the_plain_form_runs(log: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_compiler(*_: Any) -> None:
        raise torch._inductor.exc.InvalidCxxCompiler

    monkeypatch.setattr(torch._inductor, "compile", no_compiler)
    for tokens in (1, 30):
        arguments = layer([2, 4], 130, 12, tokens)
        assert_close(ops.packed_experts(*arguments), packed_experts_reference(*arguments))
        linear = [arguments[0], arguments[1][:, 0], *arguments[3:5], arguments[-1]]
        assert_close(ops.packed_expert_linear(*linear), packed_expert_linear_reference(*linear))
    warnings = [record.getMessage() for record in log.records if record.levelno == logging.WARNING]
    assert len(warnings) == 1
    assert "the CPU kernels cannot be compiled and run as plain PyTorch calls" in warnings[0]
    assert not cpu_packed.has_kernels(arguments[0], cpu_packed.PackedTensors(*arguments[3]), 128)
