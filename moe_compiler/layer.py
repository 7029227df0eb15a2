"""One MoE block at a time: measure what a width costs, quantize, pack, keep a master, lower."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from moe_compiler.config import CompileConfig
from moe_compiler.hessians import Hessians
from moe_compiler.kernels.affine import WIDTHS, QuantizedWeight
from moe_compiler.kernels.experts import PackedExpertLinear, overhead_bits
from moe_compiler.kernels.planes import TILE
from moe_compiler.passes.capture import MoEBlock, Projection, expert_weight
from moe_compiler.passes.lower import lower_block
from moe_compiler.passes.plan import LayerPlan
from moe_compiler.passes.quantize import blend_hessians, output_error, quantize_experts
from moe_compiler.passes.statistics import BlockStatistics, LayerEvidence
from moe_compiler.runtime.channels import (
    LinearMaster,
    assigned_channels,
    build_master,
    channel_error,
    hold,
    worst_channels,
)
from moe_compiler.runtime.adaptation import RuntimeLayer


@dataclass(frozen=True)
class CompiledLayer:
    """What compiling one MoE block gave.

    Attributes:
        runtime: what the runtime needs of the block.
        blended: by linear, the experts that saw too few tokens and took part of the layer's pooled Hessian.
    """

    runtime: RuntimeLayer
    blended: Mapping[str, tuple[int, ...]]


def pool_capacity(projection: Projection, num_experts: int, fraction: float) -> int:
    """Slots of the channel pool of one linear."""
    return round(fraction * num_experts * projection.in_features)


def layer_overhead(block: MoEBlock, config: CompileConfig) -> dict[str, float]:
    """By linear, the bits per weight that an allocation must count beside the width of a code.

    Codes are stored in whole tiles of 128 channels, which costs a factor `p = padded K / K` on the width `a`. An
    allocation that keeps `a + t − (t − overhead) / p` at or below the target `t` keeps `a·p + overhead` there too.
    """
    experts = block.spec.num_experts
    padding = max(-(-p.in_features // TILE) * TILE / p.in_features for p in block.spec.projections)
    result = {}
    for p in block.spec.projections:
        capacity = pool_capacity(p, experts, config.pool_fraction)
        bits = overhead_bits(experts, p.out_features, p.in_features, config.group_size, capacity)
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
            quantized = quantize_experts(config.quantizer, weight, blended, [width] * experts, config.group_size)
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


@torch.no_grad()
def compile_layer(
    model: nn.Module,
    block: MoEBlock,
    plan: LayerPlan,
    hessians: Hessians | None,
    statistics: Sequence[BlockStatistics],
    config: CompileConfig,
) -> CompiledLayer:
    """Quantizes, packs and lowers one block of `model`, in place; its original experts are free afterwards.

    Args:
        model: the model.
        block: the captured block.
        plan: the widths of its experts.
        hessians: needed by the quantizer `"gptq"`.
        statistics: what the block saw, one per dataset.
        config: the choices.
    """
    total = statistics[0]
    for one in statistics[1:]:
        total = total + one
    packed: dict[str, PackedExpertLinear] = {}
    masters: dict[str, LinearMaster] = {}
    blended: dict[str, tuple[int, ...]] = {}
    for p in block.spec.projections:
        weight = expert_weight(block.experts, block.spec, p.name)
        hessian = None
        if hessians is not None:
            blend = blend_hessians(hessians[p.name], total.count)
            hessian, blended[p.name] = blend.hessian, blend.blended
        quantized: QuantizedWeight = quantize_experts(
            config.quantizer, weight, hessian, plan.bits[p.name], config.group_size
        )
        capacity = pool_capacity(p, block.spec.num_experts, config.pool_fraction)
        linear = PackedExpertLinear.from_quantized(quantized, capacity)
        energy = total.linears[p.name].sq_sum
        fraction = 1.0 if config.master == "memory" else config.cache_fraction
        error = channel_error(weight, linear)
        if plan.channels is None:
            first = worst_channels(error, energy, capacity)
        else:
            first = assigned_channels(energy, plan.channels[p.name], capacity)
        master = build_master(weight, error, first, fraction)
        linear.pool.copy_(hold(master, linear, first))
        packed[p.name], masters[p.name] = linear, master
    lower_block(model, block, packed, quantize_shared(block, config))
    overhead = {name: linear.effective_bits - linear.code_bits for name, linear in packed.items()}
    return CompiledLayer(
        runtime=RuntimeLayer(block, masters, total.count.cpu(), overhead),
        blended=blended,
    )
