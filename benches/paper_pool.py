"""DynaMo's figure 7: the size of the channel cache and the time to find the channels, at the sizes of real models."""

from __future__ import annotations

import gc
import time
from dataclasses import dataclass

import paper_published as published
import torch
from harness import markdown_table
from paper_results import Finding, PaperRow
from paper_study import CHANNELS, Study
from torch import Tensor
from workloads import SHAPES, LayerShape, random_tensor

from moe_compiler.kernels.pool import ChannelPool
from moe_compiler.passes.significance import channel_significance
from moe_compiler.passes.statistics import LinearStatistics
from moe_compiler.runtime.master import column_norm, original_columns

HEADER_BYTES = 8  # of a cached channel: expert and channel, 4 bytes each
MODELS = {"OLMoE-1B-7B": (16, 6.92e9), "Qwen1.5-MoE-A2.7B": (24, 14.3e9), "DeepSeek-MoE-16B": (27, 16.4e9)}
"""MoE layers and parameters of each, as their authors give them. DeepSeek-MoE's first layer of 28 is dense."""
QUICK = {"tiny": (2, 1e6)}


@dataclass(frozen=True)
class LayerCost:
    """One layer.

    Attributes:
        cache_bytes: of the paper's cache: columns in the model's precision, and headers.
        pool_bytes: of the buffers on the device that corrections of as many channels take here.
        find_s: computing the significance of all channels from sums and weights, and taking the highest.
        copy_s: copying these channels' columns out of the weights.
    """

    cache_bytes: int
    pool_bytes: int
    find_s: float
    copy_s: float


def d_figure7(study: Study) -> Finding:
    """DynaMo, figure 7. It needs no model: weights are random."""
    models = QUICK if study.options.quick else MODELS
    lines, rows = [], []
    for name, (layers, parameters) in models.items():
        cost = measure(SHAPES[name], next(study.model.parameters()).device)
        values = {
            "cache": (layers * cost.cache_bytes / 1e6, "MB"),
            "cache, of all weights": (layers * cost.cache_bytes / (2 * parameters), ""),
            "pool": (layers * cost.pool_bytes / 1e6, "MB"),
            "finding": (layers * cost.find_s, "s"),
            "copying": (layers * cost.copy_s, "s"),
        }
        lines.append(
            [
                name,
                str(layers),
                f"{values['cache'][0]:.1f}",
                f"{values['cache, of all weights'][0]:.2%}",
                f"{values['pool'][0]:.1f}",
                f"{values['finding'][0]:.2f}",
                f"{values['copying'][0]:.2f}",
            ]
        )
        rows += [
            PaperRow("d-figure7", "measured", name, "DynaMo", quantity, f"{layers} layers", value, unit)
            for quantity, (value, unit) in values.items()
        ]
    lines.append(["paper: 7B", "–", str(published.CACHE_MB), f"{published.CACHE_SHARE:.2%}", "–", "–", "–"])
    rows += [
        PaperRow("d-figure7", "published", "7B", "DynaMo", "cache", "", published.CACHE_MB, "MB"),
        PaperRow("d-figure7", "published", "7B", "DynaMo", "cache, of all weights", "", published.CACHE_SHARE),
    ]
    return Finding(
        "d-figure7",
        f"channel cache ({published.DYNAMO}, figure 7 and V-A)",
        f"One layer with random weights in bfloat16 is measured per model, on {next(study.model.parameters()).device}, "
        f"{torch.get_num_threads()} threads, and multiplied by the layers. {CHANNELS:.0%} of the input channels of "
        "each expert linear.",
        (
            markdown_table(
                ("", "MoE layers", "cache, MB", "of all weights", "pool here, MB", "finding, s", "copying, s"), lines
            ),
        ),
        (
            "the cache holds columns of 16 bits and a header of 8 bytes for each; a channel is an input channel of one "
            "linear of one expert, gate and up being one linear.",
            "the pool is what lies on the device here: the same number of channels as INT8 with a scale. The originals "
            "that the cache holds stay on the host.",
            "finding is the significance of all channels from the observed sums and the weights, and the highest of "
            "them; running the data is not part of it. The paper draws its search time and does not print it.",
        ),
        rows,
    )


@torch.no_grad()
def measure(shape: LayerShape, device: torch.device) -> LayerCost:
    """One layer's cost; both linears one after the other, the best of three times each."""
    cache = pool = 0
    find = copying = 0.0
    for out_features, in_features in (
        (2 * shape.intermediate_size, shape.hidden_size),
        (shape.hidden_size, shape.intermediate_size),
    ):
        experts = shape.num_experts
        weight = random_tensor((experts, out_features, in_features), torch.bfloat16, device)
        sums = torch.rand(experts, in_features)
        slots = round(CHANNELS * experts * in_features)
        seconds = [_once(weight, LinearStatistics(abs_sum=sums, sq_sum=sums), slots) for _ in range(3)]
        find += min(one for one, _ in seconds)
        copying += min(one for _, one in seconds)
        cache += slots * (2 * out_features + HEADER_BYTES)
        pool += ChannelPool.empty(experts, slots, out_features, in_features).size_bytes
        del weight
        gc.collect()
    return LayerCost(cache, pool, find, copying)


def _once(weight: Tensor, sums: LinearStatistics, slots: int) -> tuple[float, float]:
    start = time.perf_counter()
    significance = channel_significance(sums, column_norm(weight))
    places = torch.topk(significance.view(-1), slots).indices
    found = time.perf_counter()
    original_columns(weight, places).cpu()
    return found - start, time.perf_counter() - found
