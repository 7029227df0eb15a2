"""What a pool leaves of the quantized base's error on the data at hand."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from moe_compiler.kernels.experts import PackedExpertLinear
from moe_compiler.kernels.pool import ChannelPool
from moe_compiler.passes.moments import SecondMoments
from moe_compiler.runtime.errors import base_columns, precision, weight_error
from moe_compiler.runtime.master import LinearMaster


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
        inputs, columns, dtype = pool.inputs(), pool.columns(), precision(packed, master)
        for expert in experts[low_rank].unique().tolist():
            mine = (experts == expert).to(columns.device)
            rest = weight_error(master, packed, expert, dtype).to(columns.device) - columns[mine].t() @ inputs[mine]
            error[expert] = rest.double().square().sum(dim=0).cpu()
    return float((error * energy.double().cpu()).sum())


def output_errors(
    master: LinearMaster,
    packed: PackedExpertLinear,
    pools: Sequence[ChannelPool],
    moments: SecondMoments,
    energy: Tensor | None = None,
    images: Mapping[int, Tensor] | None = None,
) -> list[float]:
    """The squared error of the linear's output on the data of `moments` with each of some pool contents.

    `Σ_e tr((D_e − P_e)·Q_e·(D_e − P_e)ᵀ)` with the base's error `D` and the pool's corrections `P`, which have few
    ranks: only `tr(D·Q·Dᵀ)` needs a product of whole matrices.

    Args:
        master: the original weights, whole.
        packed: the quantized base.
        pools: the contents to compare.
        moments: second moments of the data.
        energy: `(E, K)`, the sum of `g²·x_c²` on the data. Where it is given, experts that have a slot in none of the
            pools count by it, channel by channel, which saves their products.
        images: by expert, `D·Xᵀ` `(N, n)`, where it is known already and `moments` are those of rows.

    Raises:
        ValueError: the master has single columns only.
    """
    errors = [0.0] * len(pools)
    device, dtype = packed.planes.device, precision(packed, moments)
    parts = [(pool.experts().to(device), pool.columns().to(device), pool.inputs().to(device)) for pool in pools]
    with_slots = torch.cat([experts for experts, _, _ in parts]).unique().tolist()
    for expert in moments.count.nonzero().squeeze(1).tolist():
        if energy is not None and expert not in with_slots:
            alone = float((master.error[expert].double() * energy[expert].double().cpu()).sum())
            errors = [one + alone for one in errors]
            continue
        gram = moments.expert(expert, device)
        known = None if images is None else images.get(expert)
        if known is None:
            error = weight_error(master, packed, expert, torch.float32 if gram.is_hessian else dtype)
            known = None if gram.is_hessian else F.linear(error, gram.factor.to(dtype))
        base = float(known.float().square().sum(dtype=torch.float64)) if known is not None else gram.energy(error)
        for number, (experts, columns, inputs) in enumerate(parts):
            mine = experts == expert
            value, direction = columns[mine].t(), inputs[mine].t()
            if known is not None:
                seen = gram.factor @ direction
                cross = ((known @ seen.to(dtype)).double() * value.double()).sum()
                own_gram = seen.t() @ seen
            else:
                seen = gram.times(direction)
                cross = ((error @ seen).double() * value.double()).sum()
                own_gram = direction.t() @ seen
            own = ((value.t() @ value).double() * own_gram.double()).sum()
            errors[number] += base - 2 * float(cross) + float(own)
    return errors
