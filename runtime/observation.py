"""Observing new data for a rule: sums alone, or second moments as well, as many layers at a time as memory allows."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import NamedTuple

import torch
from torch import nn

from moe_compiler.passes.base import Progress
from moe_compiler.passes.calibrate import Dataset, ObservedModel
from moe_compiler.passes.finish import finish_from_observers
from moe_compiler.passes.keep_rows import keep_rows
from moe_compiler.passes.moments import SecondMoments
from moe_compiler.passes.statistics import BlockStatistics
from moe_compiler.runtime.adaptation import RuntimeLayer
from moe_compiler.runtime.rules import needs


class ObservedLayer(NamedTuple):
    """What one layer saw of new data.

    Attributes:
        path: its MoE block.
        statistics: the sums.
        moments: by linear, the second moments; `None` where the rule does not need them.
    """

    path: str
    statistics: BlockStatistics
    moments: Mapping[str, SecondMoments] | None


def observe_layers(
    model: nn.Module,
    layers: Mapping[str, RuntimeLayer],
    dataset: Dataset,
    rule: str,
    *,
    name: str = "data",
    tokens_per_batch: int = 4096,
    memory_bytes: int = 4 << 30,
    progress: Progress | None = None,
) -> Iterator[ObservedLayer]:
    """Runs new data through a model (a second model object over the same tensors) and yields what each layer saw.

    For rules that need second moments the experts' input rows are kept in host memory, in the model's own dtype:
    `tokens · (H + k·I)` numbers a layer, where Hessians would be `E·(H² + I²)`; 8,192 tokens take 168 MB a layer of
    OLMoE-7B, its Hessians 1,342 MB. If all layers need more than `memory_bytes`, the data run once per window of as
    many layers as fit (at least one); a window is freed before the next begins.

    Args:
        model: the compiled model.
        layers: its layers.
        dataset: the new data.
        rule: the rule to observe for.
        name: what to call the data in messages.
        tokens_per_batch: upper bound of the tokens in one forward pass.
        memory_bytes: upper bound of the rows that are kept at a time.
        progress: shows how far the run is.

    Raises:
        ValueError: there is no such rule, or `memory_bytes` is not positive.
        FloatingPointError: activations were not finite.
    """
    if memory_bytes < 1:
        raise ValueError(f"`memory_bytes` must be at least 1, but is {memory_bytes}")
    with_moments = needs(rule) == "hessian"
    tokens = sum(sample.numel() for sample in dataset)
    item = torch.empty(0, dtype=next(model.parameters()).dtype).element_size()
    windows: list[dict[str, RuntimeLayer]] = [{}]
    used = 0
    for path, layer in layers.items():
        need = tokens * row_width(layer) * item if with_moments else 0
        if windows[-1] and used + need > memory_bytes:
            windows.append({})
            used = 0
        windows[-1][path] = layer
        used += need
    for window in windows:
        observed = ObservedModel.of(model, {path: layer.block for path, layer in window.items()})
        finish_from_observers(observed)
        recorders = keep_rows(observed) if with_moments else {}
        seen = observed.observe(dataset, name=name, tokens_per_batch=tokens_per_batch, progress=progress)
        for path in window:
            moments = {linear: kept.moments() for linear, kept in recorders.pop(path).items()} if with_moments else None
            yield ObservedLayer(path, seen[path], moments)


def row_width(layer: RuntimeLayer) -> int:
    """Numbers that are kept of one token in one layer: the inputs of both linears."""
    first, second = layer.block.spec.projections
    return first.in_features + layer.top_k * second.in_features
