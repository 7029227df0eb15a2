"""Shared experts in the form of routed ones: a large expert is the sum of small ones of the routed experts' size."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from moe_compiler.kernels.affine import QuantizedWeight, zero_point_step
from moe_compiler.kernels.experts import PackedExpertLinear
from moe_compiler.kernels.planes import ALIGNMENT, unpack_expert


def split_shared(
    gate: PackedExpertLinear, up: PackedExpertLinear, down: PackedExpertLinear, copies: int
) -> tuple[PackedExpertLinear, PackedExpertLinear]:
    """The linears of one large expert as those of `copies` small ones whose outputs sum to its own, bit for bit.

    Args:
        gate: one expert `(copies·I, H)`.
        up: one expert of the same shape and width as `gate`.
        down: one expert `(H, copies·I)`, where a group of input channels lies within one of the `copies`.
        copies: how many experts to make.

    Returns:
        `gate_up` `(copies, 2I, H)` and `down` `(copies, H, I)`, without a channel pool.

    Raises:
        ValueError: a group of `down`'s input channels would be cut.
    """
    size, rest = divmod(down.in_features, copies)
    if rest or (copies > 1 and size % down.group_size):
        raise ValueError(
            f"`copies` must divide the {down.in_features} input channels of `down` between groups of "
            f"{down.group_size}, but is {copies}"
        )
    first, second = (_unpacked(linear).rows(copies) for linear in (gate, up))
    return first.stacked(second).packed(), _unpacked(down).columns(copies).packed()


def append_experts(first: PackedExpertLinear, second: PackedExpertLinear) -> PackedExpertLinear:
    """The experts of `first` and after them those of `second`, which have no slots in the pool of `first`.

    The offsets of the slots end in zeros: an expert whose slots would end before they begin has none, however many the
    others use.
    """
    table = second.table.clone()
    table[:, 1] += first.planes.numel() // ALIGNMENT
    offset = torch.cat([first.pool.offset, first.pool.offset.new_zeros(second.num_experts)])
    return replace(
        first,
        planes=torch.cat([first.planes, second.planes]),
        table=torch.cat([first.table, table]),
        scale=torch.cat([first.scale, second.scale]),
        zero_point=torch.cat([first.zero_point, second.zero_point]),
        pool=replace(first.pool, offset=offset),
    )


@dataclass(frozen=True)
class _Codes:
    """Unpacked experts of one width: codes `(E, N, K)`, scale and zero point `(E, N, groups)`."""

    codes: Tensor
    scale: Tensor
    zero_point: Tensor
    bits: int
    group_size: int

    def rows(self, copies: int) -> _Codes:
        """One expert cut into `copies` along the output features."""
        return self._map(lambda t: t[0].unflatten(0, (copies, -1)))

    def columns(self, copies: int) -> _Codes:
        """One expert cut into `copies` along the input channels."""
        return self._map(lambda t: t[0].unflatten(1, (copies, -1)).transpose(0, 1))

    def stacked(self, other: _Codes) -> _Codes:
        """The rows of `self` and below them those of `other`, expert by expert."""
        return self._map(lambda t, o: torch.cat([t, o], dim=1), other)

    def _map(self, function: Callable[..., Tensor], *others: _Codes) -> _Codes:
        fields = ("codes", "scale", "zero_point")
        mapped: dict[str, Any] = {f: function(getattr(self, f), *(getattr(o, f) for o in others)) for f in fields}
        return replace(self, **mapped)

    def packed(self) -> PackedExpertLinear:
        bits = (self.bits,) * self.codes.shape[0]
        return PackedExpertLinear.from_quantized(
            QuantizedWeight(self.codes, self.scale, self.zero_point, bits, self.group_size)
        )


def _unpacked(linear: PackedExpertLinear) -> _Codes:
    """A packed linear of one expert."""
    planes, start = linear.table[0].tolist()
    return _Codes(
        codes=unpack_expert(linear.planes, planes, start * ALIGNMENT, linear.out_features, linear.in_features)[None],
        scale=linear.scale.float(),
        zero_point=linear.zero_point.float() * zero_point_step(2 * planes),
        bits=2 * planes,
        group_size=linear.group_size,
    )
