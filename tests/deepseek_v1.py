"""A model in the form of DeepSeek-MoE's published code: experts as a list behind a dispatch method.

The shape of the MoE block follows `modeling_deepseek.py` of deepseek-ai/deepseek-moe-16b-base: `gate` returns
`(index, weights, auxiliary loss)`, and in inference `moe_infer` gets the flattened index and weights.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import DynamicCache, GenerationMixin, PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast


class DeepseekV1Config(PretrainedConfig):
    model_type = "deepseek_v1_test"

    def __init__(
        self,
        vocab_size: int = 128,
        hidden_size: int = 64,
        intermediate_size: int = 96,
        moe_intermediate_size: int = 32,
        num_hidden_layers: int = 3,
        num_attention_heads: int = 4,
        n_routed_experts: int = 8,
        n_shared_experts: int = 2,
        num_experts_per_tok: int = 3,
        first_k_dense_replace: int = 1,
        **kwargs: Any,
    ) -> None:
        self.vocab_size = vocab_size
        self.hidden_size = hidden_size
        self.intermediate_size = intermediate_size
        self.moe_intermediate_size = moe_intermediate_size
        self.num_hidden_layers = num_hidden_layers
        self.num_attention_heads = num_attention_heads
        self.n_routed_experts = n_routed_experts
        self.n_shared_experts = n_shared_experts
        self.num_experts_per_tok = num_experts_per_tok
        self.first_k_dense_replace = first_k_dense_replace
        special = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
        super().__init__(**(special | kwargs))


class RMSNorm(nn.Module):
    def __init__(self, size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.weight.shape, self.weight, eps=1e-6)


class DeepseekMLP(nn.Module):
    def __init__(self, hidden_size: int, intermediate_size: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(hidden_size, intermediate_size, bias=False)
        self.up_proj = nn.Linear(hidden_size, intermediate_size, bias=False)
        self.down_proj = nn.Linear(intermediate_size, hidden_size, bias=False)
        self.act_fn = nn.SiLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))


class MoEGate(nn.Module):
    def __init__(self, config: DeepseekV1Config) -> None:
        super().__init__()
        self.top_k = config.num_experts_per_tok
        self.weight = nn.Parameter(torch.empty(config.n_routed_experts, config.hidden_size))

    def forward(self, hidden_states: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        hidden_states = hidden_states.view(-1, hidden_states.shape[-1])
        scores = F.linear(hidden_states, self.weight).softmax(dim=-1)
        weights, index = torch.topk(scores, k=self.top_k, dim=-1, sorted=False)
        aux_loss = scores.mean(0).square().sum() if self.training else None
        return index, weights, aux_loss


class DeepseekMoE(nn.Module):
    def __init__(self, config: DeepseekV1Config) -> None:
        super().__init__()
        self.config = config
        self.num_experts_per_tok = config.num_experts_per_tok
        self.experts = nn.ModuleList(
            DeepseekMLP(config.hidden_size, config.moe_intermediate_size) for _ in range(config.n_routed_experts)
        )
        self.gate = MoEGate(config)
        shared_size = config.moe_intermediate_size * config.n_shared_experts
        self.shared_experts = DeepseekMLP(config.hidden_size, shared_size)

    def forward(self, hidden_states: Tensor) -> Tensor:
        identity = hidden_states
        orig_shape = hidden_states.shape
        topk_idx, topk_weight, aux_loss = self.gate(hidden_states)
        hidden_states = hidden_states.view(-1, hidden_states.shape[-1])
        flat_topk_idx = topk_idx.view(-1)
        if self.training:
            hidden_states = hidden_states.repeat_interleave(self.num_experts_per_tok, dim=0)
            y = torch.empty_like(hidden_states)
            for i, expert in enumerate(self.experts):
                y[flat_topk_idx == i] = expert(hidden_states[flat_topk_idx == i])
            y = (y.view(*topk_weight.shape, -1) * topk_weight.unsqueeze(-1)).sum(dim=1)
            y = y.view(*orig_shape) + 0 * aux_loss
        else:
            y = self.moe_infer(hidden_states, flat_topk_idx, topk_weight.view(-1, 1)).view(*orig_shape)
        return y + self.shared_experts(identity)

    @torch.no_grad()
    def moe_infer(self, x: Tensor, flat_expert_indices: Tensor, flat_expert_weights: Tensor) -> Tensor:
        expert_cache = torch.zeros_like(x)
        idxs = flat_expert_indices.argsort()
        tokens_per_expert = flat_expert_indices.bincount().cpu().numpy().cumsum(0)
        token_idxs = idxs // self.num_experts_per_tok
        for i, end_idx in enumerate(tokens_per_expert):
            start_idx = 0 if i == 0 else tokens_per_expert[i - 1]
            if start_idx == end_idx:
                continue
            exp_token_idx = token_idxs[start_idx:end_idx]
            expert_out = self.experts[i](x[exp_token_idx])
            expert_out.mul_(flat_expert_weights[idxs[start_idx:end_idx]])
            rows = exp_token_idx.view(-1, 1).repeat(1, x.shape[-1])
            expert_cache.scatter_reduce_(0, rows, expert_out, reduce="sum")
        return expert_cache


class DeepseekAttention(nn.Module):
    def __init__(self, config: DeepseekV1Config, layer_idx: int) -> None:
        super().__init__()
        self.layer_idx = layer_idx
        self.heads = config.num_attention_heads
        size = config.hidden_size
        self.q_proj, self.k_proj, self.v_proj, self.o_proj = (nn.Linear(size, size, bias=False) for _ in range(4))

    def forward(self, x: Tensor, mask: Tensor, cache: DynamicCache | None) -> Tensor:
        q, k, v = (
            proj(x).unflatten(-1, (self.heads, -1)).transpose(1, 2) for proj in (self.q_proj, self.k_proj, self.v_proj)
        )
        if cache is not None:
            k, v = cache.update(k, v, self.layer_idx)
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return self.o_proj(out.transpose(1, 2).flatten(-2))


class DeepseekDecoderLayer(nn.Module):
    def __init__(self, config: DeepseekV1Config, layer_idx: int) -> None:
        super().__init__()
        self.self_attn = DeepseekAttention(config, layer_idx)
        dense = layer_idx < config.first_k_dense_replace
        self.mlp = DeepseekMLP(config.hidden_size, config.intermediate_size) if dense else DeepseekMoE(config)
        self.input_layernorm = RMSNorm(config.hidden_size)
        self.post_attention_layernorm = RMSNorm(config.hidden_size)

    def forward(self, x: Tensor, mask: Tensor, cache: DynamicCache | None) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), mask, cache)
        return x + self.mlp(self.post_attention_layernorm(x))


class DeepseekV1ForCausalLM(PreTrainedModel, GenerationMixin):
    config_class = DeepseekV1Config

    def __init__(self, config: DeepseekV1Config) -> None:
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(DeepseekDecoderLayer(config, i) for i in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        past_key_values: DynamicCache | None = None,
        use_cache: bool | None = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache()
        past = past_key_values.get_seq_length() if past_key_values is not None else 0
        positions = torch.arange(past + input_ids.shape[1], device=input_ids.device)
        mask = (positions[past:, None] >= positions)[None, None]
        if attention_mask is not None:
            mask = mask & attention_mask[:, None, None, :].bool()
        x = self.embed_tokens(input_ids)
        for layer in self.layers:
            x = layer(x, mask, past_key_values)
        return CausalLMOutputWithPast(logits=self.lm_head(self.norm(x)), past_key_values=past_key_values)


def build(**config: Any) -> DeepseekV1ForCausalLM:
    """A tiny model: random weights, eval mode, float32, on the CPU, always the same."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = DeepseekV1ForCausalLM(DeepseekV1Config(**config)).eval()
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.dim() > 1:
                    parameter.normal_(0.0, 0.15)
    return model.requires_grad_(False)
