"""Perplexity on held-out windows."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import nn

from moe_compiler.passes.base import NoProgress, Progress
from moe_compiler.passes.calibrate import Dataset, batches


@torch.no_grad()
def perplexity(
    model: nn.Module,
    dataset: Dataset,
    *,
    tokens_per_batch: int = 4096,
    name: str = "data",
    progress: Progress | None = None,
) -> float:
    """`exp` of the mean negative log-likelihood of a token given those before it in its window.

    Windows do not overlap and the first token of each is not scored, as is usual for quantized models.

    Args:
        model: a causal language model.
        dataset: windows of token ids, see `moe_compiler.data.load_samples`.
        tokens_per_batch: upper bound of the tokens in one forward pass.
        name: what to call the data in the progress bar.
        progress: shows how far the run is.

    Raises:
        FloatingPointError: a logit was NaN, so there is no perplexity.
    """
    device = next(model.parameters()).device
    total, tokens = 0.0, 0
    length = sum(sample.numel() for sample in dataset)
    with (progress or NoProgress()).task(f"perplexity on {name}", length, "tokens") as advance:
        for batch in batches(dataset, tokens_per_batch):
            ids = batch.to(device)
            logits = model(input_ids=ids, use_cache=False).logits[:, :-1].float()
            loss = F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="sum")
            total += float(loss)
            tokens += ids[:, 1:].numel()
            advance(ids.numel())
    if math.isnan(total):
        raise FloatingPointError(f"the model's logits on {name!r} hold NaN: it has no perplexity")
    return math.exp(min(total / tokens, 700.0))
