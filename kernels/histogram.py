"""The routing histogram of a lowered layer: which experts the last few thousand tokens went to."""

from __future__ import annotations

from functools import lru_cache

import numpy as np
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
    last = histogram.shape[0] - 1
    if histogram.device.type == "cpu":  # NumPy's calls take a third of the time of PyTorch's
        counts, ids = histogram.numpy(), expert_ids.numpy().reshape(-1)
        counts *= decay**num_tokens
        np.add.at(counts, np.minimum(ids, last), _shares(num_tokens, top_k, decay))
        return
    histogram.mul_(decay**num_tokens)
    age = torch.arange(num_tokens - 1, -1, -1, dtype=histogram.dtype, device=histogram.device)
    share = (decay**age / top_k).repeat_interleave(top_k)
    histogram.index_add_(0, expert_ids.reshape(-1).clamp(max=last), share)


@lru_cache(maxsize=64)
def _shares(num_tokens: int, top_k: int, decay: float) -> np.ndarray[tuple[int], np.dtype[np.float32]]:
    """What each (token, expert) pair of a batch adds, `(T·k,)`."""
    age = np.arange(num_tokens - 1, -1, -1)
    return (decay**age / top_k).astype(np.float32).repeat(top_k)
