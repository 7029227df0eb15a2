"""`model.runtime`: adapting a compiled model to new data, in place, while it serves."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from moe_compiler.kernels.experts import PackedExpertLinear
from moe_compiler.kernels.pool import ChannelPool
from moe_compiler.passes.assign import assign
from moe_compiler.passes.base import Progress
from moe_compiler.passes.calibrate import Dataset, ObservedModel
from moe_compiler.passes.capture import MoEBlock
from moe_compiler.passes.lower import LoweredExperts
from moe_compiler.passes.significance import channel_significance
from moe_compiler.passes.statistics import BlockStatistics, LayerEvidence
from moe_compiler.runtime.channels import LinearMaster, expected_error, recluster, restore
from moe_compiler.runtime.report import (
    AdaptReport,
    LayerChange,
    LinearChange,
    jensen_shannon,
    moved_slots,
)

RULES = ("restore", "cluster")
CALIBRATION = "calibration"

Pools = Mapping[tuple[str, str], ChannelPool]
"""Pool contents by MoE block path and linear."""


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


class Runtime:
    """Adapts a compiled model to new data and takes it back.

    All that changes is the contents of the channel pools' buffers; shapes, dtypes, strides and addresses stay, so a
    compiled graph of the model keeps running and follows the change without a recompilation.

    Attributes:
        layers: what is known of each lowered MoE block, by path.
        active: the name of the contents in the pools: `"calibration"` or that of the last adaptation.
    """

    def __init__(
        self,
        model: nn.Module,
        layers: Mapping[str, RuntimeLayer],
        *,
        rule: str,
        widths: Sequence[int],
        tokens_per_batch: int,
        load: Callable[..., Dataset],
        progress: Progress | None = None,
    ) -> None:
        self.model = model
        self.layers = dict(layers)
        self.rule = rule
        self.widths = tuple(widths)
        self.tokens_per_batch = tokens_per_batch
        self.active = CALIBRATION
        self._load = load
        self._progress = progress
        self._calibration = {key: packed.pool.clone() for key, packed in self._packed().items()}

    @torch.no_grad()
    def adapt(
        self, samples: Any, *, rule: str | None = None, name: str = "adapted", tokenizer: Any = None
    ) -> AdaptReport:
        """Fills the channel pools for new data, in place.

        The samples run once through the quantized model (through a second model object over the same tensors, so the
        serving model and what was compiled from it are not touched); the new contents are computed aside and checked,
        and only then copied into the pools. If anything fails, the pools keep what they had.

        Args:
            samples: the new data: texts, token ids or a `datasets.Dataset`, a few thousand tokens.
            rule: `"restore"`: restore the channels with the largest expected error on the new data; `"cluster"`: the
                paper's rule, requantize cached channels to the width of their expert's new cluster, up or down; it may
                leave a larger error than it found, which the report shows. The default was chosen at compile time.
                Both can only draw on the columns that the master keeps.
            name: what to call the adaptation.
            tokenizer: needed where `samples` is text and none was given to `dynamo_compile`.

        Returns:
            What changed, per layer, and the time of each step.

        Raises:
            ValueError: unknown rule, or bad samples (see `moe_compiler.data.load_samples`).
            FloatingPointError: activations or new contents were not finite.
        """
        rule = self.rule if rule is None else rule
        if rule not in RULES:
            raise ValueError(f"`rule` must be one of {', '.join(map(repr, RULES))}, but is {rule!r}")
        if not isinstance(name, str) or not name:
            raise ValueError(f"`name` must be a text that is not empty, but is {name!r}")
        dataset = self._load(samples, name=name, tokenizer=tokenizer)
        start = time.perf_counter()
        blocks = {path: layer.block for path, layer in self.layers.items()}
        observed = ObservedModel.of(self.model, blocks)
        seen = observed.observe(dataset, name=name, tokens_per_batch=self.tokens_per_batch, progress=self._progress)
        observed_at = time.perf_counter()
        pools: dict[tuple[str, str], ChannelPool] = {}
        changes = []
        for path, layer in self.layers.items():
            contents, change = _choose(layer, seen[path], rule, name, self.widths)
            pools |= {(path, linear): pool for linear, pool in contents.items()}
            changes.append(change)
        chosen_at = time.perf_counter()
        self._swap(pools, name)
        return AdaptReport(
            name=name,
            rule=rule,
            tokens=sum(sample.numel() for sample in dataset),
            layers=tuple(changes),
            seconds={
                "observe": observed_at - start,
                "choose": chosen_at - observed_at,
                "swap": time.perf_counter() - chosen_at,
            },
        )

    def revert(self) -> None:
        """Puts the contents back that the pools had when the model was compiled, bit for bit."""
        self._swap(self._calibration, CALIBRATION)

    def _packed(self) -> dict[tuple[str, str], PackedExpertLinear]:
        return {
            (path, name): packed
            for path, layer in self.layers.items()
            for name, packed in layer.experts.all_packed().items()
        }

    @torch.no_grad()
    def _swap(self, pools: Pools, name: str) -> None:
        for key, packed in self._packed().items():
            packed.pool.copy_(pools[key])
        self.active = name


def _choose(
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
