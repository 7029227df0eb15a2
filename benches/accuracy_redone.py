"""The yardstick of adapting: the widths of a compiled model, its experts quantized anew for other data."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from moe_compiler.config import CompileConfig
from moe_compiler.hessians import HessianWindows
from moe_compiler.kernels.experts import PackedExpertLinear
from moe_compiler.passes.base import NoProgress, Progress
from moe_compiler.passes.calibrate import observe_datasets
from moe_compiler.passes.capture import capture_moe_blocks, expert_weight
from moe_compiler.passes.hidden import hidden_moments, make_up
from moe_compiler.passes.plan import PrecisionPlan
from moe_compiler.passes.quantize import blend_hessians, quantize_experts


@torch.no_grad()
def quantize_at_widths(
    model: nn.Module,
    datasets: Mapping[str, Sequence[Tensor]],
    plan: PrecisionPlan,
    config: CompileConfig,
    progress: Progress | None = None,
) -> Any:
    """A copy of `model` whose expert weights are quantized by GPTQ at the widths of `plan`, and dequantized.

    Nothing but the data of the Hessians differs from what `dynamo_compile` does with that plan and no pool.

    Args:
        model: the original, with stacked experts; it is not changed.
        datasets: windows of token ids by name.
        plan: the widths of every expert.
        config: `group_size` and the calibration options are used.
        progress: shows how far the run is.
    """
    progress = progress or NoProgress()
    copied = copy.deepcopy(model).eval()
    example = next(iter(datasets.values()))[0][None, :8].to(next(copied.parameters()).device)
    blocks = capture_moe_blocks(copied, example)
    statistics = observe_datasets(copied, blocks, datasets, tokens_per_batch=config.tokens_per_batch, progress=progress)
    hessians = HessianWindows(copied, blocks, datasets, config, progress)
    count = {path: torch.stack([one.count for one in found.values()]).sum(0) for path, found in statistics.items()}
    for window in hessians.windows():
        found, first = hessians.collect(window), {}
        for path, block in window.items():
            name = block.spec.projections[0].name
            weight, bits = expert_weight(block.experts, block.spec, name), plan.layers[path].bits[name]
            first[path] = _quantize(weight, found[path][name], count[path], bits, config.group_size)
        hidden = hidden_moments(copied, window, first, datasets, tokens_per_batch=config.tokens_per_batch)
        for path, block in window.items():
            one, other = (expert_weight(block.experts, block.spec, p.name) for p in block.spec.projections)
            one.copy_(first[path].dequantize())
            target = make_up(other, hidden[path], count[path])
            bits = plan.layers[path].bits[block.spec.projections[1].name]
            second = _quantize(target, hidden[path].hessian, count[path], bits, config.group_size)
            other.copy_(second.dequantize())
    return copied


def _quantize(
    weight: Tensor, hessian: Tensor, count: Tensor, bits: Sequence[int], group_size: int
) -> PackedExpertLinear:
    blended = blend_hessians(hessian, count).hessian
    return PackedExpertLinear.from_quantized(quantize_experts("gptq", weight, blended, bits, group_size))
