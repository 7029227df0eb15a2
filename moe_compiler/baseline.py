"""Baselines that the packed format cannot hold: a model whose expert weights are quantized and dequantized again."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import nn

from moe_compiler.checks import check_blocks, check_finite, check_model, vocabulary_size
from moe_compiler.config import CompileConfig
from moe_compiler.data import load_calibration
from moe_compiler.hessians import HessianWindows
from moe_compiler.passes.base import NoProgress, Progress
from moe_compiler.passes.calibrate import observe_datasets
from moe_compiler.passes.capture import capture_moe_blocks, expert_weight
from moe_compiler.passes.quantize import blend_hessians, quantize_experts

Model = TypeVar("Model", bound=nn.Module)


@dataclass(frozen=True)
class UniformBaseline:
    """A model with dequantized expert weights, and what a proper packing of it would take.

    Attributes:
        model: a copy of the model; it runs at full size and speed and is for measuring accuracy only.
        code_bits: the width of every code.
        effective_bits: bits per expert weight with a packing of `code_bits` per code, float16 scales and byte zero
            points.
        size_bytes: bytes of the experts so packed.
    """

    model: Any
    code_bits: int
    effective_bits: float
    size_bytes: int


@torch.no_grad()
def uniform_baseline(
    model: nn.Module,
    calibration: Mapping[str, Any],
    bits: int,
    config: CompileConfig | None = None,
    *,
    tokenizer: Any = None,
    progress: Progress | None = None,
) -> UniformBaseline:
    """Quantizes every expert weight at one width, 3 bits included, into a copy of the model with dequantized weights.

    The quantizer, its Hessians and its groups are those of `dynamo_compile` with the same configuration; second linears
    are not fitted to what quantized first ones give them, as in plain GPTQ.

    Args:
        model: the model; it is not changed.
        calibration: as for `dynamo_compile`.
        bits: the width, 2 to 8.
        config: `quantizer`, `group_size` and the calibration options are used.
        tokenizer: needed where samples are text.
        progress: shows how far the run is.

    Raises:
        ValueError: as for `dynamo_compile`; also if the experts are an `nn.ModuleList`, which has no single weight to
            write back to.
    """
    config = config or CompileConfig()
    progress = progress or NoProgress()
    check_model(model)
    check_finite(model)
    datasets = load_calibration(
        calibration,
        tokenizer=tokenizer,
        sequence_length=config.sequence_length,
        vocab_size=vocabulary_size(model),
    )
    copied = copy.deepcopy(model).eval()
    blocks = capture_moe_blocks(copied, next(iter(datasets.values()))[0][None, :8].to(next(copied.parameters()).device))
    check_blocks(copied, blocks)
    for path, block in blocks.items():
        if block.spec.kind == "list":
            raise ValueError(f"`model` must keep its experts as stacked tensors, but `{path}` has an nn.ModuleList")
    statistics = observe_datasets(copied, blocks, datasets, tokens_per_batch=config.tokens_per_batch, progress=progress)
    hessians = HessianWindows(copied, blocks, datasets, config, progress)
    weights, spent = 0, 0.0
    for window in hessians.windows():
        found = hessians.collect(window)
        with progress.task("quantizing the baseline", len(window)) as advance:
            for path, block in window.items():
                count = torch.stack([one.count for one in statistics[path].values()]).sum(0)
                for projection in block.spec.projections:
                    weight = expert_weight(block.experts, block.spec, projection.name)
                    quantized = quantize_experts(
                        config.quantizer,
                        weight,
                        blend_hessians(found[path][projection.name], count).hessian,
                        [bits] * block.spec.num_experts,
                        config.group_size,
                    )
                    weight.copy_(quantized.dequantize())
                    weights += weight.numel()
                    spent += weight.numel() * bits + quantized.scale.numel() * (16 + 8)
                advance()
    return UniformBaseline(copied, bits, spent / weights, round(spent / 8))
