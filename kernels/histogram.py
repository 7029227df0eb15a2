"""The routing histogram of a lowered layer: which experts the last few thousand tokens went to."""

from __future__ import annotations

import torch
from torch import Tensor


def record_routing_(histogram: Tensor, expert_ids: Tensor, decay: float) -> None:
    """Adds a batch to the histogram, in token order; arguments as in `moe_compiler.kernels.ops`.

    The last of `n` tokens counts 1, the one before it `decay`, and so on: `h ← decay^n · h + Σ_t decay^(n-1-t) · 1/k`
    at the `k` experts of each token. It sums to the number of tokens that it stands for, `1 / (1 − decay)` at most.
    """
    num_tokens, top_k = expert_ids.shape
    if not num_tokens:
        return
    histogram.mul_(decay**num_tokens)
    ids = expert_ids.reshape(-1).clamp(max=histogram.shape[0] - 1)
    if num_tokens == 1:
        share = histogram.new_full((top_k,), 1 / top_k)
    else:
        age = torch.arange(num_tokens - 1, -1, -1, dtype=histogram.dtype, device=histogram.device)
        share = (decay**age / top_k).repeat_interleave(top_k)
    histogram.index_add_(0, ids, share)
