"""A drop-in for `nn.Linear` over packed weights: the linears of shared experts, one expert that every token takes."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from moe_compiler.kernels import ops
from moe_compiler.kernels.buffers import FixedDtypeBuffers
from moe_compiler.kernels.experts import SUFFIXES, PackedExpertLinear


class PackedLinear(FixedDtypeBuffers):
    """`y = W x + b` with `W` `(N, K)` packed at one width, as expert 0 of 1.

    The packed planes keep the name `weight`.
    """

    bias: nn.Parameter | None

    def __init__(self, packed: PackedExpertLinear, bias: nn.Parameter | None) -> None:
        super().__init__()
        self.in_features = packed.in_features
        self.out_features = packed.out_features
        self.group_size = packed.group_size
        for name, tensor in packed.buffers("weight").items():
            self.register_buffer(name, tensor)
        self.register_parameter("bias", bias)

    @property
    def packed(self) -> PackedExpertLinear:
        """The packed weight, by reference."""
        return PackedExpertLinear.from_module(self, "weight", self.in_features, self.group_size)

    def forward(self, x: Tensor) -> Tensor:
        """Applies the linear to `x` `(..., K)`; returns `(..., N)`."""
        rows = x.reshape(-1, self.in_features)
        expert_ids = torch.zeros(rows.shape[0], dtype=torch.int64, device=x.device)
        weight = [getattr(self, "weight" + suffix) for suffix in SUFFIXES.values()]
        out: Tensor = ops.packed_expert_linear(rows, expert_ids, weight, None, self.group_size)
        if self.bias is not None:
            out = out + self.bias
        return out.reshape(*x.shape[:-1], self.out_features)

    def extra_repr(self) -> str:
        """Shape and width."""
        return f"in_features={self.in_features}, out_features={self.out_features}, bits={self.packed.bits[0]}"
