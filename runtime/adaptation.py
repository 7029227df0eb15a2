"""What an adaptation chooses for one layer: the new contents of its pools, computed aside, and what they change."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from moe_compiler.kernels.pool import ChannelPool
from moe_compiler.passes.assign import assign
from moe_compiler.passes.capture import MoEBlock
from moe_compiler.passes.lower import LoweredExperts
from moe_compiler.passes.significance import channel_significance
from moe_compiler.passes.statistics import BlockStatistics, LayerEvidence
from moe_compiler.runtime.channels import LinearMaster, expected_error, recluster, restore
from moe_compiler.runtime.report import LayerChange, LinearChange, jensen_shannon, moved_slots

RULES = ("restore", "cluster")


@dataclass(frozen=True)
class RuntimeLayer:
    """What the runtime knows of one lowered MoE block.

    Attributes:
        block: the block; its experts are lowered.
        masters: by linear, what is kept of the original weights.
        calibration_count: `(E,)` tokens that the calibration data routed to each expert, on the host.
        overhead_bits: by linear, the bits per weight beside the codes.
    """

    block: MoEBlock
    masters: Mapping[str, LinearMaster]
    calibration_count: Tensor
    overhead_bits: Mapping[str, float]

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


def choose_layer(
    layer: RuntimeLayer, statistics: BlockStatistics, rule: str, name: str, widths: Sequence[int]
) -> tuple[dict[str, ChannelPool], LayerChange]:
    """The new pool contents of one layer, on the host, and what they change."""
    evidence = layer.evidence({name: statistics})
    old_bits = {linear: packed.bits for linear, packed in layer.experts.all_packed().items()}
    target = _effective_bits(evidence, old_bits)
    plan = assign([evidence], "dynamo", target_bits=target, widths=widths).layers[layer.block.path]
    pools, changes = {}, []
    for linear, packed in layer.experts.all_packed().items():
        master = layer.masters[linear]
        sums = statistics.linears[linear]
        if rule == "restore":
            pool = restore(master, packed, sums.sq_sum)
        else:
            significance = channel_significance(sums, master.column_norm.double().to(sums.abs_sum.device))
            pool = recluster(master, packed, significance, plan.bits[linear], sums.sq_sum)
        pools[linear] = pool
        changes.append(
            LinearChange(
                path=layer.block.path,
                linear=linear,
                capacity=pool.capacity,
                used=pool.used,
                moved=moved_slots(_keys(packed.pool), _keys(pool)),
                error_before=expected_error(master, packed, packed.pool, sums.sq_sum),
                error_after=expected_error(master, packed, pool, sums.sq_sum),
            )
        )
    clusters_changed = _experts_changed(plan.bits, old_bits)
    divergence = float(jensen_shannon(statistics.count.cpu(), layer.calibration_count))
    return pools, LayerChange(layer.block.path, divergence, clusters_changed, tuple(changes))


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
    """One number per used slot that stands for its expert and channel."""
    return (pool.experts() << 32 | pool.index[: pool.used].long()).cpu()
