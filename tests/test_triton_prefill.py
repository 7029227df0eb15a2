"""The prefill kernel in Triton's interpreter against the oracles, and its exactness argument in plain arithmetic.

The interpreter rounds to bfloat16 by cutting bits off, which doubles the rounding errors of a GPU.
"""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from packed import random_packed
from torch import Tensor
from triton import language as tl

from moe_compiler.kernels import triton_experts
from moe_compiler.kernels.experts import PackedExpertLinear
from moe_compiler.kernels.reference import (
    dequantize_reference,
    packed_expert_linear_reference,
    packed_experts_reference,
)
from moe_compiler.kernels.tiles import Tile
from moe_compiler.kernels.triton_digits import bias_of
from moe_compiler.kernels.triton_prefill_kernels import _zero_point_joins_bias
from moe_compiler.kernels.triton_routing import route

TILE = Tile(block_n=32, block_m=16, num_warps=4, num_stages=1)
TOLERANCE = {torch.float16: 1e-3, torch.bfloat16: 2e-2}
LAYER_TOLERANCE = {torch.float16: 5e-3, torch.bfloat16: 5e-2}


def relative(actual: Tensor, expected: Tensor) -> float:
    return float((actual.double() - expected.double()).norm() / expected.double().norm().clamp_min(1e-30))


def linear(x: Tensor, ids: Tensor, packed: PackedExpertLinear, bias: Tensor | None = None) -> Tensor:
    blocks = route(ids, packed.num_experts, TILE.block_m)
    return triton_experts.linear("prefill", x, ids, blocks, packed.tensors, bias, packed.group_size, TILE)


def layer(
    x: Tensor,
    ids: Tensor,
    routing_weights: Tensor,
    first: PackedExpertLinear,
    second: PackedExpertLinear,
    biases: tuple[Tensor | None, Tensor | None] = (None, None),
    activation: str = "silu",
    deterministic: bool = True,
) -> Tensor:
    rows = ids.reshape(-1)
    blocks = route(rows, first.num_experts, TILE.block_m)
    h = triton_experts.gate_up("prefill", x, rows, blocks, first.tensors, biases[0], activation, first.group_size, TILE)
    return triton_experts.down(
        "prefill",
        h,
        rows,
        blocks,
        routing_weights,
        second.tensors,
        biases[1],
        second.group_size,
        TILE,
        deterministic=deterministic,
    )


def check_layer(
    bits: tuple[int, ...],
    ids: Tensor,
    *,
    hidden: int = 40,
    intermediate: int = 24,
    group_size: int = 16,
    slots: int = 0,
    directions: int = 0,
    dtype: torch.dtype = torch.float16,
    bias: bool = False,
    activation: str = "silu",
) -> None:
    pool = {"slots": slots, "directions": directions, "group_size": group_size}
    first = random_packed(bits, 2 * intermediate, hidden, **pool)
    second = random_packed(bits[::-1], hidden, intermediate, **pool, seed=1)
    x = (torch.randn(ids.shape[0], hidden) * 0.05).to(dtype)
    routing_weights = torch.rand(ids.shape)
    biases = (None, None)
    if bias:
        biases = (torch.randn(len(bits), 2 * intermediate).to(dtype), torch.randn(len(bits), hidden).to(dtype))
    out = layer(x, ids, routing_weights, first, second, biases, activation)
    expected = packed_experts_reference(
        x, ids, routing_weights, first.tensors, biases[0], second.tensors, biases[1], activation, group_size
    )
    assert out.dtype == dtype
    assert out.shape == x.shape
    assert relative(out, expected) < LAYER_TOLERANCE[dtype]


@pytest.fixture(params=[False, True], ids=["positions", "whole tile"])
def _dot(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton_experts, "_dots_are_awaited", lambda: request.param)


@pytest.mark.usefixtures("_dot")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("bits", [2, 4, 6, 8])
def test_each_width(bits: int, dtype: torch.dtype) -> None:
    packed = random_packed((bits,), 33, 130, group_size=16)
    x, ids = torch.randn(5, 130).to(dtype), torch.zeros(5, dtype=torch.long)
    expected = packed_expert_linear_reference(x, ids, packed.tensors, None, 16)
    assert relative(linear(x, ids, packed), expected) < TOLERANCE[dtype]


@pytest.mark.usefixtures("_dot")
@pytest.mark.parametrize("bits", [2, 4, 6, 8])
def test_float16_weights_are_those_of_a_dense_layer(bits: int) -> None:
    """An identity as `x` makes the output the weights themselves: equal, not close."""
    packed = random_packed((bits,), 20, 16, group_size=16)
    out = linear(torch.eye(16, dtype=torch.float16), torch.zeros(16, dtype=torch.long), packed)
    assert torch.equal(out, dequantize_reference(packed.tensors, 16, 16)[0].half().T)


@pytest.mark.usefixtures("_dot")
@pytest.mark.parametrize("group_size", [64, 256])
def test_group_sizes(group_size: int) -> None:
    packed = random_packed((4, 6), 16, 300, group_size=group_size)
    x, ids = torch.randn(3, 300).half(), torch.tensor([1, 0, 1])
    expected = packed_expert_linear_reference(x, ids, packed.tensors, None, group_size)
    assert relative(linear(x, ids, packed), expected) < TOLERANCE[torch.float16]


@pytest.mark.usefixtures("_dot")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_layer_of_all_widths(dtype: torch.dtype) -> None:
    ids = torch.tensor([[0, 1], [2, 3], [3, 0], [1, 2], [0, 3]])
    check_layer((2, 4, 6, 8), ids, dtype=dtype, slots=30, bias=True)


@pytest.mark.parametrize("activation", ["silu", "gelu", "gelu_tanh", "relu"])
def test_activations(activation: str) -> None:
    check_layer((4, 8), torch.tensor([[0, 1], [1, 0]]), activation=activation, bias=True)


@pytest.mark.parametrize(
    "ids",
    [
        pytest.param(torch.empty(0, 2, dtype=torch.long), id="no tokens"),
        pytest.param(torch.tensor([[1, 2]]), id="one token, an expert with none"),
        pytest.param(torch.full((20, 1), 1), id="all on one expert"),
        pytest.param(torch.tensor([[3, 1], [3, 3], [0, 5], [9, 2]]), id="foreign experts"),
        pytest.param(torch.full((4, 2), 3), id="only foreign experts"),
    ],
)
def test_routings(ids: Tensor) -> None:
    check_layer((4, 2, 8), ids)


@pytest.mark.parametrize("pool", [{"slots": 3}, {"slots": 90}, {"directions": 6}])
def test_pools(pool: dict[str, int]) -> None:
    check_layer((4, 4), torch.tensor([[0, 1], [1, 0], [0, 0]]), **pool)


def test_one_expert_holds_the_pool() -> None:
    packed = random_packed((4, 6), 16, 64, slots=60)
    packed.pool.offset.copy_(torch.tensor([0, 0, 60]))
    x, ids = torch.randn(6, 64).half(), torch.tensor([0, 1] * 3)
    expected = packed_expert_linear_reference(x, ids, packed.tensors, None, 32)
    assert relative(linear(x, ids, packed), expected) < TOLERANCE[torch.float16]


def test_linear_shares_rows_of_x_and_clears_foreign_rows() -> None:
    packed = random_packed((4, 6), 16, 64)
    bias = torch.randn(2, 16).half()
    x = torch.randn(64, 3).half().T
    ids = torch.tensor([0, 1, 2, 0, 7, 2])
    out = linear(x, ids, packed, bias)
    assert relative(out, packed_expert_linear_reference(x, ids, packed.tensors, bias, 32)) < TOLERANCE[torch.float16]
    assert not out[[2, 4, 5]].any()


@given(st.lists(st.tuples(st.integers(0, 4), st.integers(0, 4)), min_size=1, max_size=12))
@settings(deadline=None, max_examples=4)
def test_random_routings(ids: list[tuple[int, int]]) -> None:
    check_layer((2, 4, 6, 8), torch.tensor(ids), slots=12)


def test_sums_repeat_bit_for_bit_and_atomics_agree() -> None:
    ids, routing_weights = torch.randint(0, 3, (7, 3)), torch.rand(7, 3).double()
    first, second = random_packed((4, 6, 2), 32, 32), random_packed((2, 4, 8), 32, 16, group_size=16)
    x = (torch.randn(7, 32) * 0.1).half()
    once, again = (layer(x, ids, routing_weights, first, second) for _ in range(2))
    assert torch.equal(once, again)
    atomic = layer(x, ids, routing_weights, first, second, deterministic=False)
    assert relative(atomic, once) < 1e-3


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("planes", [1, 2, 3, 4])
def test_difference_of_code_and_zero_point_is_exact(planes: int, dtype: torch.dtype) -> None:
    """The half-precision steps of the assembly path, for every code and zero point of a width."""
    triton_dtype = tl.float16 if dtype == torch.float16 else tl.bfloat16
    codes = torch.arange(4**planes, dtype=torch.float32)[:, None]
    zero_points = torch.arange(256, dtype=torch.float32) * 4.0 ** (planes - 4)
    exact = codes - zero_points
    assert torch.equal((codes.to(dtype) - zero_points.to(dtype)).float(), exact)
    joined = [j for j in range(8) if _zero_point_joins_bias(j, planes, triton_dtype)]
    assert bool(joined) == (dtype == torch.float16)
    for position in joined:
        bias = float(bias_of(position, planes, triton_dtype))
        biased, subtracted = (codes + bias).to(dtype), (zero_points + bias).to(dtype)
        assert torch.equal(subtracted.float(), zero_points + bias)
        assert torch.equal((biased - subtracted).float(), exact)


def test_refuses_an_unknown_activation() -> None:
    packed, ids = random_packed((4,), 32, 32), torch.zeros(1, dtype=torch.long)
    with pytest.raises(ValueError, match=r"`activation` must be one of silu, .* but is 'swish'"):
        triton_experts.gate_up(
            "prefill", torch.zeros(1, 32).half(), ids, route(ids, 1, 16), packed.tensors, None, "swish", 32, TILE
        )


def test_refuses_blocks_of_another_size() -> None:
    packed, ids = random_packed((4,), 32, 32), torch.zeros(1, dtype=torch.long)
    with pytest.raises(ValueError, match=r"`tile.block_m` is 16, but `blocks` were made for 32"):
        triton_experts.linear(
            "prefill", torch.zeros(1, 32).half(), ids, route(ids, 1, 32), packed.tensors, None, 32, TILE
        )


@pytest.mark.parametrize(
    ("dtype", "group_size", "error", "match"),
    [
        (torch.float32, 32, TypeError, "`x` must be float16 or bfloat16, but is torch.float32"),
        (torch.float16, 48, ValueError, "`group_size` must be .* but is 48"),
    ],
)
def test_refuses_what_the_kernel_cannot_read(
    dtype: torch.dtype, group_size: int, error: type[Exception], match: str
) -> None:
    packed, ids = random_packed((4,), 32, 32), torch.zeros(1, dtype=torch.long)
    with pytest.raises(error, match=match):
        triton_experts.linear(
            "prefill", torch.zeros(1, 32).to(dtype), ids, route(ids, 1, 16), packed.tensors, None, group_size, TILE
        )
