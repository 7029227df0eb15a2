"""What `gpu_check.py` tries: layers of many sizes, widths, routings and pools, and the answers in float64."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from workloads import random_packed, random_pool

from moe_compiler.kernels import ops
from moe_compiler.kernels.activation import ACTIVATIONS, gated
from moe_compiler.kernels.affine import QuantizedWeight
from moe_compiler.kernels.experts import PackedExpertLinear
from moe_compiler.kernels.planes import TILE
from moe_compiler.kernels.pool import ChannelPool
from moe_compiler.kernels.reference import dequantize_reference

MIXTURE = (2, 4, 6, 8, 4, 2, 8, 6)
TOLERANCE = {torch.bfloat16: 1e-2, torch.float16: 2e-3, torch.float32: 1e-4}
STRONG = 50.0  # corrections of the pool, times those of `random_pool`: a slot that is left out must show


@dataclass(frozen=True)
class Case:
    """One layer and one batch.

    Attributes:
        name: what it is about.
        tokens: `T`.
        hidden_size: `H`.
        intermediate_size: `I`.
        bits: the width of each expert.
        top_k: experts per token.
        dtype: of the activations.
        group_size: input channels per scale.
        pool: share of the input channels in the pool.
        pool_on_one: whether one expert has all slots in use.
        directions: how many slots of each pool are low-rank.
        bias: whether both linears have one; routing weights are float32 then.
        activation: between them.
        routing: `"uniform"`, `"one"` (every token to the same experts), `"foreign"` (a third of the ids is `E`).
    """

    name: str
    tokens: int
    hidden_size: int = 256
    intermediate_size: int = 128
    bits: tuple[int, ...] = MIXTURE
    top_k: int = 2
    dtype: torch.dtype = torch.bfloat16
    group_size: int = 128
    pool: float = 0.01
    pool_on_one: bool = False
    directions: int = 0
    bias: bool = False
    activation: str = "silu"
    routing: str = "uniform"

    def __str__(self) -> str:
        widths = "mixed" if len(set(self.bits)) > 1 else f"{self.bits[0]}"
        return (
            f"{self.name}: T {self.tokens}, H {self.hidden_size}, I {self.intermediate_size}, {widths} bits, "
            f"G {self.group_size}, pool {self.pool:.0%}, {str(self.dtype).removeprefix('torch.')}"
        )


def cases(quick: bool) -> Iterator[Case]:
    """The cases, the most telling first.

    Args:
        quick: small sizes only, in one dtype.
    """
    dtypes = (torch.bfloat16,) if quick else (torch.bfloat16, torch.float16)
    for dtype in dtypes:
        base = Case("small", 1, dtype=dtype)
        for tokens in (1, 16) if quick else (1, 4, 16, 64, 256, 2048):
            size = (256, 128) if quick else (2048, 1024)
            yield replace(base, name="OLMoE", tokens=tokens, hidden_size=size[0], intermediate_size=size[1])
        for width in (2, 4, 6, 8):
            for tokens in (3,) if quick else (3, 200):
                yield replace(base, name="one width", tokens=tokens, bits=(width,) * 4)
        odd = replace(base, name="odd sizes", hidden_size=200, intermediate_size=72, group_size=32, pool=0.05)
        yield from (replace(odd, tokens=tokens) for tokens in ((5,) if quick else (1, 5, 33, 300)))
        yield replace(odd, name="ragged group", tokens=7, hidden_size=328, intermediate_size=264, group_size=64)
        yield replace(base, name="no tokens", tokens=0)
        yield replace(base, name="all on the same experts", tokens=40, routing="one")
        yield replace(base, name="ids of another rank", tokens=40, routing="foreign")
        yield replace(base, name="no pool", tokens=9, pool=0.0)
        yield replace(base, name="large pool", tokens=9, pool=0.3)
        for tokens in (1, 40):
            yield replace(base, name="low-rank slots", tokens=tokens, pool=0.05, directions=20)
        yield replace(odd, name="low-rank slots, odd sizes", tokens=7, directions=9)
        yield replace(base, name="pool on one expert", tokens=40, pool=0.05, pool_on_one=True)
        for activation in ACTIVATIONS:
            yield replace(base, name=f"bias and {activation}", tokens=9, bias=True, activation=activation)
        if not quick:
            for tokens in (2, 512):
                deepseek = replace(base, name="DeepSeek-MoE", hidden_size=2048, intermediate_size=1408, top_k=6)
                yield replace(deepseek, tokens=tokens)
                mixtral = replace(base, name="Mixtral", hidden_size=4096, intermediate_size=14336, bits=(2, 4))
                yield replace(mixtral, tokens=tokens)


@dataclass(frozen=True)
class Inputs:
    """What one call of the operator takes; see `moe_compiler.kernels.ops`."""

    x: Tensor
    ids: Tensor
    weights: Tensor
    gate_up: PackedExpertLinear
    gate_up_bias: Tensor | None
    down: PackedExpertLinear
    down_bias: Tensor | None


def build(case: Case, device: torch.device, seed: int = 0) -> Inputs:
    """Random inputs for a case."""
    torch.manual_seed(seed)
    E, H = len(case.bits), case.hidden_size
    shape = (case.tokens, case.top_k)
    ids = torch.rand(case.tokens, E).argsort(dim=1)[:, : case.top_k]
    if case.routing == "one":
        ids = torch.arange(case.top_k).expand(shape).contiguous()
    if case.routing == "foreign":
        ids = torch.where(torch.rand(shape) < 1 / 3, E, ids)
    linears = []
    for rows, columns in ((2 * case.intermediate_size, H), (H, case.intermediate_size)):
        linears.append(_packed(case, rows, columns, device))
    biases = [torch.randn(E, one.out_features, device=device, dtype=case.dtype) for one in linears]
    return Inputs(
        x=torch.randn(case.tokens, H).to(device, case.dtype),
        ids=ids.to(device),
        weights=torch.rand(shape).to(device, torch.float32 if case.bias else case.dtype),
        gate_up=linears[0],
        gate_up_bias=biases[0] if case.bias else None,
        down=linears[1],
        down_bias=biases[1] if case.bias else None,
    )


def _packed(case: Case, rows: int, columns: int, device: torch.device) -> PackedExpertLinear:
    if columns % TILE == 0:
        packed = random_packed(case.bits, rows, columns, device, group_size=case.group_size)
    else:
        packed = _packed_from_codes(case, rows, columns, device)
    pool = random_pool(len(case.bits), rows, columns, case.pool, device, case.directions)
    if case.pool_on_one:
        pool.offset[2:] = pool.capacity
        pool.offset[:2] = 0
        pool.index.copy_(torch.randperm(columns)[: pool.capacity].sort().values)  # channels all of them
    return replace(packed, pool=replace(pool, scale=pool.scale * STRONG))


def _packed_from_codes(case: Case, rows: int, columns: int, device: torch.device) -> PackedExpertLinear:
    """Random experts of any size, by the real packing."""
    shape = (len(case.bits), rows, -(-columns // case.group_size))
    top = torch.tensor([2**width for width in case.bits]).view(-1, 1, 1)
    quantized = QuantizedWeight(
        codes=(torch.rand(len(case.bits), rows, columns) * top).to(torch.uint8).to(device),
        scale=((torch.rand(shape) + 0.5) / (top * columns**0.5)).half().float().to(device),
        zero_point=(torch.randint(112, 144, shape) * top / 256).float().to(device),
        bits=case.bits,
        group_size=case.group_size,
    )
    return PackedExpertLinear.from_quantized(quantized)


def expected_linear(x: Tensor, ids: Tensor, packed: PackedExpertLinear, bias: Tensor | None) -> Tensor:
    """The oracle of one linear in float64, `(R, N)`: dequantized weights, one product per expert.

    Args:
        x: `(T, K)`, `T` dividing `R`.
        ids: `(R,)`.
        packed: the weights; only their definition is used, no operator.
        bias: `(E, N)` or `None`.
    """
    dense = dequantize_reference(packed.tensors, packed.in_features, packed.group_size)
    repeat = ids.shape[0] // max(1, x.shape[0])
    out = torch.zeros(ids.shape[0], packed.out_features, dtype=torch.float64, device=x.device)
    for expert in range(packed.num_experts):
        rows = (ids == expert).nonzero().squeeze(1)
        out[rows] = x[rows // max(1, repeat)].double() @ dense[expert].t()
        if bias is not None:
            out[rows] += bias[expert].double()
    return out


def expected_layer(inputs: Inputs, activation: str) -> Tensor:
    """The oracle of the layer in float64; the intermediate is rounded to the dtype of `x`, as the operator does."""
    x, ids = inputs.x, inputs.ids.reshape(-1)
    hidden = gated(expected_linear(x, ids, inputs.gate_up, inputs.gate_up_bias), activation).to(x.dtype)
    y = expected_linear(hidden, ids, inputs.down, inputs.down_bias)
    weighted = y * inputs.weights.reshape(-1, 1).double()
    return weighted.view(*inputs.ids.shape, x.shape[1]).sum(dim=1)


def other_pool(pool: ChannelPool, in_features: int, seed: int) -> ChannelPool:
    """Other contents for a pool, of the same shapes."""
    torch.manual_seed(seed)
    experts, capacity = pool.offset.shape[0] - 1, pool.capacity
    fraction, directions = capacity / (experts * in_features), pool.direction.shape[0]
    found = random_pool(experts, pool.value.shape[1], in_features, fraction, pool.value.device, directions)
    return replace(found, scale=found.scale * STRONG)


def layer(inputs: Inputs, activation: str = "silu") -> Tensor:
    """The fused operator."""
    out: Tensor = ops.packed_experts(
        inputs.x,
        inputs.ids,
        inputs.weights,
        list(inputs.gate_up.tensors),
        inputs.gate_up_bias,
        list(inputs.down.tensors),
        inputs.down_bias,
        activation,
        inputs.gate_up.group_size,
    )
    return out


def distance(actual: Tensor, expected: Tensor) -> float:
    """The larger of the relative errors in the 2-norm and, halved, in the maximum norm.

    Raises:
        AssertionError: shape, or a value that is not finite.
    """
    assert actual.shape == expected.shape, f"shape {tuple(actual.shape)}, not {tuple(expected.shape)}"
    if not expected.numel():
        return 0.0
    assert bool(torch.isfinite(actual).all()), "NaN or infinity in the result"
    error = actual.double() - expected
    norm = error.norm() / expected.norm().clamp(min=1e-12)
    largest = error.abs().max() / expected.abs().max().clamp(min=1e-12)
    return float(torch.maximum(norm, largest / 2))
