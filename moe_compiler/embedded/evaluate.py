"""Measure the embedded model on held-out text: perplexity, next-token accuracy and expert use per domain."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import combinations

import torch
from torch.nn.functional import one_hot
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from moe_compiler.runtime.report import jensen_shannon

EVALUATION_WINDOW = 256  # tokens; the first of each window is context only
_BATCH = 8


@dataclass(frozen=True)
class TextMeasurement:
    """What the model does on one text.

    Attributes:
        perplexity: exponential of the mean cross entropy (nats) per token.
        accuracy: share of the tokens that are the model's first choice, given the true tokens before them.
        tokens: number of predicted tokens.
        characters_per_token: of the tokenizer on this text.
        expert_use: (layers, E), float64, rows sum to 1: share of the routed tokens that each expert got.
    """

    perplexity: float
    accuracy: float
    tokens: int
    characters_per_token: float
    expert_use: torch.Tensor


def measure_text(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    text: str,
    window_tokens: int = EVALUATION_WINDOW,
) -> TextMeasurement:
    """Measure perplexity and expert use of a text in windows that do not overlap.

    Args:
        model: an OLMoE model in evaluation mode.
        tokenizer: of the model.
        text: long enough for one window.
        window_tokens: length of a window, in tokens.

    Returns:
        The measurement; the tokens after the last full window are left out.

    Raises:
        ValueError: the text has fewer than `window_tokens` tokens.
    """
    tokens = tokenizer(text, add_special_tokens=False, return_tensors="pt", verbose=False)["input_ids"][0]
    count = len(tokens) // window_tokens
    if count == 0:
        raise ValueError(f"`text` must have at least {window_tokens} tokens (`window_tokens`); got {len(tokens)}.")
    windows = tokens[: count * window_tokens].view(count, window_tokens)
    loss, right = 0.0, 0
    use = torch.zeros(model.config.num_hidden_layers, model.config.num_experts, dtype=torch.float64)
    with torch.inference_mode():
        for batch in windows.split(_BATCH):
            output = model(input_ids=batch, use_cache=False, output_router_logits=True)
            scores, targets = output.logits[:, :-1].flatten(0, 1).float(), batch[:, 1:].flatten()
            loss += float(torch.nn.functional.cross_entropy(scores, targets, reduction="sum"))
            right += int((scores.argmax(dim=-1) == targets).sum())
            for layer, logits in enumerate(output.router_logits):
                chosen = logits.topk(model.config.num_experts_per_tok, dim=-1).indices
                use[layer] += one_hot(chosen, model.config.num_experts).sum(dim=(0, 1)).double()
    predicted = count * (window_tokens - 1)
    return TextMeasurement(
        perplexity=math.exp(loss / predicted),
        accuracy=right / predicted,
        tokens=predicted,
        characters_per_token=len(text) / len(tokens),
        expert_use=use / use.sum(dim=1, keepdim=True),
    )


def divergence_by_pair(expert_use: Mapping[str, torch.Tensor]) -> dict[tuple[str, str], float]:
    """Jensen-Shannon divergence (bits) of the expert use of each two domains, mean over the layers.

    Args:
        expert_use: of each domain, (layers, E).

    Returns:
        One value for each two domains, in the order of `expert_use`.
    """
    pairs = combinations(expert_use, 2)
    return {(a, b): float(jensen_shannon(expert_use[a], expert_use[b]).mean()) for a, b in pairs}


def sample_text(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompt: str,
    new_tokens: int = 120,
    temperature: float = 0.7,
    seed: int = 0,
) -> str:
    """Continue a prompt by sampling.

    Args:
        model: in evaluation mode.
        tokenizer: of the model.
        prompt: at least one token.
        new_tokens: at most so many tokens are added, and at least half as many.
        temperature: of the sampling, above 0.
        seed: of the sampling; the random state of torch is put back afterwards.

    Returns:
        The continuation without the prompt and without special tokens.
    """
    encoded = tokenizer(prompt, add_special_tokens=False, return_tensors="pt", return_token_type_ids=False)
    with torch.random.fork_rng(devices=[]), torch.inference_mode():
        torch.manual_seed(seed)
        tokens = model.generate(
            **encoded,
            max_new_tokens=new_tokens,
            min_new_tokens=new_tokens // 2,
            do_sample=True,
            temperature=temperature,
            top_k=0,
        )
    return str(tokenizer.decode(tokens[0, encoded["input_ids"].shape[1] :], skip_special_tokens=True))
