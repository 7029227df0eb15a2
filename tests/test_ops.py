"""Every operator against its oracle, and against what PyTorch asks of a custom operator."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from packed import op_arguments, random_packed

from moe_compiler.kernels import ops
from moe_compiler.kernels.activation import ACTIVATIONS
from moe_compiler.kernels.buffers import FixedDtypeBuffers
from moe_compiler.kernels.linear import PackedLinear
from moe_compiler.kernels.reference import (
    expert_linear_reference,
    observe_experts_reference,
    packed_expert_linear_reference,
    packed_experts_hidden_reference,
    packed_experts_reference,
)

WIDTH = st.sampled_from([2, 4, 6, 8])
ROUTINGS = {
    "no tokens": [],
    "one token": [1],
    "an expert with none": [0, 0, 2, 2],
    "all on one expert": [1, 1, 1, 1],
    "another rank's": [3, 0, 3, 1],
}


def assert_close(actual: torch.Tensor, expected: torch.Tensor, tolerance: float = 1e-5) -> None:
    assert actual.shape == expected.shape
    assert actual.dtype == expected.dtype
    scale = float(expected.abs().max()) if expected.numel() else 1.0
    assert float((actual - expected).abs().max() if expected.numel() else 0.0) <= tolerance * max(scale, 1e-6)


@settings(deadline=None, max_examples=40)
@given(
    bits=st.lists(WIDTH, min_size=1, max_size=5),
    shape=st.tuples(st.integers(1, 20), st.integers(1, 200)),
    tokens=st.integers(0, 7),
    top_k=st.integers(1, 3),
    per_row=st.booleans(),
    data=st.data(),
)
def test_packed_linear_equals_its_oracle(bits, shape, tokens, top_k, per_row, data) -> None:  # type: ignore[no-untyped-def]
    slots = data.draw(st.integers(0, min(8, len(bits) * shape[1])))
    directions = data.draw(st.sampled_from([0, 0, 3]))
    packed = random_packed(bits, *shape, slots=slots, directions=directions, seed=data.draw(st.integers(0, 9)))
    rows = tokens * top_k
    ids = torch.tensor(data.draw(st.lists(st.integers(0, len(bits)), min_size=rows, max_size=rows)), dtype=torch.int64)
    x = torch.randn(rows if per_row else tokens, shape[1])
    bias = torch.randn(len(bits), shape[0]) if data.draw(st.booleans()) else None
    arguments = op_arguments(packed, x, ids, bias)
    assert_close(ops.packed_expert_linear(*arguments), packed_expert_linear_reference(*arguments))


@settings(deadline=None, max_examples=25)
@given(
    bits=st.lists(WIDTH, min_size=1, max_size=4),
    hidden=st.integers(1, 150),
    intermediate=st.integers(1, 40),
    tokens=st.integers(0, 6),
    top_k=st.integers(1, 3),
    activation=st.sampled_from([*ACTIVATIONS]),
    with_bias=st.booleans(),
    data=st.data(),
)
def test_packed_experts_equal_their_oracle(  # type: ignore[no-untyped-def]
    bits, hidden, intermediate, tokens, top_k, activation, with_bias, data
) -> None:
    seed = data.draw(st.integers(0, 9))
    gate_up = random_packed(bits, 2 * intermediate, hidden, slots=min(4, hidden), seed=seed)
    down = random_packed(bits[::-1], hidden, intermediate, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    index = torch.randint(0, len(bits) + 1, (tokens, top_k), generator=generator)
    biases = [torch.randn(len(bits), n, generator=generator) for n in (2 * intermediate, hidden)]
    arguments = (
        torch.randn(tokens, hidden, generator=generator),
        index,
        torch.rand(tokens, top_k, generator=generator),
        list(gate_up.tensors),
        biases[0] if with_bias else None,
        list(down.tensors),
        biases[1] if with_bias else None,
        activation,
        32,
    )
    assert_close(ops.packed_experts(*arguments), packed_experts_reference(*arguments))
    for actual, expected in zip(
        ops.packed_experts_hidden(*arguments), packed_experts_hidden_reference(*arguments), strict=True
    ):
        assert_close(actual, expected)


def test_an_unknown_activation_is_refused() -> None:
    packed = list(random_packed([4], 8, 8).tensors)
    ones = torch.ones(1, 8), torch.zeros(1, 1, dtype=torch.int64), torch.ones(1, 1)
    with pytest.raises(ValueError, match=r"`activation` must be one of silu, gelu, gelu_tanh, relu, but is 'mish'"):
        ops.packed_experts(*ones, packed, None, packed, None, "mish", 32)


@pytest.mark.parametrize("ids", ROUTINGS.values(), ids=ROUTINGS.keys())
@pytest.mark.parametrize("transposed", [False, True])
def test_linear_equals_its_oracle(ids: list[int], transposed: bool) -> None:
    weight = torch.randn(3, 12, 5) if transposed else torch.randn(3, 5, 12)
    expert_ids = torch.tensor(ids, dtype=torch.int64)
    x = torch.randn(12, len(ids)).t()  # not contiguous
    arguments = (x, expert_ids, weight, torch.randn(3, 5), transposed)
    assert_close(ops.expert_linear(*arguments), expert_linear_reference(*arguments))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_packed_linear_keeps_the_dtype(dtype: torch.dtype) -> None:
    packed = random_packed([2, 8], 16, 128, slots=3)
    x, ids = torch.randn(6, 128).to(dtype), torch.tensor([0, 1, 1, 0, 0, 1])
    arguments = op_arguments(packed, x, ids)
    tolerance = 2e-2 if dtype != torch.float64 else 1e-6
    assert_close(ops.packed_expert_linear(*arguments), packed_expert_linear_reference(*arguments), tolerance)


def test_dequantized_weight_is_what_the_operator_multiplies_with() -> None:
    packed = random_packed([4, 2, 6], 8, 130, slots=5)
    ids = torch.arange(3).repeat_interleave(130)
    columns = ops.packed_expert_linear(*op_arguments(packed, torch.eye(130).repeat(3, 1), ids))
    assert_close(columns.view(3, 130, 8).transpose(1, 2).contiguous(), packed.dequantize())


@settings(deadline=None, max_examples=25)
@given(tokens=st.integers(0, 6), top_k=st.integers(1, 3), per_row=st.booleans(), seed=st.integers(0, 9))
def test_observer_equals_its_oracle(tokens: int, top_k: int, per_row: bool, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    rows = tokens * top_k
    ids = torch.randint(0, 5, (rows,), generator=generator)  # 4 is another rank's
    x = torch.randn(rows if per_row else tokens, 7, generator=generator)
    gate, token_weight = torch.rand(rows, generator=generator), torch.rand(tokens, generator=generator)
    sums = {
        "abs_sum": torch.zeros(4, 7, dtype=torch.float64),
        "sq_sum": torch.zeros(4, 7, dtype=torch.float64),
        "hessian": torch.zeros(4, 7, 7),
    }
    ops.observe_experts_(x, ids, gate, token_weight, *sums.values())
    expected = observe_experts_reference(x, ids, gate, token_weight, 4)
    for name, value in sums.items():
        assert_close(value.double(), expected[name])


def test_routing_observer_counts_tokens_weights_and_gates() -> None:
    ids, gate = torch.tensor([0, 2, 2, 1, 3, 0]), torch.tensor([0.5, 0.5, 0.25, 0.75, 1.0, 0.5])
    tokens, count = torch.zeros(3, dtype=torch.float64), torch.zeros(3, dtype=torch.int64)
    token_mass, gate_mass = torch.zeros(3, dtype=torch.float64), torch.zeros(3, dtype=torch.float64)
    ops.observe_routing_(ids, gate, torch.tensor([1.0, 2.0, 4.0]), 2, tokens, count, token_mass, gate_mass)
    assert tokens.tolist() == [3, 7, 2]
    assert count.tolist() == [2, 1, 2]  # the pair of id 3 is another rank's
    assert token_mass.tolist() == [1 + 4, 2, 1 + 2]
    assert gate_mass.tolist() == [0.5 + 4 * 0.5, 2 * 0.75, 0.5 + 2 * 0.25]


def test_operators_pass_opcheck() -> None:
    ids = torch.tensor([0, 1, 1, 0])
    x, gate = torch.randn(2, 128), torch.rand(4)
    packed = random_packed([2, 8], 16, 128, slots=3)
    torch.library.opcheck(ops.packed_expert_linear, op_arguments(packed, x, ids))
    down = random_packed([4, 2, 8], packed.in_features, packed.out_features // 2)
    routing = torch.tensor([[0, 1], [2, 1]]), torch.rand(2, 2)
    tensors = list(packed.tensors), None, list(down.tensors), None
    for one in (ops.packed_experts, ops.packed_experts_hidden):
        torch.library.opcheck(one, (torch.randn(2, packed.in_features), *routing, *tensors, "silu", 32))
    torch.library.opcheck(ops.expert_linear, (x, ids, torch.randn(2, 16, 128), None, False))
    sums = [torch.zeros(2, 128, dtype=torch.float64) for _ in range(2)]
    torch.library.opcheck(ops.observe_experts_, (x, ids, gate, torch.ones(1), *sums, torch.zeros(2, 128, 128)))
    masses = [torch.zeros(2, dtype=torch.float64) for _ in range(2)]
    torch.library.opcheck(
        ops.observe_routing_,
        (ids, gate, torch.ones(1), 2, torch.zeros(3, dtype=torch.float64), torch.zeros(2).long(), *masses),
    )


def test_weights_left_on_the_meta_device_are_an_error() -> None:
    with pytest.raises(RuntimeError, match="`x` is on cpu but the experts' weights are on meta"):
        ops.expert_linear(torch.randn(2, 4), torch.tensor([0, 1]), torch.empty(2, 3, 4, device="meta"), None, False)


@torch.no_grad()
def test_packed_linear_module_equals_a_linear() -> None:
    packed = random_packed([8], 10, 96)
    module = PackedLinear(packed, torch.nn.Parameter(torch.randn(10)))
    x = torch.randn(2, 3, 96)
    expected = torch.nn.functional.linear(x, packed.dequantize()[0], module.bias)
    assert_close(module(x), expected)
    assert "bits=8" in repr(module)


def test_format_dtypes_survive_a_change_of_dtype() -> None:
    module = PackedLinear(random_packed([8], 10, 96), torch.nn.Parameter(torch.randn(10)))
    scale = module.weight_scale.clone()
    module.to(torch.bfloat16)
    assert isinstance(module, FixedDtypeBuffers)
    assert module.bias.dtype == torch.bfloat16
    assert torch.equal(module.weight_scale, scale)
    assert module.weight_scale.dtype == torch.float16
    assert module.to("meta").weight_scale.dtype == torch.float16


def test_effective_bits_are_the_sizes_of_the_buffers() -> None:
    packed = random_packed([2, 4, 6, 8], 64, 256, group_size=128)
    weights = 4 * 64 * 256
    codes = 8 * packed.planes.numel() * 2 / weights
    assert (codes, packed.code_bits) == (5.0, 5.0)
    scales = (16 + 8) / 128
    table = 4 * 64 / weights
    pool = (5 * 32 + 2 * (32 + 32 + 64 * 8)) / weights
    assert packed.effective_bits == pytest.approx(codes + scales + table + pool)
