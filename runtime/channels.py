"""Which input channels the pool corrects, and with what: the rules of `adapt` (DynaMo IV-B, V-A)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from moe_compiler.kernels.affine import choose_qparams, dequantize, quantize
from moe_compiler.kernels.experts import PackedExpertLinear
from moe_compiler.kernels.pool import ChannelPool


@dataclass(frozen=True)
class LinearMaster:
    """What stays of one linear's original weights, in host memory, so that channels can be corrected later.

    Attributes:
        error: `(E, K)` float32, `‖W[:, c] − Ŵ[:, c]‖²`: the squared error of each channel of the quantized base.
        column_norm: `(E, K)` float32, `‖W[:, c]‖`.
        experts: `(M,)` int64, the expert of each original column that is kept; sorted by expert and channel.
        channels: `(M,)` int64, its input channel.
        columns: `(M, N)`, the original column in the model's own precision.
    """

    error: Tensor
    column_norm: Tensor
    experts: Tensor
    channels: Tensor
    columns: Tensor

    @property
    def places(self) -> Tensor:
        """`e · K + c` of each original column that is kept, `(M,)` int64, ascending."""
        return self.experts * self.error.shape[1] + self.channels

    @property
    def kept_error(self) -> Tensor:
        """`error` where the original column is kept, 0 elsewhere, `(E, K)`."""
        kept = torch.zeros_like(self.error)
        kept[self.experts, self.channels] = self.error[self.experts, self.channels]
        return kept

    @property
    def size_bytes(self) -> int:
        """Host memory that the master takes."""
        tensors = (self.error, self.column_norm, self.experts, self.channels, self.columns)
        return sum(t.numel() * t.element_size() for t in tensors)


def channel_error(weight: Tensor, packed: PackedExpertLinear) -> Tensor:
    """`‖W[:, c] − Ŵ[:, c]‖²` of every channel of the quantized base, `(E, K)` float32 on the host."""
    error = torch.empty(weight.shape[0], weight.shape[2])
    for expert in range(weight.shape[0]):
        difference = weight[expert].float() - packed.dequantize_expert(expert)
        error[expert] = difference.square().sum(dim=0).cpu()
    return error


def worst_channels(error: Tensor, energy: Tensor, count: int) -> Tensor:
    """The `count` channels with the largest expected error, those without any left out; see `restore`.

    Args:
        error: `(E, K)`.
        energy: `(E, K)`.
        count: at most so many.

    Returns:
        Their places `e · K + c`, int64.
    """
    score = (error * energy.float().cpu()).view(-1)
    return torch.topk(score, min(count, int((score > 0).sum()))).indices


def assigned_channels(energy: Tensor, per_expert: Sequence[int], count: int) -> Tensor:
    """The channels that a plan wants at INT8: of each expert those with the largest energy (MoQa, section 3.3: by the
    diagonal of the Hessian); if they are more than `count`, those with the largest energy of all.

    Args:
        energy: `(E, K)`.
        per_expert: channels of each expert.
        count: at most so many in all.

    Returns:
        Their places `e · K + c`, int64.
    """
    energy = energy.float().cpu()
    rank = energy.argsort(dim=1, descending=True).argsort(dim=1)
    wanted = rank < torch.tensor(per_expert)[:, None]
    score = torch.where(wanted, energy, -1.0).view(-1)
    return torch.topk(score, min(count, int(wanted.sum()))).indices


def build_master(weight: Tensor, error: Tensor, first: Tensor, fraction: float) -> LinearMaster:
    """Keeps the original columns that a later correction most likely wants.

    Beside those in `first` these are the channels with the largest error `‖W[:, c] − Ŵ[:, c]‖²`, whatever passed them
    during calibration. Our decision: other data use other experts and channels, and of the rankings tried on the
    embedded model (by error, by error times the calibration data's energy or its mean over experts) this one kept most
    of what new data needed.

    Args:
        weight: `(E, N, K)`, the original weight.
        error: `(E, K)`, see `channel_error`.
        first: places `e · K + c` of channels that are kept in any case, such as those in the pool.
        fraction: the share of the `E·K` columns to keep, 1 for all.
    """
    channels = weight.shape[2]
    score = error.view(-1).clone()
    score[first] = torch.inf
    best = torch.topk(score, max(first.numel(), round(fraction * score.numel()))).indices.sort().values
    at_expert, at_channel = best // channels, best % channels
    columns = weight[at_expert.to(weight.device), :, at_channel.to(weight.device)]
    return LinearMaster(
        error=error,
        column_norm=torch.linalg.vector_norm(weight, dim=1, dtype=torch.float32).cpu(),
        experts=at_expert,
        channels=at_channel,
        columns=columns.cpu(),
    )


def hold(master: LinearMaster, packed: PackedExpertLinear, places: Tensor) -> ChannelPool:
    """Pool contents that restore the channels at `places` (`e · K + c`), which the master must have, on the host."""
    width = master.error.shape[1]
    rows = torch.searchsorted(master.places, places)
    delta = master.columns[rows].float() - base_columns(packed, places // width, places % width)
    return _contents(packed, places // width, places % width, delta)


def base_columns(packed: PackedExpertLinear, experts: Tensor, channels: Tensor) -> Tensor:
    """Columns of the quantized base, `(S, N)` float32 on the host, for `S` pairs of expert and channel."""
    columns = torch.empty(experts.shape[0], packed.out_features)
    for expert in experts.unique().tolist():
        rows = (experts == expert).nonzero().squeeze(1)
        base = packed.dequantize_expert(expert).cpu()
        columns[rows] = base[:, channels[rows]].t()
    return columns


def restore(master: LinearMaster, packed: PackedExpertLinear, energy: Tensor) -> ChannelPool:
    """Rule `"restore"`: the slots go to the channels with the largest expected error on the new data.

    The expected squared error of channel `c` of expert `e` is `‖W[:, c] − Ŵ[:, c]‖² · Σ g² x_c²`; the slot holds the
    difference, so the channel is restored to INT8 precision of its residual. Our decision; it needs statistics of
    the new data and the master's columns.

    Args:
        master: the original columns to choose from.
        packed: the quantized base.
        energy: `(E, K)`, the sum of `g²·x_c²` on the new data.

    Returns:
        The new contents, on the host. Slots that no channel needs stay idle.
    """
    return hold(master, packed, worst_channels(master.kept_error, energy, packed.pool.capacity))


def recluster(
    master: LinearMaster, packed: PackedExpertLinear, significance: Tensor, bits: Sequence[int], energy: Tensor
) -> ChannelPool:
    """Rule `"cluster"`: cached channels are requantized to the width of their expert's new cluster (DynaMo V-A).

    Every kept channel of an expert whose cluster changed is a candidate; the most significant ones on the new data
    take the slots. A slot holds the difference between the channel requantized from the original to the new width, up
    or down, and the base. Our decisions, where the paper says nothing: requantizing uses one scale per group of 128
    outputs of the column, and slots that are left over restore channels of the other experts as rule `"restore"` does.

    Args:
        master: the original columns to choose from.
        packed: the quantized base.
        significance: `(E, K)`, the channels' significance on the new data.
        bits: the experts' widths by their new clusters.
        energy: `(E, K)`, the sum of `g²·x_c²` on the new data.

    Returns:
        The new contents, on the host.
    """
    changed = torch.tensor([new != old for new, old in zip(bits, packed.bits, strict=True)])
    candidate = changed[master.experts]
    score = torch.where(candidate, significance.cpu().float()[master.experts, master.channels], 0.0)
    rows = torch.topk(score, min(packed.pool.capacity, int((score > 0).sum()))).indices
    experts, channels = master.experts[rows], master.channels[rows]
    wanted = master.columns[rows].float()
    for one in {bits[expert] for expert in experts.tolist()}:
        these = torch.tensor([bits[expert] == one for expert in experts.tolist()])
        scale, zero_point = choose_qparams(wanted[these], one, 128)
        wanted[these] = dequantize(quantize(wanted[these], scale, zero_point, one, 128), scale, zero_point, 128)
    others = master.kept_error.masked_fill(changed[:, None], 0)
    places = worst_channels(others, energy, packed.pool.capacity - rows.numel())
    left = torch.searchsorted(master.places, places)
    experts = torch.cat([experts, master.experts[left]])
    channels = torch.cat([channels, master.channels[left]])
    wanted = torch.cat([wanted, master.columns[left].float()])
    return _contents(packed, experts, channels, wanted - base_columns(packed, experts, channels))


def expected_error(master: LinearMaster, packed: PackedExpertLinear, pool: ChannelPool, energy: Tensor) -> float:
    """Expected squared error of the linear's output on the data that `energy` was collected on, channel by channel.

    `Σ_{e,c} ‖W_e[:, c] − Ŵ_e[:, c]‖² · energy[e, c]`, where channels in the pool count with what the pool leaves.
    Correlations between channels are left out.
    """
    error = master.error.double().clone()
    experts, channels = pool.experts().cpu(), pool.index[: pool.used].long().cpu()
    wanted = experts * master.error.shape[1] + channels
    at = torch.searchsorted(master.places, wanted).clamp(max=master.places.numel() - 1)
    if not torch.equal(master.places[at], wanted):
        raise RuntimeError(
            "the channel pool holds channels that are not in the master: the model's state was loaded from another "
            "compilation; load it into a model that was compiled in the same way"
        )
    original = master.columns[at].double()
    left = original - base_columns(packed, experts, channels).double() - pool.columns().double().cpu()
    error[experts, channels] = left.square().sum(dim=1)
    return float((error * energy.double().cpu()).sum())


def _contents(packed: PackedExpertLinear, experts: Tensor, channels: Tensor, delta: Tensor) -> ChannelPool:
    return ChannelPool.from_columns(experts, channels, delta, packed.pool)
