"""The Triton kernels for few tokens per expert in Triton's interpreter, against the oracles in float64."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from packed import random_packed
from torch import Tensor

from moe_compiler.kernels import triton_experts
from moe_compiler.kernels.activation import ACTIVATIONS, gated
from moe_compiler.kernels.packed import PackedTensors
from moe_compiler.kernels.pool import ChannelPool
from moe_compiler.kernels.reference import packed_expert_linear_reference, packed_experts_reference
from moe_compiler.kernels.tiles import Tile
from moe_compiler.kernels.triton_routing import Blocks, route

TILE = Tile(block_n=32, block_m=8, num_warps=1, num_stages=2)
DTYPES = (torch.float16, torch.bfloat16)
ROUNDING = {torch.float16: 2.0**-10, torch.bfloat16: 2.0**-6}  # the interpreter truncates to bfloat16


def assert_near(actual: Tensor, expected: Tensor, dtype: torch.dtype) -> None:
    """Equal up to a rounding of the largest element: what storing results and pool columns in `dtype` may cost."""
    assert actual.shape == expected.shape
    largest = float(expected.abs().max()) if expected.numel() else 0.0
    torch.testing.assert_close(actual.double(), expected.double(), rtol=0, atol=ROUNDING[dtype] * largest)


def blocks_for(ids: Tensor, num_experts: int, blocked: bool) -> Blocks | None:
    return route(ids, num_experts, TILE.block_m) if blocked else None


def check_linear(
    weight: PackedTensors,
    x: Tensor,
    ids: Tensor,
    group_size: int,
    *,
    bias: Tensor | None = None,
    blocked: bool = False,
) -> Tensor:
    blocks = blocks_for(ids, weight.num_experts, blocked)
    out = triton_experts.linear("decode", x, ids, blocks, weight, bias, group_size, TILE)
    assert out.dtype == x.dtype
    assert_near(out, packed_expert_linear_reference(x.double(), ids, weight, bias, group_size), x.dtype)
    return out


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("bits", "group_size"), [(2, 16), (2, 128), (4, 32), (4, 128), (6, 64), (8, 128)])
def test_each_width(bits, group_size, dtype):
    packed = random_packed((bits,), 32, 128, group_size=group_size)
    check_linear(packed.tensors, torch.randn(1, 128).to(dtype), torch.tensor([0]), group_size)


@pytest.mark.parametrize(
    ("in_features", "group_size", "blocked"), [(144, 16, False), (136, 64, True), (300, 128, False), (200, 256, True)]
)
def test_odd_shapes_and_mixed_widths(in_features, group_size, blocked):
    packed = random_packed((8, 2, 6, 4), 37, in_features, group_size=group_size, slots=3)
    x = torch.randn(1, in_features).half()
    check_linear(packed.tensors, x, torch.tensor([2, 3 if blocked else 1]), group_size, blocked=blocked)


@settings(max_examples=6, deadline=None)
@given(data=st.data(), blocked=st.booleans(), dtype=st.sampled_from(DTYPES))
def test_any_routing(data, blocked, dtype):
    bits = data.draw(st.lists(st.sampled_from((2, 4, 6, 8)), min_size=1, max_size=3))
    tokens, top_k = data.draw(st.sampled_from(((0, 1), (1, 1), (1, 3), (3, 1), (2, 2))))
    ids = data.draw(st.lists(st.integers(0, len(bits)), min_size=tokens * top_k, max_size=tokens * top_k))
    packed = random_packed(bits, 20, 40, group_size=16, slots=5)
    ids = torch.tensor(ids, dtype=torch.int64)
    out = check_linear(packed.tensors, torch.randn(tokens, 40).to(dtype), ids, 16, blocked=blocked)
    assert not out[ids == len(bits)].any()


def test_many_rows_of_one_expert_fill_several_blocks():
    packed = random_packed((4, 2), 16, 32)
    ids = torch.tensor([1] * 11 + [2] * 3 + [1] * 7)
    check_linear(packed.tensors, torch.randn(21, 32).half(), ids, 32, blocked=True)


def with_pool(weight: PackedTensors, pool: ChannelPool) -> PackedTensors:
    return weight._replace(**{f"pool_{name}": tensor for name, tensor in pool.tensors().items()})


@pytest.mark.parametrize("dtype", DTYPES)
def test_one_expert_holds_the_whole_pool(dtype):
    packed = random_packed((4, 4), 24, 64)
    like = ChannelPool.empty(2, 50, 24, 64)
    pool = ChannelPool.from_columns(torch.ones(50, dtype=torch.int64), torch.arange(50), torch.randn(50, 24), like)
    weight = with_pool(packed.tensors, pool)
    check_linear(weight, torch.randn(1, 64).to(dtype), torch.tensor([0, 1]), 32)


def test_no_pool_at_all():
    packed = random_packed((4,), 24, 64)
    weight = with_pool(packed.tensors, ChannelPool.empty(1, 0, 24, 64))
    check_linear(weight, torch.randn(1, 64).half(), torch.tensor([0]), 32)


@pytest.mark.parametrize("dtype", DTYPES)
def test_low_rank_slots(dtype):
    packed = random_packed((4, 2), 24, 72, directions=6)
    check_linear(packed.tensors, torch.randn(3, 72).to(dtype), torch.tensor([0, 1, 1]), 32, blocked=True)


def test_low_rank_slots_beside_channels():
    packed = random_packed((4, 2), 24, 72, directions=6)
    index = packed.pool.index.clone()
    index[1:4] = torch.tensor([5, 0, 71], dtype=torch.int32)
    weight = packed.tensors._replace(pool_index=index)
    check_linear(weight, torch.randn(2, 72).half(), torch.tensor([0, 1]), 32)


def test_pool_contents_are_read_at_every_call():
    packed = random_packed((4,), 16, 32, slots=4)
    x, ids = torch.randn(1, 32).half(), torch.tensor([0])
    before = check_linear(packed.tensors, x, ids, 32)
    packed.pool.offset.zero_()
    assert not torch.equal(check_linear(packed.tensors, x, ids, 32), before)


def test_bias_and_strided_inputs():
    packed = random_packed((4, 8), 24, 64)
    x = torch.randn(64, 6).half().t()[::2]
    ids = torch.tensor([1, 9, 0, 9, 1, 9])[::2]
    bias = torch.randn(24, 2).t()
    check_linear(packed.tensors, x, ids, 32, bias=bias)


@pytest.mark.parametrize(("activation", "blocked"), list(zip(ACTIVATIONS, (True, False, False, True), strict=True)))
def test_gate_up(activation, blocked):
    packed = random_packed((4, 2, 8), 2 * 19, 64, slots=4)
    x, ids, bias = torch.randn(2, 64).half(), torch.tensor([2, 3]), torch.randn(3, 2 * 19)
    both = packed_expert_linear_reference(x.double(), ids, packed.tensors, bias, 32)
    h = triton_experts.gate_up(
        "decode", x, ids, blocks_for(ids, 3, blocked), packed.tensors, bias, activation, 32, TILE
    )
    assert_near(h, gated(both, activation), torch.float16)
    assert not h[1].any()


@pytest.mark.parametrize(("dtype", "blocked"), list(zip(DTYPES, (True, False), strict=True)))
def test_both_halves_make_the_layer(dtype, blocked):
    gate_up, down = random_packed((2, 8, 4), 48, 40, slots=4), random_packed((6, 4, 2), 40, 24, slots=4)
    gate_up_bias, down_bias = torch.randn(3, 48), torch.randn(3, 40)
    x = torch.randn(2, 40).to(dtype)
    index, weights = torch.tensor([[1, 3], [0, 1]]), torch.rand(2, 2)
    ids = index.flatten()
    blocks = blocks_for(ids, 3, blocked)
    h = triton_experts.gate_up("decode", x, ids, blocks, gate_up.tensors, gate_up_bias, "silu", 32, TILE)
    expected = packed_experts_reference(
        x.double(), index, weights, gate_up.tensors, gate_up_bias, down.tensors, down_bias, "silu", 32
    )
    for deterministic in (True, False):
        out = triton_experts.down(
            "decode", h, ids, blocks, weights, down.tensors, down_bias, 32, TILE, deterministic=deterministic
        )
        assert out.dtype == dtype
        torch.testing.assert_close(
            out.double(), expected, rtol=0, atol=2 * ROUNDING[dtype] * float(expected.abs().max())
        )


def test_down_is_the_same_twice_and_close_to_its_atomic_form():
    packed = random_packed((4, 6), 40, 32, slots=4)
    h, ids, weights = torch.randn(8, 32).half(), torch.randint(0, 2, (8,)), torch.rand(4, 2).t().contiguous().t()
    blocks = route(ids, 2, TILE.block_m)
    arguments = (h, ids, blocks, weights, packed.tensors, None, 32, TILE)
    first = triton_experts.down("decode", *arguments, deterministic=True)
    assert torch.equal(first, triton_experts.down("decode", *arguments, deterministic=True))
    assert_near(triton_experts.down("decode", *arguments, deterministic=False), first, torch.float16)


def test_no_tokens():
    packed = random_packed((4,), 48, 24, slots=2)
    ids = torch.empty(0, dtype=torch.int64)
    for blocked in (False, True):
        blocks = blocks_for(ids, 1, blocked)
        x = torch.empty(0, 24).half()
        assert triton_experts.gate_up("decode", x, ids, blocks, packed.tensors, None, "silu", 32, TILE).shape == (0, 24)
        for deterministic in (False, True):
            out = triton_experts.down(
                "decode", x, ids, blocks, torch.empty(0, 2), packed.tensors, None, 32, TILE, deterministic=deterministic
            )
            assert out.shape == (0, 48)


def test_rejects_what_it_cannot_compute():
    packed = random_packed((4,), 16, 32)
    x, ids = torch.randn(1, 32).half(), torch.tensor([0])
    with pytest.raises(TypeError, match=r"`x` must be float16 or bfloat16, but is torch.float32"):
        triton_experts.linear("decode", x.float(), ids, None, packed.tensors, None, 32, TILE)
    with pytest.raises(ValueError, match="`group_size` must be 16, 32, 64 or a multiple of 128, but is 48"):
        triton_experts.linear("decode", x, ids, None, packed.tensors, None, 48, TILE)
    with pytest.raises(ValueError, match=r"`tile.block_m` is 8, but `blocks` were made for 16"):
        triton_experts.linear("decode", x, ids, route(ids, 1, 16), packed.tensors, None, 32, TILE)
    with pytest.raises(ValueError, match=r"`activation` must be one of silu, .*, but is 'tanh'"):
        triton_experts.gate_up("decode", x, ids, None, packed.tensors, None, "tanh", 32, TILE)
