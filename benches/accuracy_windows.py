"""What every accuracy figure is measured on: windows of held-out text, and a model's loss on each of them.

Needs PyTorch alone, so that it runs in the virtual environments of other quantizers, where their models live.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def load_windows(tokenizer: Any, text: str, window: int, max_tokens: int) -> list[Tensor]:
    """Windows of a text that do not overlap, evenly spread over it, so that few of them stand for all of the text.

    Args:
        tokenizer: a Hugging Face tokenizer; no special tokens are added.
        text: one text.
        window: tokens of each window, at least 2.
        max_tokens: at most so many tokens in all.

    Returns:
        1-D int64 tensors of `window` token ids.

    Raises:
        ValueError: `window` is below 2, or the text has too few tokens for one window.
    """
    if window < 2:
        raise ValueError(f"`window` must be at least 2 tokens, but is {window}")
    ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    whole = len(ids) // window
    count = min(whole, max_tokens // window)
    if not count:
        raise ValueError(
            f"`text` must have at least one window of {window} tokens, but has {len(ids)} tokens, "
            f"of which {max_tokens} may be used"
        )
    windows = torch.tensor(ids[: whole * window], dtype=torch.int64).split(window)
    return [windows[i * whole // count] for i in range(count)]


@torch.no_grad()
def window_losses(model: nn.Module, windows: Sequence[Tensor], *, tokens_per_batch: int = 4096) -> Tensor:
    """Negative log-likelihood of each window: the sum over its tokens but the first, each given those before it.

    Perplexity is `exp(losses.sum() / (number of windows · (window - 1)))`.

    Args:
        model: a causal language model of transformers.
        windows: from `load_windows`, all of one length.
        tokens_per_batch: upper bound of the tokens in one forward pass, but at least one window runs.

    Returns:
        `(len(windows),)` float64 on the host, in nats.

    Raises:
        FloatingPointError: the loss of a window is not finite.
    """
    device = next(model.parameters()).device
    found = []
    for ids in _batches(windows, tokens_per_batch):
        ids = ids.to(device)
        logits = model(input_ids=ids, use_cache=False).logits[:, :-1].float()
        loss = F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
        found.append(loss.view(ids.shape[0], -1).double().sum(dim=1).cpu())
    losses = torch.cat(found)
    if not bool(torch.isfinite(losses).all()):
        raise FloatingPointError(f"the model's loss is not finite in {int((~losses.isfinite()).sum())} windows")
    return losses


def _batches(windows: Sequence[Tensor], tokens_per_batch: int) -> Iterator[Tensor]:
    size = max(1, tokens_per_batch // windows[0].numel())
    for start in range(0, len(windows), size):
        yield torch.stack(list(windows[start : start + size]))
