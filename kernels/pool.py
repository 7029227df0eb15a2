"""The channel pool: a fixed number of slots that add corrections to input channels of a linear's experts.

A slot belongs to one input channel `c` of one expert `e` and holds a column `Δ` of `N` numbers as INT8 with one
scale: the operator computes `W_e · x + Σ_slots Δ · x_c`. The base weight is never touched; changing what the model
computes is copying new contents into these buffers, whose shapes never change (DynaMo, arXiv 2503.21135v3, V-A; that
the slots are additive, shared by the layer's experts and INT8 is our decision).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class ChannelPool:
    """The slots of one linear, sorted by expert.

    Attributes:
        offset: `(E + 1,)` int32; slots `offset[e]` up to `offset[e + 1]` belong to expert `e`; none if that is less.
        index: `(C,)` int32, the input channel of each slot; 0 in idle slots.
        value: `(C, N)` int8, the slot's column in units of `scale`; 0 in idle slots.
        scale: `(C,)` float32.
    """

    offset: Tensor
    index: Tensor
    value: Tensor
    scale: Tensor

    @classmethod
    def empty(
        cls,
        num_experts: int,
        capacity: int,
        out_features: int,
        device: torch.device | str | None = None,
    ) -> ChannelPool:
        """A pool of `capacity` idle slots."""
        return cls(
            offset=torch.zeros(num_experts + 1, dtype=torch.int32, device=device),
            index=torch.zeros(capacity, dtype=torch.int32, device=device),
            value=torch.zeros(capacity, out_features, dtype=torch.int8, device=device),
            scale=torch.zeros(capacity, dtype=torch.float32, device=device),
        )

    @classmethod
    def from_columns(
        cls, experts: Tensor, channels: Tensor, columns: Tensor, num_experts: int, capacity: int
    ) -> ChannelPool:
        """A pool with the given corrections, each rounded to INT8 with its own scale.

        Args:
            experts: `(S,)` int64, the expert of each correction.
            channels: `(S,)` int64, its input channel.
            columns: `(S, N)` float, its column `Δ`.
            num_experts: `E`.
            capacity: `C`, at least `S`.

        Raises:
            ValueError: there are more corrections than slots, or two for one channel.
            FloatingPointError: a column is not finite.
        """
        count = experts.shape[0]
        if count > capacity:
            raise ValueError(f"`capacity` is {capacity} slots, but {count} corrections were given")
        if not bool(torch.isfinite(columns).all()):
            raise FloatingPointError("`columns` must be finite, but a channel correction holds NaN or infinity")
        order = torch.argsort(experts * (int(channels.max()) + 1 if count else 1) + channels)
        experts, channels, columns = experts[order], channels[order], columns[order].float()
        repeated = (experts[1:] == experts[:-1]) & (channels[1:] == channels[:-1])
        if bool(repeated.any()):
            at = int(repeated.nonzero()[0])
            raise ValueError(
                "`channels` must name each channel of an expert once, "
                f"but expert {int(experts[at])} has channel {int(channels[at])} twice"
            )
        pool = cls.empty(num_experts, capacity, columns.shape[1], columns.device)
        if count:
            scale = columns.abs().amax(dim=1) / 127
            safe = torch.where(scale > 0, scale, 1.0)
            pool.index[:count] = channels.int()
            pool.value[:count] = (columns / safe[:, None]).round().clamp(-127, 127).to(torch.int8)
            pool.scale[:count] = scale
            pool.offset[1:] = torch.bincount(experts, minlength=num_experts).cumsum(0).int()
        return pool

    @property
    def capacity(self) -> int:
        """The number of slots `C`."""
        return self.index.shape[0]

    @property
    def used(self) -> int:
        """The number of slots that hold a correction."""
        return int(self.offset.max())

    @property
    def size_bytes(self) -> int:
        """Bytes of all buffers, idle slots included."""
        return sum(t.numel() * t.element_size() for t in self.tensors().values())

    def tensors(self) -> Mapping[str, Tensor]:
        """The buffers by their field's name."""
        return {"offset": self.offset, "index": self.index, "value": self.value, "scale": self.scale}

    def experts(self) -> Tensor:
        """The expert of each used slot, `(S,)` int64."""
        counts = self.offset.diff().clamp(min=0).long()
        return torch.repeat_interleave(torch.arange(counts.shape[0], device=counts.device), counts)

    def columns(self) -> Tensor:
        """The corrections of the used slots, `(S, N)` float32."""
        return self.value[: self.used].float() * self.scale[: self.used, None]

    def dense(self, in_features: int) -> Tensor:
        """All corrections as a weight, `(E, N, K)` float32."""
        weight = torch.zeros(self.offset.shape[0] - 1, in_features, self.value.shape[1], device=self.value.device)
        weight[self.experts(), self.index[: self.used].long()] = self.columns()
        return weight.transpose(1, 2)

    def clone(self) -> ChannelPool:
        """A copy with storage of its own."""
        return ChannelPool(**{name: tensor.clone() for name, tensor in self.tensors().items()})

    @torch.no_grad()
    def copy_(self, other: ChannelPool) -> None:
        """Copies the contents of `other` into these buffers, in place.

        Raises:
            ValueError: a buffer differs in shape or dtype. Nothing is copied then.
        """
        theirs = other.tensors()
        for name, tensor in self.tensors().items():
            if tensor.shape != theirs[name].shape or tensor.dtype != theirs[name].dtype:
                raise ValueError(
                    f"pool buffer `{name}` is {tuple(tensor.shape)} {tensor.dtype} in the model "
                    f"but {tuple(theirs[name].shape)} {theirs[name].dtype} in what should replace it"
                )
        for name, tensor in self.tensors().items():
            tensor.copy_(theirs[name])
