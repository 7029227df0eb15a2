"""The packed form of one linear of a layer's experts: what the lowered graph keeps in its buffers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor, nn

from moe_compiler.kernels.affine import QuantizedWeight
from moe_compiler.kernels.packed import PackedTensors
from moe_compiler.kernels.planes import ALIGNMENT, pack_experts
from moe_compiler.kernels.pool import ChannelPool
from moe_compiler.kernels.reference import dequantize_expert

SUFFIXES: Mapping[str, str] = {
    "planes": "",
    "table": "_table",
    "scale": "_scale",
    "zero_point": "_zero_point",
    "pool_offset": "_pool_offset",
    "pool_index": "_pool_index",
    "pool_value": "_pool_value",
    "pool_scale": "_pool_scale",
    "pool_direction": "_pool_direction",
}
"""Field of `PackedExpertLinear` to the ending of its buffer's name. The planes keep the weight's own name, so that a
loader that does not know the format fails on their shape instead of passing over them."""


@dataclass(frozen=True)
class PackedExpertLinear:
    """`E` experts of one linear, `(N, K)` each, every expert at its own width, and their channel pool.

    Attributes:
        planes: int16, flat; see `moe_compiler.kernels.planes`.
        table: `(E, 2)` int32, planes and start of each expert.
        scale: `(E, N, groups)` float16.
        zero_point: `(E, N, groups)` uint8, in units of `2**(bits - 8)`.
        pool: the channel pool.
        in_features: `K`.
        group_size: input channels that share a scale.
    """

    planes: Tensor
    table: Tensor
    scale: Tensor
    zero_point: Tensor
    pool: ChannelPool
    in_features: int
    group_size: int

    @classmethod
    def from_quantized(
        cls, quantized: QuantizedWeight, pool_capacity: int = 0, pool_directions: int = 0
    ) -> PackedExpertLinear:
        """Packs quantized experts and adds a pool of `pool_capacity` idle slots, `pool_directions` of them low-rank.

        Raises:
            ValueError: an expert's width is not 2, 4, 6 or 8.
        """
        planes, table = pack_experts(quantized.codes, quantized.bits)
        experts, rows, columns = quantized.codes.shape
        device = quantized.codes.device
        unit = torch.tensor([2.0 ** (8 - bits) for bits in quantized.bits], device=device).view(-1, 1, 1)
        return cls(
            planes=planes,
            table=table,
            scale=quantized.scale.to(torch.float16),
            zero_point=(quantized.zero_point * unit).round().to(torch.uint8),
            pool=ChannelPool.empty(experts, pool_capacity, rows, columns, pool_directions, device),
            in_features=columns,
            group_size=quantized.group_size,
        )

    @classmethod
    def from_module(cls, module: nn.Module, name: str, in_features: int, group_size: int) -> PackedExpertLinear:
        """The buffers of linear `name` of a lowered experts module, by reference."""
        tensors = {field: module.get_buffer(name + suffix) for field, suffix in SUFFIXES.items()}
        pool = ChannelPool(**{field.name: tensors.pop(f"pool_{field.name}") for field in fields(ChannelPool)})
        return cls(**tensors, pool=pool, in_features=in_features, group_size=group_size)

    def routed(self, num_experts: int) -> PackedExpertLinear:
        """The first `num_experts` experts with the whole pool, by reference."""
        if num_experts == self.num_experts:
            return self
        end = int(self.table[num_experts, 1]) * ALIGNMENT
        return replace(
            self,
            planes=self.planes[:end],
            table=self.table[:num_experts],
            scale=self.scale[:num_experts],
            zero_point=self.zero_point[:num_experts],
            pool=replace(self.pool, offset=self.pool.offset[: num_experts + 1]),
        )

    def appended(self, num_experts: int) -> PackedExpertLinear:
        """The experts after the first `num_experts`, without a pool; only the table is a copy."""
        start = int(self.table[num_experts, 1])
        table = self.table[num_experts:].clone()
        table[:, 1] -= start
        pool = ChannelPool.empty(table.shape[0], 0, self.out_features, self.in_features, device=table.device)
        return replace(
            self,
            planes=self.planes[start * ALIGNMENT :],
            table=table,
            scale=self.scale[num_experts:],
            zero_point=self.zero_point[num_experts:],
            pool=pool,
        )

    @property
    def tensors(self) -> PackedTensors:
        """The buffers in the operators' order."""
        return PackedTensors(self.planes, self.table, self.scale, self.zero_point, *self.pool.tensors().values())

    def buffers(self, name: str) -> dict[str, Tensor]:
        """The tensors, in the operators' order, by the names they have in a module whose linear is called `name`."""
        return {name + SUFFIXES[field]: tensor for field, tensor in self.tensors._asdict().items()}

    @property
    def num_experts(self) -> int:
        """The number of experts `E`."""
        return self.table.shape[0]

    @property
    def out_features(self) -> int:
        """Output features `N` of one expert."""
        return self.scale.shape[1]

    @property
    def num_weights(self) -> int:
        """Weights that the packed form stands for, `E·N·K`."""
        return self.num_experts * self.out_features * self.in_features

    @property
    def bits(self) -> tuple[int, ...]:
        """The width of each expert."""
        return tuple(2 * planes for planes in self.table[:, 0].tolist())

    @property
    def code_bits(self) -> float:
        """Mean width of a weight's code."""
        return sum(self.bits) / self.num_experts

    @property
    def size_bytes(self) -> int:
        """Bytes of all buffers."""
        return sum(t.numel() * t.element_size() for t in self.buffers("").values())

    @property
    def effective_bits(self) -> float:
        """Bits per weight, from the real sizes of the buffers: codes and their padding, table, scales, zero points
        and the whole pool.
        """
        return 8 * self.size_bytes / self.num_weights

    def dequantize_expert(self, expert: int) -> Tensor:
        """Base weight of one expert, `(N, K)` float32, without the channel pool."""
        return dequantize_expert(
            expert, self.in_features, self.planes, self.table, self.scale, self.zero_point, self.group_size
        )

    def dequantize(self, with_pool: bool = True) -> Tensor:
        """The weight that the operator multiplies with, `(E, N, K)` float32."""
        weight = torch.stack([self.dequantize_expert(expert) for expert in range(self.num_experts)])
        return weight + self.pool.dense() if with_pool else weight


def overhead_bits(
    num_experts: int, out_features: int, in_features: int, group_size: int, pool_capacity: int, pool_directions: int = 0
) -> float:
    """Bits per weight beside the codes: what `effective_bits` will exceed `code_bits` by, whatever the widths.

    Padding of the codes to whole tiles is left out, since it grows with the width; it is zero where `in_features` is
    a multiple of 128. So is the padding of an expert to 128 half words, which is zero where `out_features` is a
    multiple of 8.
    """
    weights = num_experts * out_features * in_features
    groups = num_experts * out_features * -(-in_features // group_size)
    table = num_experts * 64
    pool = (num_experts + 1) * 32 + pool_capacity * (32 + 8 * out_features + 32) + pool_directions * 8 * in_features
    return (groups * 24 + table + pool) / weights
