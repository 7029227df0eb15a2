"""The yardstick of adapting: the widths of a compiled model, its experts quantized anew for other data."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from moe_compiler.config import CompileConfig
from moe_compiler.hessians import HessianWindows
from moe_compiler.passes.base import NoProgress, Progress
from moe_compiler.passes.calibrate import observe_datasets
from moe_compiler.passes.capture import capture_moe_blocks, expert_weight
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
    for window in hessians.windows():
        found = hessians.collect(window)
        for path, block in window.items():
            count = torch.stack([one.count for one in statistics[path].values()]).sum(0)
            for projection in block.spec.projections:
                weight = expert_weight(block.experts, block.spec, projection.name)
                hessian = blend_hessians(found[path][projection.name], count).hessian
                widths = plan.layers[path].bits[projection.name]
                quantized = quantize_experts("gptq", weight, hessian, widths, config.group_size)
                weight.copy_(quantized.dequantize())
    return copied
