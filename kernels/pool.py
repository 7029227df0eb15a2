"""The channel pool: a fixed number of slots that add corrections to input channels of a linear's experts.

A slot belongs to one input channel `c` of one expert `e` and holds a column `Δ` of `N` numbers as INT8 with one
scale: the operator computes `W_e · x + Σ_slots Δ · x_c`. The base weight is never touched; changing what the model
computes is copying new contents into these buffers, whose shapes never change (DynaMo, arXiv 2503.21135v3, V-A; that
the slots are additive, shared by the layer's experts and INT8 is our decision).

A *low-rank* slot is the same with a direction `u` of `K` numbers in the channel's place, `Δ · (u · x)`; a channel is
the slot whose direction is one-hot. A pool has `D` directions, which its slots refer to; with `D = 0` all are channels.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields

import torch
from torch import Tensor


@dataclass(frozen=True)
class ChannelPool:
    """The slots of one linear, sorted by expert.

    Attributes:
        offset: `(E + 1,)` int32; slots `offset[e]` up to `offset[e + 1]` belong to expert `e`; none if that is less.
        index: `(C,)` int32, the input channel of each slot, or `K` plus the number of its direction; 0 in idle slots.
        value: `(C, N)` int8, the slot's column in units of `scale`; 0 in idle slots.
        scale: `(C,)` float32; of a low-rank slot, the product of the column's unit and the direction's.
        direction: `(D, K)` int8, the directions; 0 in idle ones. `D` is at most `C`.
    """

    offset: Tensor
    index: Tensor
    value: Tensor
    scale: Tensor
    direction: Tensor

    @classmethod
    def empty(
        cls,
        num_experts: int,
        capacity: int,
        out_features: int,
        in_features: int,
        directions: int = 0,
        device: torch.device | str | None = None,
    ) -> ChannelPool:
        """A pool of `capacity` idle slots, `directions` of which can be low-rank."""
        return cls(
            offset=torch.zeros(num_experts + 1, dtype=torch.int32, device=device),
            index=torch.zeros(capacity, dtype=torch.int32, device=device),
            value=torch.zeros(capacity, out_features, dtype=torch.int8, device=device),
            scale=torch.zeros(capacity, dtype=torch.float32, device=device),
            direction=torch.zeros(directions, in_features, dtype=torch.int8, device=device),
        )

    @classmethod
    def from_columns(cls, experts: Tensor, channels: Tensor, columns: Tensor, like: ChannelPool) -> ChannelPool:
        """Contents for a pool: the given corrections of input channels, each rounded to INT8 with its own scale.

        Args:
            experts: `(S,)` int64, the expert of each correction.
            channels: `(S,)` int64, its input channel.
            columns: `(S, N)` float, its column `Δ`.
            like: the pool whose sizes the contents must have.

        Raises:
            ValueError: there are more corrections than slots, or two for one channel.
            FloatingPointError: a column is not finite.
        """
        return cls._filled(experts, channels, columns, None, like)

    @classmethod
    def from_directions(cls, experts: Tensor, directions: Tensor, columns: Tensor, like: ChannelPool) -> ChannelPool:
        """Contents for a pool: corrections `columns[s] ⊗ directions[s]`, both rounded to INT8.

        Args:
            experts: `(S,)` int64, the expert of each correction.
            directions: `(S, K)` float.
            columns: `(S, N)` float.
            like: the pool whose sizes the contents must have.

        Raises:
            ValueError: there are more corrections than directions.
            FloatingPointError: a direction or a column is not finite.
        """
        return cls._filled(experts, torch.arange(experts.shape[0]).to(experts.device), columns, directions, like)

    @classmethod
    def _filled(
        cls, experts: Tensor, keys: Tensor, columns: Tensor, directions: Tensor | None, like: ChannelPool
    ) -> ChannelPool:
        """`keys` are channels, or the order of an expert's directions."""
        count, rows = experts.shape[0], like.capacity if directions is None else like.direction.shape[0]
        if count > rows:
            kind = "slots" if directions is None else "directions"
            raise ValueError(f"`like` has {rows} {kind}, but {count} corrections were given")
        order = torch.argsort(experts * (int(keys.max()) + 1 if count else 1) + keys)
        experts, keys = experts[order], keys[order]
        repeated = (experts[1:] == experts[:-1]) & (keys[1:] == keys[:-1])
        if bool(repeated.any()):
            at = int(repeated.nonzero()[0])
            raise ValueError(
                "`channels` must name each channel of an expert once, "
                f"but expert {int(experts[at])} has channel {int(keys[at])} twice"
            )
        num_experts, in_features = like.offset.shape[0] - 1, like.direction.shape[1]
        pool = cls.empty(
            num_experts, like.capacity, like.value.shape[1], in_features, like.direction.shape[0], columns.device
        )
        if not count:
            return pool
        pool.value[:count], pool.scale[:count] = _int8(columns[order], "columns")
        if directions is None:
            pool.index[:count] = keys.int()
        else:
            pool.index[:count] = in_features + torch.arange(count, dtype=torch.int32, device=columns.device)
            pool.direction[:count], unit = _int8(directions[order], "directions")
            pool.scale[:count] *= unit
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
        return {field.name: getattr(self, field.name) for field in fields(self)}

    def experts(self) -> Tensor:
        """The expert of each used slot, `(S,)` int64."""
        counts = self.offset.diff().clamp(min=0).long()
        return torch.repeat_interleave(torch.arange(counts.shape[0], device=counts.device), counts)

    def columns(self) -> Tensor:
        """The corrections of the used slots, `(S, N)` float32."""
        return self.value[: self.used].float() * self.scale[: self.used, None]

    def inputs(self) -> Tensor:
        """What each used slot multiplies the input with, one-hot or its direction in INT8 units, `(S, K)` float32."""
        used, channels = self.index[: self.used].long(), self.direction.shape[1]
        one_hot = torch.nn.functional.one_hot(used.clamp(max=channels), channels + 1)[:, :channels].float()
        low_rank = used >= channels
        one_hot[low_rank] = self.direction[used[low_rank] - channels].float()
        return one_hot

    def dense(self) -> Tensor:
        """All corrections as a weight, `(E, N, K)` float32."""
        num_experts, (_, rows), channels = self.offset.shape[0] - 1, self.value.shape, self.direction.shape[1]
        weight = torch.zeros(num_experts, rows, channels, device=self.value.device)
        columns, inputs, experts = self.columns(), self.inputs(), self.experts()
        for expert in experts.unique().tolist():
            mine = experts == expert
            weight[expert] = columns[mine].t() @ inputs[mine]
        return weight

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


def _int8(rows: Tensor, name: str) -> tuple[Tensor, Tensor]:
    """Rows `(S, M)` in units of their largest over 127, and these units `(S,)`."""
    if not bool(torch.isfinite(rows).all()):
        raise FloatingPointError(f"`{name}` must be finite, but a correction of the pool holds NaN or infinity")
    unit = rows.float().abs().amax(dim=1) / 127
    safe = torch.where(unit > 0, unit, 1.0)
    return (rows.float() / safe[:, None]).round().clamp(-127, 127).to(torch.int8), unit
