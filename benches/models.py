"""Whole models of random weights: OLMoE-1B-7B's sizes in bfloat16, and the same lowered onto random packed experts."""

from __future__ import annotations

import copy
import gc

import torch
from torch import nn
from transformers import AutoModelForCausalLM, OlmoeConfig, PreTrainedModel
from transformers.initialization import no_init_weights
from workloads import random_packed, random_tensor, widths

from moe_compiler.passes.capture import capture_moe_blocks
from moe_compiler.passes.lower import lower_block

FULL_LAYERS = 16
FULL_VOCABULARY = 50304


def model_config(layers: int, quick: bool) -> OlmoeConfig:
    """OLMoE-1B-7B's configuration with fewer layers, or a tiny one. No token ends the text."""
    sizes = {
        "hidden_size": 128 if quick else 2048,
        "intermediate_size": 128 if quick else 1024,
        "num_attention_heads": 4 if quick else 16,
        "num_key_value_heads": 4 if quick else 16,
        "num_experts": 4 if quick else 64,
        "num_experts_per_tok": 2 if quick else 8,
        "vocab_size": 128 if quick else -(-FULL_VOCABULARY * layers // FULL_LAYERS),
    }
    return OlmoeConfig(**sizes, num_hidden_layers=layers, pad_token_id=0, bos_token_id=None, eos_token_id=None)


def build_original(config: OlmoeConfig, device: torch.device) -> PreTrainedModel:
    """The model in bfloat16 with random weights, made quickly."""
    with no_init_weights(), torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()
    for parameter in model.parameters():
        if parameter.dim() > 1:
            parameter.data = random_tensor(parameter.shape, torch.bfloat16, device, parameter.shape[-1] ** -0.5)
        else:
            parameter.data.fill_(1.0)
    return model.requires_grad_(False)


def build_packed(model: PreTrainedModel, bits: int, pool: float) -> PreTrainedModel:
    """The same model over the same tensors, but with random packed experts put in by the real lowering."""
    packed_model = copy.deepcopy(model, {id(parameter): parameter for parameter in model.parameters()})
    for block in capture_moe_blocks(packed_model).values():
        linears = {
            p.name: random_packed(
                widths(bits, block.spec.num_experts), p.out_features, p.in_features, model.device, pool_fraction=pool
            )
            for p in block.spec.projections
        }
        lower_block(packed_model, block, linears, {})
    gc.collect()
    return packed_model


def expert_bytes(model: nn.Module) -> int:
    """Bytes of all experts: their parameters and buffers."""
    found = [*model.named_parameters(), *model.named_buffers()]
    return sum(t.numel() * t.element_size() for name, t in found if ".experts." in name)
