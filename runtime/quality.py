"""What a pool leaves of the quantized base's error on the data at hand."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from moe_compiler.kernels.experts import PackedExpertLinear
from moe_compiler.kernels.pool import ChannelPool
from moe_compiler.passes.moments import Gram, SecondMoments
from moe_compiler.runtime.errors import base_columns, precision, weight_error
from moe_compiler.runtime.master import LinearMaster
from moe_compiler.runtime.sketch import OutputSketch


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
    sketches: Mapping[int, OutputSketch] | None = None,
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
            pools and no sketch count by it, channel by channel, which saves their products.
        sketches: by expert, what is known of `D·Xᵀ` already, where `moments` are those of rows. These experts' errors
            are then exact in the directions that were searched for, and estimated by probes in the rest, the same ones
            for all pools: without bias, and never negative (see `OutputSketch`).

    Raises:
        ValueError: the master has single columns only.
    """
    errors = [0.0] * len(pools)
    device, dtype = packed.planes.device, precision(packed, moments)
    parts = [(pool.experts().to(device), pool.columns().to(device), pool.inputs().to(device)) for pool in pools]
    with_slots = torch.cat([experts for experts, _, _ in parts]).unique().tolist()
    for expert in moments.count.nonzero().squeeze(1).tolist():
        known = None if sketches is None else sketches.get(expert)
        if energy is not None and known is None and expert not in with_slots:
            alone = float((master.error[expert].double() * energy[expert].double().cpu()).sum())
            errors = [one + alone for one in errors]
            continue
        mine = [experts == expert for experts, _, _ in parts]
        slots = [(columns[own].t(), inputs[own].t()) for own, (_, columns, inputs) in zip(mine, parts, strict=True)]
        if known is not None and not any(bool(own.any()) for own in mine):
            alone = known.squared_error()
            errors = [one + alone for one in errors]
            continue
        gram = moments.expert(expert, device)
        if known is None and not gram.is_hessian:
            error = weight_error(master, packed, expert, dtype)
            known = OutputSketch.whole(F.linear(error, gram.factor.to(dtype)))
        if known is not None:
            found = [known.squared_error(value, gram.factor @ direction) for value, direction in slots]
        else:
            found = _hessian_errors(weight_error(master, packed, expert), gram, slots)
        errors = [one + more for one, more in zip(errors, found, strict=True)]
    return errors


def _hessian_errors(error: Tensor, gram: Gram, slots: Sequence[tuple[Tensor, Tensor]]) -> list[float]:
    """`tr((D − P)·Q·(D − P)ᵀ)` for corrections `P = value · directionᵀ` of few ranks."""
    base = gram.energy(error)
    found = []
    for value, direction in slots:
        seen = gram.times(direction)
        cross = ((error @ seen).double() * value.double()).sum()
        own = ((value.t() @ value).double() * (direction.t() @ seen).double()).sum()
        found.append(base - 2 * float(cross) + float(own))
    return found
