"""Tiny random models and data for tests of the whole pipeline."""

from typing import Any

import torch
from torch import Tensor
from transformers import OlmoeConfig, OlmoeForCausalLM, Qwen2MoeConfig, Qwen2MoeForCausalLM

VOCABULARY = 96


def olmoe(**changes: Any) -> OlmoeForCausalLM:
    """OLMoE with 2 layers of 8 experts, 2 of them per token, without a shared expert."""
    options = {
        "vocab_size": VOCABULARY,
        "hidden_size": 128,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_experts": 8,
        "num_experts_per_tok": 2,
        "max_position_embeddings": 128,
        "pad_token_id": 0,
        "bos_token_id": None,
        "eos_token_id": None,
    }
    torch.manual_seed(0)
    return _random(OlmoeForCausalLM(OlmoeConfig(**(options | changes))))


def qwen2_moe(layers: int = 2, **changes: Any) -> Qwen2MoeForCausalLM:
    """Qwen1.5-MoE's form: a shared expert behind a scalar gate beside 6 routed experts."""
    options: dict[str, Any] = {
        "vocab_size": VOCABULARY,
        "hidden_size": 128,
        "intermediate_size": 64,
        "moe_intermediate_size": 128,
        "shared_expert_intermediate_size": 128,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "num_experts": 6,
        "num_experts_per_tok": 2,
        "max_position_embeddings": 128,
    }
    torch.manual_seed(0)
    return _random(Qwen2MoeForCausalLM(Qwen2MoeConfig(**(options | changes))))


def _random(model: Any) -> Any:
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, 0.1)
    return model.eval()


def tokens(batch: int, length: int, seed: int = 0, low: int = 1, high: int = VOCABULARY) -> Tensor:
    """Random token ids `(batch, length)`."""
    return torch.randint(low, high, (batch, length), generator=torch.Generator().manual_seed(seed))


def datasets() -> dict[str, Tensor]:
    """Two datasets over different halves of the vocabulary."""
    return {"low": tokens(8, 32, 1, high=48), "high": tokens(8, 32, 2, low=48)}
