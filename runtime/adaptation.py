"""What an adaptation chooses for one layer: the new contents of its pools, computed aside, and what they change."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from moe_compiler.kernels.experts import PackedExpertLinear
from moe_compiler.kernels.pool import ChannelPool
from moe_compiler.passes.assign import assign
from moe_compiler.passes.capture import MoEBlock
from moe_compiler.passes.lower import LoweredExperts
from moe_compiler.passes.moments import HessianMoments, SecondMoments
from moe_compiler.passes.significance import channel_significance
from moe_compiler.passes.statistics import BlockStatistics, LayerEvidence, LinearStatistics
from moe_compiler.runtime.lowrank import lowrank
from moe_compiler.runtime.master import LinearMaster
from moe_compiler.runtime.quality import expected_error, output_errors
from moe_compiler.runtime.report import LayerChange, LinearChange, jensen_shannon, moved_slots
from moe_compiler.runtime.rules import RULES, compensate, needs, recluster, restore
from moe_compiler.runtime.sketch import OutputSketch

__all__ = ["RULES", "RuntimeLayer", "check_rule", "choose_layer"]


@dataclass(frozen=True)
class RuntimeLayer:
    """What the runtime knows of one lowered MoE block.

    Attributes:
        block: the block; its experts are lowered.
        masters: by linear, what is kept of the original weights.
        calibration_count: `(E,)` tokens that the calibration data routed to each expert, on the host.
        overhead_bits: by linear, the bits per weight beside the codes.
        top_k: experts per token.
    """

    block: MoEBlock
    masters: Mapping[str, LinearMaster]
    calibration_count: Tensor
    overhead_bits: Mapping[str, float]
    top_k: int

    @property
    def experts(self) -> LoweredExperts:
        """The lowered experts as they stand in the model."""
        experts = self.block.experts
        assert isinstance(experts, LoweredExperts)
        return experts

    def evidence(self, statistics: Mapping[str, BlockStatistics]) -> LayerEvidence:
        """The block's evidence for an allocation strategy on other data."""
        return LayerEvidence(
            path=self.block.path,
            statistics=statistics,
            column_norm={name: master.column_norm.double() for name, master in self.masters.items()},
            shapes={p.name: (p.out_features, p.in_features) for p in self.block.spec.projections},
            overhead_bits=self.overhead_bits,
        )


def check_rule(rule: str, layers: Mapping[str, RuntimeLayer]) -> None:
    """Checks that a rule can work on a model, before anything is observed.

    Raises:
        ValueError: there is no such rule, or the model was compiled without what it needs.
    """
    if needs(rule) == "sums":
        return
    for path, layer in layers.items():
        for linear, packed in layer.experts.all_packed().items():
            if not layer.masters[linear].whole:
                raise ValueError(
                    f"rule {rule!r} needs the whole original weights, but the master of `{linear}` in `{path}` keeps "
                    "single columns: compile with `master` 'memory' or 'checkpoint'"
                )
            if rule == "lowrank" and packed.pool.capacity and not packed.pool.direction.shape[0]:
                raise ValueError(
                    f"rule 'lowrank' needs a pool with directions, but the pool of `{linear}` in `{path}` has "
                    f"{packed.pool.capacity} slots and none: compile with `pool` 'lowrank'"
                )


def choose_layer(
    layer: RuntimeLayer,
    statistics: BlockStatistics,
    rule: str,
    name: str,
    widths: Sequence[int],
    moments: Mapping[str, SecondMoments] | None = None,
) -> tuple[dict[str, ChannelPool], LayerChange]:
    """The new pool contents of one layer, on the host, and what they change.

    Args:
        layer: the layer.
        statistics: what it saw of the new data.
        rule: one of `RULES`.
        name: what the new data are called.
        widths: the widths that the layer's experts may have.
        moments: by linear, the second moments of the new data; those of `statistics` (its Hessians) if `None`.

    Raises:
        ValueError: the rule needs second moments and there are none, or see `check_rule`.
    """
    check_rule(rule, {layer.block.path: layer})
    evidence = layer.evidence({name: statistics})
    old_bits = {linear: packed.bits for linear, packed in layer.experts.all_packed().items()}
    target = _effective_bits(evidence, old_bits)
    plan = assign([evidence], "dynamo", target_bits=target, widths=widths).layers[layer.block.path]
    pools, changes = {}, []
    for linear, packed in layer.experts.all_packed().items():
        master = layer.masters[linear]
        sums = statistics.linears[linear]
        seen, sketches = None, dict[int, OutputSketch]()
        if needs(rule) == "hessian":
            seen = moments[linear] if moments is not None else _hessians(sums, statistics.count, rule)
        if rule == "lowrank" and seen is not None:
            pool = lowrank(master, packed, seen, sketches)
        elif rule == "compensate" and seen is not None:
            pool = compensate(master, packed, sums.sq_sum, seen)
        elif rule == "restore":
            pool = restore(master, packed, sums.sq_sum)
        else:
            significance = channel_significance(sums, master.column_norm.double().to(sums.abs_sum.device))
            pool = recluster(master, packed, significance, plan.bits[linear], sums.sq_sum)
        before, after = _errors(master, packed, (packed.pool, pool), sums.sq_sum, seen, sketches)
        pools[linear] = pool
        changes.append(
            LinearChange(
                path=layer.block.path,
                linear=linear,
                capacity=pool.capacity,
                used=pool.used,
                moved=moved_slots(_keys(packed.pool), _keys(pool)),
                error_before=before,
                error_after=after,
            )
        )
    clusters_changed = _experts_changed(plan.bits, old_bits)
    divergence = float(jensen_shannon(statistics.count.cpu(), layer.calibration_count))
    return pools, LayerChange(layer.block.path, divergence, clusters_changed, tuple(changes))


def _hessians(sums: LinearStatistics, count: Tensor, rule: str) -> SecondMoments:
    if sums.hessian is None:
        raise ValueError(f"rule {rule!r} needs second moments of the new data, but `statistics` hold no Hessians")
    return HessianMoments(sums.hessian, count.cpu())


def _errors(
    master: LinearMaster,
    packed: PackedExpertLinear,
    pools: tuple[ChannelPool, ChannelPool],
    energy: Tensor,
    moments: SecondMoments | None,
    sketches: Mapping[int, OutputSketch],
) -> tuple[float, float]:
    """The error before and after: with correlations between channels where second moments are known."""
    if moments is not None:
        before, after = output_errors(master, packed, pools, moments, energy, sketches)
    else:
        before, after = (expected_error(master, packed, pool, energy) for pool in pools)
    return before, after


def _effective_bits(evidence: LayerEvidence, bits: Mapping[str, Sequence[int]]) -> float:
    """Effective bits of the layer with the given widths: codes and overhead, weighted by the linears' sizes."""
    weights = {linear: rows * columns for linear, (rows, columns) in evidence.shapes.items()}
    spent = sum(
        weights[linear] * (sum(widths) / len(widths) + evidence.overhead_bits[linear])
        for linear, widths in bits.items()
    )
    return spent / sum(weights.values())


def _experts_changed(new: Mapping[str, Sequence[int]], old: Mapping[str, Sequence[int]]) -> int:
    """Experts that have another width in any linear."""
    pairs = [zip(new[linear], old[linear], strict=True) for linear in old]
    return sum(any(a != b for a, b in expert) for expert in zip(*pairs, strict=True))


def _keys(pool: ChannelPool) -> Tensor:
    """One number per used slot that stands for its expert and channel, or for its expert and direction's contents."""
    index = pool.index[: pool.used].long()
    channels = pool.direction.shape[1]
    low_rank = index >= channels
    if bool(low_rank.any()):
        direction = pool.direction[(index - channels)[low_rank]].long()
        place = torch.arange(1, channels + 1, device=direction.device)
        index[low_rank] = channels + ((direction * place * place).sum(dim=1) & 0x3FFFFFFF)
    return (pool.experts() << 32 | index).cpu()
