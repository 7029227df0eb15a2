"""What is measured: MoE layers of real models, random packed weights at their sizes, routings, and bytes to be read."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from moe_compiler.kernels.experts import PackedExpertLinear
from moe_compiler.kernels.planes import TILE, PlaneLayout
from moe_compiler.kernels.pool import ChannelPool

ROUTINGS = ("uniform", "zipf")
_BLOCK = 1 << 20  # elements of random data that large tensors are filled with over and over


@dataclass(frozen=True)
class LayerShape:
    """One MoE layer.

    Attributes:
        name: the model.
        hidden_size: `H`.
        intermediate_size: `I` of a routed expert.
        num_experts: `E`.
        top_k: experts per token, `k`.
        shared_size: `I` of all shared experts together, a multiple of `intermediate_size` or 0.
    """

    name: str
    hidden_size: int
    intermediate_size: int
    num_experts: int
    top_k: int
    shared_size: int = 0

    @property
    def shared_experts(self) -> int:
        """Shared experts as extra experts of the routed ones' size, which every token takes."""
        return self.shared_size // self.intermediate_size

    @property
    def all_experts(self) -> int:
        """Routed and shared experts."""
        return self.num_experts + self.shared_experts

    @property
    def expert_weights(self) -> int:
        """Weights of one routed expert."""
        return 3 * self.hidden_size * self.intermediate_size


SHAPES = {
    shape.name: shape
    for shape in (
        LayerShape("OLMoE-1B-7B", 2048, 1024, 64, 8),
        LayerShape("Qwen1.5-MoE-A2.7B", 2048, 1408, 60, 4, 5632),
        LayerShape("DeepSeek-MoE-16B", 2048, 1408, 64, 6, 2816),
        LayerShape("Mixtral-8x7B", 4096, 14336, 8, 2),
        LayerShape("tiny", 256, 128, 8, 2, 128),
    )
}
"""By name; the configurations are those of the models' own `config.json`. `tiny` is for trying the benches out."""


def widths(bits: int, num_experts: int) -> tuple[int, ...]:
    """The width of each expert: `bits`, or at 3 bits half 2 and half 4 bits, alternating."""
    return tuple((2, 4)[expert % 2] for expert in range(num_experts)) if bits == 3 else (bits,) * num_experts


def random_tensor(shape: Sequence[int], dtype: torch.dtype, device: torch.device, scale: float = 1.0) -> Tensor:
    """Normal random numbers, quickly: one block of them over and over. Never measure on zeros."""
    out = torch.empty(*shape, dtype=dtype, device=device)
    _fill(out, (torch.randn(_BLOCK, device=device) * scale).to(dtype))
    return out


def random_packed(
    bits: Sequence[int],
    out_features: int,
    in_features: int,
    device: torch.device,
    *,
    group_size: int = 128,
    pool_fraction: float = 0.0,
) -> PackedExpertLinear:
    """Packed experts with random codes whose weights have a standard deviation of about `in_features ** -0.5`.

    Nothing is quantized, so that real sizes take moments. The pool is in full use, its slots spread over experts and
    channels at random.

    Raises:
        ValueError: `in_features` is not a multiple of 128: the codes of the padding would be random too.
    """
    if in_features % TILE:
        raise ValueError(f"`in_features` must be a multiple of {TILE}, but is {in_features}")
    layout = PlaneLayout(tuple(bits), out_features, in_features)
    planes = torch.empty(layout.offsets[-1], dtype=torch.int16, device=device)
    _fill(planes, torch.randint(-(1 << 15), 1 << 15, (_BLOCK,), dtype=torch.int16, device=device))
    experts, groups = len(bits), -(-in_features // group_size)
    shape = (experts, out_features, groups)
    deviation = torch.tensor([(4**width / 12) ** 0.5 for width in bits], device=device)  # of uniform codes
    scale = torch.rand(shape, device=device).mul_(0.2).add_(0.9)
    scale.div_(deviation[:, None, None] * in_features**0.5)
    return PackedExpertLinear(
        planes=planes,
        table=layout.table().to(device),
        scale=scale.to(torch.float16),
        zero_point=torch.randint(112, 144, shape, dtype=torch.uint8, device=device),  # near the middle of the codes
        pool=random_pool(experts, out_features, in_features, pool_fraction, device),
        in_features=in_features,
        group_size=group_size,
    )


def random_pool(
    num_experts: int, out_features: int, in_features: int, fraction: float, device: torch.device, directions: int = 0
) -> ChannelPool:
    """A channel pool of `fraction` of all input channels, all of it in use; `directions` of its slots are low-rank."""
    capacity = round(fraction * num_experts * in_features)
    places = torch.randperm(num_experts * in_features)[:capacity].sort().values
    pool = ChannelPool.empty(num_experts, capacity, out_features, in_features, directions)
    pool.offset[1:] = torch.bincount(places // in_features, minlength=num_experts).cumsum(0).int()
    pool.index[:] = (places % in_features).int()
    pool.value[:] = torch.randint(-127, 128, pool.value.shape, dtype=torch.int8)
    pool.scale[:] = 0.1 * in_features**-0.5 / 127
    low_rank = torch.randperm(capacity)[:directions]
    pool.index[low_rank] = in_features + torch.arange(directions, dtype=torch.int32)
    pool.direction[:] = torch.randint(-127, 128, pool.direction.shape, dtype=torch.int8)
    pool.scale[low_rank] /= 73 * in_features**0.5  # the norm of a direction
    return ChannelPool(**{name: tensor.to(device) for name, tensor in pool.tensors().items()})


def copy_of(packed: PackedExpertLinear) -> PackedExpertLinear:
    """The same numbers in other memory."""
    return PackedExpertLinear(
        planes=packed.planes.clone(),
        table=packed.table.clone(),
        scale=packed.scale.clone(),
        zero_point=packed.zero_point.clone(),
        pool=packed.pool.clone(),
        in_features=packed.in_features,
        group_size=packed.group_size,
    )


def without_pool(packed: PackedExpertLinear) -> PackedExpertLinear:
    """The same weights, by reference, with a pool of no slots."""
    pool = ChannelPool.empty(
        packed.num_experts, 0, packed.out_features, packed.in_features, device=packed.planes.device
    )
    return PackedExpertLinear(
        packed.planes, packed.table, packed.scale, packed.zero_point, pool, packed.in_features, packed.group_size
    )


def packed_bytes(packed: PackedExpertLinear, experts: Sequence[int]) -> int:
    """Bytes that must be read of `experts`: codes, scales, zero points and pool slots in use."""
    codes = sum(packed.bits[e] for e in experts) * packed.out_features * packed.in_features // 8
    groups = len(experts) * packed.out_features * packed.scale.shape[2]
    used = packed.pool.offset.diff().tolist()
    slots = sum(used[e] for e in experts)
    return int(codes + 3 * groups + slots * (packed.out_features + 8))


def route(shape: LayerShape, tokens: int, routing: str, seed: int = 0) -> Tensor:
    """Routed experts of each token, `(T, k)` int64 on the host, `k` different ones each.

    Args:
        shape: the layer.
        tokens: `T`.
        routing: `"uniform"`, or `"zipf"`: expert `r` of a random order is drawn with a weight of `1 / (r + 1)`.
        seed: of the draw.

    Raises:
        ValueError: unknown routing.
    """
    if routing not in ROUTINGS:
        raise ValueError(f"`routing` must be one of {', '.join(ROUTINGS)}, but is {routing!r}")
    generator = torch.Generator().manual_seed(seed)
    weight = torch.ones(shape.num_experts)
    if routing == "zipf":
        weight = 1 / torch.arange(1, shape.num_experts + 1)
        weight = weight[torch.randperm(shape.num_experts, generator=generator)]
    return torch.multinomial(weight.expand(tokens, -1), shape.top_k, generator=generator)


def rotations(ids: Tensor, num_experts: int) -> Iterator[Tensor]:
    """The same routing on disjoint sets of experts: experts are renamed so that no two results share one.

    A loop over the results reads other weights each time, as the layers of a model do, and all experts alike.
    """
    hit = ids.unique()
    rest = torch.tensor([e for e in range(num_experts) if e not in set(hit.tolist())], dtype=torch.int64)
    order = torch.cat([hit, rest])
    rank = torch.empty(num_experts, dtype=torch.int64)
    rank[order] = torch.arange(num_experts)
    for turn in range(max(1, num_experts // hit.numel())):
        yield order[(rank[ids] + turn * hit.numel()) % num_experts]


def with_shared(ids: Tensor, weights: Tensor, shape: LayerShape) -> tuple[Tensor, Tensor]:
    """Appends the shared experts to each token's experts, with a weight of 1."""
    shared = torch.arange(shape.num_experts, shape.all_experts, device=ids.device)
    ids = torch.cat([ids, shared.expand(ids.shape[0], -1)], dim=1)
    return ids, torch.cat([weights, weights.new_ones(ids.shape[0], shape.shared_experts)], dim=1)


def _fill(out: Tensor, block: Tensor) -> None:
    flat = out.view(-1)
    whole = flat.numel() // block.numel() * block.numel()
    flat[:whole].view(-1, block.numel()).copy_(block)
    flat[whole:].copy_(block[: flat.numel() - whole])
