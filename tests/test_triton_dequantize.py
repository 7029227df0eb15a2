"""The dense path against the oracles: the workspace, both grouped products, and a whole layer."""

import pytest
import torch
from packed import random_packed
from torch import Tensor

from moe_compiler.kernels import triton_dequantize
from moe_compiler.kernels.experts import PackedExpertLinear
from moe_compiler.kernels.reference import (
    dequantize_reference,
    packed_expert_linear_reference,
    packed_experts_reference,
)
from moe_compiler.kernels.triton_dequantize import (
    down_dense,
    gate_up_dense,
    grouped_linear,
    library_runs_on_device,
    linear_dense,
    workspace_bytes,
)
from moe_compiler.kernels.triton_routing import route
from moe_compiler.kernels.triton_workspace import dequantize_experts

# The interpreter rounds to bfloat16 by cutting bits off.
TOLERANCE = {torch.float16: 1e-3, torch.bfloat16: 3e-2}
LAYER_TOLERANCE = 5e-3


def relative(actual: Tensor, expected: Tensor) -> float:
    return float((actual.double() - expected.double()).norm() / expected.double().norm().clamp_min(1e-30))


@pytest.fixture(params=[False, True], ids=["triton", "library"])
def _product(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton_dequantize, "library_runs_on_device", lambda x, weight: request.param)


@pytest.mark.parametrize("group_size", [16, 256])
@pytest.mark.parametrize(("rows", "columns"), [(33, 130), (16, 256)])
def test_workspace_is_the_rounded_weight(rows: int, columns: int, group_size: int) -> None:
    packed = random_packed((2, 4, 6, 8), rows, columns, group_size=group_size)
    dense = dequantize_experts(packed.tensors, columns, group_size, torch.float16)
    assert torch.equal(dense, dequantize_reference(packed.tensors, columns, group_size).half())


@pytest.mark.parametrize("pool", [{"slots": 5}, {"slots": 80}, {"directions": 40}])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_workspace_has_the_pools_corrections(pool: dict[str, int], dtype: torch.dtype) -> None:
    packed = random_packed((4, 8), 20, 140, **pool)
    dense = dequantize_experts(packed.tensors, 140, 32, dtype)
    assert relative(dense, dequantize_reference(packed.tensors, 140, 32)) < TOLERANCE[dtype] / 2


def test_slots_of_one_channel_add_up_and_idle_ones_do_nothing() -> None:
    packed = random_packed((4,), 16, 32, slots=3)
    packed.pool.index.copy_(torch.tensor([7, 7, 0, 0, 0]))
    packed.pool.scale[2:] = 0
    packed.pool.offset.copy_(torch.tensor([0, 5]))
    dense = dequantize_experts(packed.tensors, 32, 32, torch.float16)
    assert relative(dense, dequantize_reference(packed.tensors, 32, 32)) < TOLERANCE[torch.float16]


def test_experts_without_rows_are_skipped(monkeypatch: pytest.MonkeyPatch) -> None:
    packed = random_packed((4, 4, 8), 16, 32)
    expected = dequantize_reference(packed.tensors, 32, 32).half()
    monkeypatch.setattr(torch, "empty", lambda *size, **options: torch.full(size, -7.0, **options))
    offsets = torch.tensor([0, 2, 2, 5], dtype=torch.int32)
    dense = dequantize_experts(packed.tensors, 32, 32, torch.float16, offsets)
    assert (dense[1] == -7).all()
    assert torch.equal(dense[[0, 2]], expected[[0, 2]])


def test_workspace_bytes() -> None:
    packed = random_packed((4, 4, 8), 16, 33)
    dense = dequantize_experts(packed.tensors, 33, 32, torch.float16)
    assert workspace_bytes(packed.tensors, 33, torch.float16) == dense.nbytes


def test_refuses_float32() -> None:
    packed = random_packed((4,), 16, 32)
    with pytest.raises(TypeError, match=r"`dtype` must be float16 or bfloat16 to dequantize to, but is torch.float32"):
        dequantize_experts(packed.tensors, 32, 32, torch.float32)


@pytest.mark.usefixtures("_product")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_grouped_product(dtype: torch.dtype) -> None:
    ids = torch.tensor([2, 0, 5, 2, 2, 0, 4, 9])
    blocks = route(ids, 6, 2)
    x, weight = torch.randn(8, 72).to(dtype), torch.randn(6, 40, 72).to(dtype)
    out = grouped_linear(x, blocks, weight)
    expected = torch.stack(
        [weight[e].double() @ row.double() for e, row in zip([0, 0, 2, 2, 2, 4, 5], x, strict=False)]
    )
    assert out.dtype == dtype
    assert relative(out[:7], expected) < TOLERANCE[dtype]


def test_products_of_other_devices_are_not_the_librarys() -> None:
    assert not library_runs_on_device(torch.zeros(2, 16).bfloat16(), torch.zeros(1, 16, 16).bfloat16())


def run_layer(
    x: Tensor, ids: Tensor, routing_weights: Tensor, linears: list[PackedExpertLinear], biases: list[Tensor | None]
) -> Tensor:
    first, second = linears
    blocks = route(ids.reshape(-1), first.num_experts, 16)
    h = gate_up_dense(x, blocks, first.tensors, biases[0], "gelu_tanh", first.group_size, ids.shape[1])
    return down_dense(h, blocks, routing_weights, second.tensors, biases[1], second.group_size)


@pytest.mark.usefixtures("_product")
@pytest.mark.parametrize(
    "ids",
    [
        pytest.param(torch.tensor([[0, 1], [2, 3], [3, 0]]), id="all widths"),
        pytest.param(torch.tensor([[1, 2]]), id="one token"),
        pytest.param(torch.full((18, 1), 3), id="all on one expert"),
        pytest.param(torch.tensor([[3, 4], [7, 3], [9, 9]]), id="foreign experts"),
    ],
)
@pytest.mark.parametrize("with_bias", [False, True])
def test_layer(ids: Tensor, with_bias: bool) -> None:
    linears = [
        random_packed((2, 4, 6, 8), 2 * 24, 40, slots=20, group_size=16),
        random_packed((8, 6, 4, 2), 40, 24, directions=4, group_size=16),
    ]
    biases = [torch.randn(4, 48).half(), torch.randn(4, 40).half()] if with_bias else [None, None]
    x, routing_weights = (torch.randn(ids.shape[0], 40) * 0.05).half(), torch.rand(ids.shape)
    out = run_layer(x, ids, routing_weights, linears, biases)
    first, second = (linear.tensors for linear in linears)
    expected = packed_experts_reference(x, ids, routing_weights, first, biases[0], second, biases[1], "gelu_tanh", 16)
    assert relative(out, expected) < LAYER_TOLERANCE
    assert torch.equal(out, run_layer(x, ids, routing_weights, linears, biases))


def test_layer_without_tokens() -> None:
    linears = [random_packed((4, 2), 32, 16, group_size=16), random_packed((4, 2), 16, 16, group_size=16)]
    ids = torch.empty(0, 2, dtype=torch.long)
    out = run_layer(torch.empty(0, 16).half(), ids, torch.empty(0, 2), linears, [None, None])
    assert out.shape == (0, 16)


@pytest.mark.usefixtures("_product")
@pytest.mark.parametrize("with_bias", [False, True])
def test_linear(with_bias: bool) -> None:
    packed = random_packed((4, 6), 24, 48, slots=4)
    bias = torch.randn(2, 24).half() if with_bias else None
    x, ids = torch.randn(3, 48).half(), torch.tensor([0, 1, 2, 0, 7, 1])
    out = linear_dense(x, ids, route(ids, 2, 16), packed.tensors, bias, 32)
    assert relative(out, packed_expert_linear_reference(x, ids, packed.tensors, bias, 32)) < TOLERANCE[torch.float16]
    assert not out[[2, 4]].any()


def test_refuses_an_unknown_activation() -> None:
    packed, ids = random_packed((4,), 32, 32), torch.zeros(1, dtype=torch.long)
    with pytest.raises(ValueError, match=r"`activation` must be one of silu, .* but is 'swish'"):
        gate_up_dense(torch.zeros(1, 32).half(), route(ids, 1, 16), packed.tensors, None, "swish", 32, 1)
