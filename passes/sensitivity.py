"""How much the model's loss feels an error of each layer's experts: one backward pass over a few tokens."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moe_compiler.passes.base import NoProgress, Progress
from moe_compiler.passes.calibrate import Dataset
from moe_compiler.passes.capture import MoEBlock


def layer_sensitivity(
    model: nn.Module,
    blocks: Mapping[str, MoEBlock],
    datasets: Mapping[str, Dataset],
    *,
    tokens: int = 2048,
    progress: Progress | None = None,
) -> dict[str, float]:
    """Return what a relative error of each layer's routed experts costs the model's loss.

    An error `δ_t` of the experts' output `y_t` for token `t` changes the summed loss by about `½·Σ_t (g_t·δ_t)²` on
    average over the labels, with `g_t` the gradient of the loss by `y_t` (the empirical Fisher information, as in
    SqueezeLLM, arXiv 2306.07629). For errors of the relative size `r` in directions that do not matter, that is
    proportional to `r²·Σ_t |g_t|²·|y_t|²`: the mean of the last product is the layer's sensitivity. Our decision: one
    number per layer, by which the strategy `"budget"` weighs the layer's relative errors.

    Args:
        model: a causal language model, not yet quantized. Its parameters' `requires_grad` is off meanwhile.
        blocks: its captured blocks, by path.
        datasets: samples by dataset; every dataset counts the same.
        tokens: how many of each dataset are used, at least one sample. One sample is run at a time, so that memory
            holds one sample's activations.
        progress: shows how far the run is.

    Returns:
        By block path, the sensitivity over the mean of all layers', 1 for each where no loss depends on the experts.

    Raises:
        RuntimeError: the model cannot be differentiated.
    """
    sums = dict.fromkeys(blocks, 0.0)
    chosen = {name: _first(dataset, tokens) for name, dataset in datasets.items()}
    device = next(model.parameters()).device
    progress = progress or NoProgress()
    with progress.task("measuring layers", sum(len(samples) for samples in chosen.values())) as advance:
        for samples in chosen.values():
            count = sum(sample.numel() for sample in samples)
            for sample in samples:
                for path, value in _products(model, blocks, sample.to(device)).items():
                    sums[path] += value / count
                advance()
    mean = sum(sums.values()) / len(sums)
    return {path: value / mean if mean > 0 else 1.0 for path, value in sums.items()}


def _first(dataset: Dataset, tokens: int) -> list[Tensor]:
    """The first samples, at least one, with at most so many tokens."""
    chosen, count = [dataset[0]], dataset[0].numel()
    for sample in dataset[1:]:
        count += sample.numel()
        if count > tokens:
            break
        chosen.append(sample)
    return chosen


def _products(model: nn.Module, blocks: Mapping[str, MoEBlock], sample: Tensor) -> dict[str, float]:
    """`Σ_t |g_t|²·|y_t|²` of one sample, by block path."""
    outputs: dict[str, Tensor] = {}
    with torch.enable_grad(), _frozen(model), _kept(blocks, outputs):
        logits = model(input_ids=sample[None], use_cache=False).logits[0, :-1].float()
        F.cross_entropy(logits, sample[1:], reduction="sum").backward()
    found = {}
    for path, output in outputs.items():
        gradient = output.grad
        if gradient is not None:
            rows = gradient.double().square().sum(-1) * output.detach().double().square().sum(-1)
            found[path] = float(rows.sum())
    return found


@contextmanager
def _kept(blocks: Mapping[str, MoEBlock], outputs: dict[str, Tensor]) -> Iterator[None]:
    """Keeps the outputs of the blocks' experts, and their gradients."""
    handles = []
    try:
        for path, block in blocks.items():

            def hook(_: nn.Module, __: Any, output: Tensor, path: str = path) -> Tensor:
                kept = output if output.requires_grad else output.detach().requires_grad_()
                kept.retain_grad()
                outputs[path] = kept
                return kept

            handles.append(block.experts.register_forward_hook(hook))
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def _frozen(model: nn.Module) -> Iterator[None]:
    """Turns off `requires_grad` of all parameters meanwhile."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    try:
        for parameter in trained:
            parameter.requires_grad_(False)
        yield
    finally:
        for parameter in trained:
            parameter.requires_grad_(True)
