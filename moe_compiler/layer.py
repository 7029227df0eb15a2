"""One MoE block at a time: measure what a width costs, quantize, pack, keep a master, lower."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from operator import add

import torch
from torch import Tensor, nn

from moe_compiler.config import CompileConfig
from moe_compiler.hessians import Hessians
from moe_compiler.kernels.affine import WIDTHS, QuantizedWeight
from moe_compiler.kernels.experts import PackedExpertLinear, overhead_bits
from moe_compiler.kernels.planes import TILE
from moe_compiler.passes.capture import MoEBlock, Projection, expert_weight
from moe_compiler.passes.hidden import HiddenMoments, make_up
from moe_compiler.passes.lower import lower_block
from moe_compiler.passes.moments import HessianMoments
from moe_compiler.passes.plan import LayerPlan
from moe_compiler.passes.quantize import blend_hessians, output_error, quantize_experts
from moe_compiler.passes.statistics import BlockStatistics, LayerEvidence
from moe_compiler.runtime.adaptation import RuntimeLayer
from moe_compiler.runtime.checkpoint import Checkpoint
from moe_compiler.runtime.lowrank import lowrank
from moe_compiler.runtime.master import CacheMaster, CheckpointMaster, LinearMaster, MemoryMaster, channel_error
from moe_compiler.runtime.rules import assigned_channels, hold, worst_channels

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class CompiledLayer:
    """What compiling one MoE block gave.

    Attributes:
        runtime: what the runtime needs of the block.
        blended: by linear, the experts that saw too few tokens and took part of the layer's pooled Hessian.
    """

    runtime: RuntimeLayer
    blended: Mapping[str, tuple[int, ...]]


def pool_size(projection: Projection, num_experts: int, config: CompileConfig) -> tuple[int, int]:
    """Slots and directions of the pool of one linear; slots with directions are as many as take the same bits."""
    slots = round(config.pool_fraction * num_experts * projection.in_features)
    if config.pool == "channels":
        return slots, 0
    channel_bits = 8 * projection.out_features + 64
    slots = slots * channel_bits // (channel_bits + 8 * projection.in_features)
    return slots, slots


def check_master(model: nn.Module, blocks: Mapping[str, MoEBlock], config: CompileConfig) -> None:
    """Checks that the master `"checkpoint"` finds the weights of every block, while nothing has been changed yet.

    Raises:
        ValueError: a linear's weights are in no file of the model: names the folder and the linear.
    """
    if config.master != "checkpoint":
        return
    checkpoint = Checkpoint.of(model)
    for block in blocks.values():
        for p in block.spec.projections:
            checkpoint.find(block.spec.path, p.name, expert_weight(block.experts, block.spec, p.name))


def layer_overhead(block: MoEBlock, config: CompileConfig) -> dict[str, float]:
    """By linear, the bits per weight that an allocation must count beside the width of a code.

    Codes are stored in whole tiles of 128 channels, which costs a factor `p = padded K / K` on the width `a`. An
    allocation that keeps `a + t − (t − overhead) / p` at or below the target `t` keeps `a·p + overhead` there too.
    """
    experts = block.spec.num_experts
    padding = max(-(-p.in_features // TILE) * TILE / p.in_features for p in block.spec.projections)
    result = {}
    for p in block.spec.projections:
        bits = overhead_bits(experts, p.out_features, p.in_features, config.group_size, *pool_size(p, experts, config))
        if config.target_bits is not None:
            bits = config.target_bits - (config.target_bits - bits) / padding
        result[p.name] = bits
    return result


def layer_evidence(block: MoEBlock, statistics: Mapping[str, BlockStatistics], config: CompileConfig) -> LayerEvidence:
    """What an allocation strategy sees of one block."""
    column_norm = {}
    for p in block.spec.projections:
        weight = expert_weight(block.experts, block.spec, p.name)
        column_norm[p.name] = torch.linalg.vector_norm(weight, dim=1, dtype=torch.float32).double()
    return LayerEvidence(
        path=block.path,
        statistics=statistics,
        column_norm=column_norm,
        shapes={p.name: (p.out_features, p.in_features) for p in block.spec.projections},
        overhead_bits=layer_overhead(block, config),
    )


def measure_errors(
    block: MoEBlock, hessians: Hessians, count: Tensor, config: CompileConfig
) -> tuple[dict[str, dict[int, Tensor]], dict[str, Tensor]]:
    """What each width costs each expert: the squared error of its output when it is really quantized so.

    The Hessians are sums over all datasets, and the error is linear in them, so one row stands for the sum over
    datasets.

    Returns:
        By linear and width `(1, E)` the error, and by linear `(1, E)` the squared size of the output itself.
    """
    errors: dict[str, dict[int, Tensor]] = {}
    signal = {}
    for p in block.spec.projections:
        weight = expert_weight(block.experts, block.spec, p.name)
        hessian = hessians[p.name]
        blended = blend_hessians(hessian, count).hessian
        experts = weight.shape[0]
        errors[p.name] = {}
        for width in config.widths or WIDTHS:
            bits = [width] * experts
            quantized = quantize_experts(config.quantizer, weight, blended, bits, config.group_size, draft=True)
            errors[p.name][width] = output_error(weight, quantized, hessian).double()[None]
        zero = torch.zeros(1, 1, 1, device=weight.device).expand_as(weight)
        signal[p.name] = output_error(weight, zero, hessian).double()[None]
    return errors, signal


def quantize_shared(block: MoEBlock, config: CompileConfig) -> dict[str, PackedExpertLinear]:
    """The linears of shared experts, rounded to nearest at `shared_bits`, as one expert each."""
    packed = {}
    for path in block.shared_linears:
        linear = block.graph.get_submodule(path)
        assert isinstance(linear, nn.Linear)
        weight = linear.weight.detach()[None]
        quantized = quantize_experts("rtn", weight, None, [config.shared_bits], config.group_size)
        packed[path] = PackedExpertLinear.from_quantized(quantized)
    return packed


@dataclass(frozen=True, eq=False)
class CompiledLinear:
    """One quantized linear of all experts of a block.

    Attributes:
        packed: its packed form, the pool filled.
        master: its original weights.
        blended: the experts that saw too few tokens and took part of the layer's pooled Hessian, `None` where no
            Hessians were used.
    """

    packed: PackedExpertLinear
    master: LinearMaster
    blended: tuple[int, ...] | None


@torch.no_grad()
def compile_linear(
    model: nn.Module,
    block: MoEBlock,
    projection: Projection,
    plan: LayerPlan,
    hessian: Tensor | None,
    statistics: Sequence[BlockStatistics],
    config: CompileConfig,
    target: Tensor | None = None,
) -> CompiledLinear:
    """Quantizes and packs one linear of all experts of a block, which is left as it is.

    Args:
        model: the model.
        block: the captured block.
        projection: which linear.
        plan: the widths of its experts.
        hessian: `(E, K, K)`, needed by the quantizer `"gptq"`.
        statistics: what the block saw, one per dataset.
        config: the choices.
        target: `(E, N, K)`, the weights to come near to; the original ones if `None`.

    Raises:
        ValueError: `config.master` is `"checkpoint"` and no file has the linear's weights.
    """
    total = _total(statistics)
    weight = expert_weight(block.experts, block.spec, projection.name)
    blended = None
    if hessian is not None:
        blend = blend_hessians(hessian, total.count)
        hessian, blended = blend.hessian, blend.blended
    wanted = weight if target is None else target
    quantized: QuantizedWeight = quantize_experts(
        config.quantizer, wanted, hessian, plan.bits[projection.name], config.group_size
    )
    linear = PackedExpertLinear.from_quantized(quantized, *pool_size(projection, block.spec.num_experts, config))
    error = channel_error(weight, linear)
    energy = total.linears[projection.name].sq_sum
    planned = plan.channels[projection.name] if plan.channels is not None else None
    if planned is None:
        first = worst_channels(error, energy, linear.pool.capacity)
    else:
        first = assigned_channels(energy, planned, linear.pool.capacity)
    if config.master == "cache":
        master: LinearMaster = CacheMaster.of(weight, error, first, config.cache_fraction)
    else:
        master = _whole_master(weight, error, block, projection, _checkpoint(model, config), config)
    source = master if target is None else MemoryMaster.of(target, channel_error(target, linear))
    if planned is None and config.pool == "lowrank" and hessian is not None:
        contents = lowrank(source, linear, HessianMoments(hessian, total.count.cpu()))
    else:
        contents = hold(source, linear, first)
    linear.pool.copy_(contents)
    return CompiledLinear(linear, master, blended)


@torch.no_grad()
def compile_layer(
    model: nn.Module,
    block: MoEBlock,
    plan: LayerPlan,
    first: CompiledLinear,
    hidden: HiddenMoments | None,
    statistics: Sequence[BlockStatistics],
    config: CompileConfig,
) -> CompiledLayer:
    """Quantizes, packs and lowers one block of `model`, in place; its original experts are free afterwards.

    Args:
        model: the model.
        block: the captured block.
        plan: the widths of its experts.
        first: its first linear, from `compile_linear`.
        hidden: what the second linear is given behind the first, needed by the quantizer `"gptq"`.
        statistics: what the block saw, one per dataset.
        config: the choices.

    Raises:
        ValueError: `config.master` is `"checkpoint"` and no file has the block's weights. The block is unchanged.
    """
    total = _total(statistics)
    one, other = block.spec.projections
    target = None
    if hidden is not None:
        target = make_up(expert_weight(block.experts, block.spec, other.name), hidden, total.count)
    second = compile_linear(
        model, block, other, plan, hidden.hessian if hidden is not None else None, statistics, config, target
    )
    linears = {one.name: first, other.name: second}
    packed = {name: linear.packed for name, linear in linears.items()}
    lower_block(model, block, packed, quantize_shared(block, config))
    overhead = {name: linear.effective_bits - linear.code_bits for name, linear in packed.items()}
    masters = {name: linear.master for name, linear in linears.items()}
    return CompiledLayer(
        runtime=RuntimeLayer(block, masters, total.count.cpu(), overhead, total.top_k),
        blended={name: linear.blended for name, linear in linears.items() if linear.blended is not None},
    )


def _total(statistics: Sequence[BlockStatistics]) -> BlockStatistics:
    return reduce(add, statistics)


def _checkpoint(model: nn.Module, config: CompileConfig) -> Checkpoint | None:
    """The files that the model came from, where the master may use them."""
    if config.master not in ("auto", "checkpoint"):
        return None
    try:
        return Checkpoint.of(model)
    except ValueError as error:
        _without_files(error, config)
        return None


def _whole_master(
    weight: Tensor,
    error: Tensor,
    block: MoEBlock,
    projection: Projection,
    checkpoint: Checkpoint | None,
    config: CompileConfig,
) -> LinearMaster:
    """A master that has every weight: in the files where they are found there, else in memory."""
    if checkpoint is not None:
        try:
            return CheckpointMaster.of(weight, error, checkpoint.find(block.spec.path, projection.name, weight))
        except ValueError as reason:
            _without_files(reason, config)
    return MemoryMaster.of(weight, error)


def _without_files(error: ValueError, config: CompileConfig) -> None:
    """Raises `error` if the files were asked for; otherwise says why they are not used."""
    if config.master == "checkpoint":
        raise error
    logger.info("original weights are kept in host memory: %s", error)
