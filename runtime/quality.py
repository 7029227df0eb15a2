"""What a pool leaves of the quantized base's error on the data at hand."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from moe_compiler.kernels.experts import PackedExpertLinear
from moe_compiler.kernels.pool import ChannelPool
from moe_compiler.passes.moments import SecondMoments
from moe_compiler.runtime.master import LinearMaster
from moe_compiler.runtime.rules import base_columns, weight_error


def expected_error(master: LinearMaster, packed: PackedExpertLinear, pool: ChannelPool, energy: Tensor) -> float:
    """Expected squared error of the linear's output on the data that `energy` was collected on, channel by channel.

    `Σ_{e,c} ‖W_e[:, c] − Ŵ_e[:, c]‖² · energy[e, c]`, where `Ŵ` is what the pool makes of the base. Correlations
    between channels are left out.

    Raises:
        RuntimeError: the pool holds a channel that the master does not have.
        ValueError: the pool holds low-rank slots and the master single columns.
    """
    error = master.error.double().clone()
    experts, index = pool.experts().cpu(), pool.index[: pool.used].long().cpu()
    low_rank = index >= packed.in_features
    places = (experts * packed.in_features + index)[~low_rank]
    left = (master.columns(places) - base_columns(packed, places)).double() - pool.columns().cpu()[~low_rank].double()
    error.view(-1)[places] = left.square().sum(dim=1)
    if bool(low_rank.any()):
        inputs, columns = pool.inputs(), pool.columns()
        for expert in experts[low_rank].unique().tolist():
            mine = (experts == expert).to(columns.device)
            rest = weight_error(master, packed, expert).to(columns.device) - columns[mine].t() @ inputs[mine]
            error[expert] = rest.double().square().sum(dim=0).cpu()
    return float((error * energy.double().cpu()).sum())


def output_errors(
    master: LinearMaster, packed: PackedExpertLinear, pools: Sequence[ChannelPool], moments: SecondMoments
) -> list[float]:
    """The squared error of the linear's output on the data of `moments` with each of some pool contents.

    `Σ_e tr((D_e − P_e)·Q_e·(D_e − P_e)ᵀ)` with the base's error `D` and the pool's corrections `P`, which have few
    ranks: only `tr(D·Q·Dᵀ)` needs a product of whole matrices.

    Args:
        master: the original weights, whole.
        packed: the quantized base.
        pools: the contents to compare.
        moments: second moments of the data.

    Raises:
        ValueError: the master has single columns only.
    """
    errors = [0.0] * len(pools)
    device = packed.planes.device
    parts = [(pool.experts().to(device), pool.columns().to(device), pool.inputs().to(device)) for pool in pools]
    for expert in moments.count.nonzero().squeeze(1).tolist():
        error = weight_error(master, packed, expert)
        gram = moments.expert(expert, device)
        base = gram.energy(error)
        for number, (experts, columns, inputs) in enumerate(parts):
            mine = experts == expert
            value, direction = columns[mine].t(), inputs[mine].t()
            seen = gram.times(direction)
            cross = ((error @ seen).double() * value.double()).sum()
            own = ((value.t() @ value).double() * (direction.t() @ seen).double()).sum()
            errors[number] += base - 2 * float(cross) + float(own)
    return errors
