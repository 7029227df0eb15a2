"""The buffers of one packed linear in the order in which the operators take them."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class PackedTensors(NamedTuple):
    """The packed weights of `E` experts of one linear, `(N, K)` each, and its channel pool of `C` slots.

    Operators take it as one list of tensors.

    Attributes:
        planes: int16, flat; see `moe_compiler.kernels.planes`.
        table: `(E, 2)` int32, planes of each expert and its start in units of 128 half words.
        scale: `(E, N, groups)` float16.
        zero_point: `(E, N, groups)` uint8, in units of `2**(bits - 8)`.
        pool_offset: `(E + 1,)` int32; slots `pool_offset[e]` up to `pool_offset[e + 1]` belong to expert `e`.
        pool_index: `(C,)` int32, the input channel of each slot, or `K` plus the number of its direction.
        pool_value: `(C, N)` int8, the slot's column in units of its scale.
        pool_scale: `(C,)` float32.
        pool_direction: `(D, K)` int8; slot `s` of a direction `d` adds `scale[s] · value[s] · (direction[d] · x)`.
    """

    planes: Tensor
    table: Tensor
    scale: Tensor
    zero_point: Tensor
    pool_offset: Tensor
    pool_index: Tensor
    pool_value: Tensor
    pool_scale: Tensor
    pool_direction: Tensor

    @property
    def num_experts(self) -> int:
        """The number of experts `E`."""
        return self.table.shape[0]

    @property
    def out_features(self) -> int:
        """Output features `N` of one expert."""
        return self.scale.shape[1]
