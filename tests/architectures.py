"""A tiny random model of every Mixture-of-Experts architecture that the installed transformers has.

The architectures are found by reading transformers' own modeling files, so a newer version brings its new
ones along and an older one simply has fewer. Only the configuration values that a tiny model cannot guess are
written here.
"""

import importlib
import inspect
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel

MODELS = Path(transformers.__file__).parent / "models"
STACKED = re.compile(r"use_experts_implementation|self\.down_proj = nn\.Parameter")
MOE_CLASS = re.compile(r"^class \w+(?:Experts|MoE|Moe|SparseMLP)\(", re.MULTILINE)

# Architectures with experts whose form the compiler does not support, and what its refusal says.
REFUSED = {
    "dbrx": "no stacked",
    "doge": "nn.Embedding",
    "jetmoe": r"forward\(inputs, expert_size\)",
    "llama4": r"forward\(hidden_states\)",
    "longcat_flash": "gate_up_proj holds 10 experts, down_proj 8",
    "nllb_moe": "nn.ModuleDict",
    "switch_transformers": "nn.ModuleDict",
    "vitpose_backbone": "nn.ModuleList",
}

SIZES = {
    "vocab_size": 128,
    "hidden_size": 64,
    "d_model": 64,
    "intermediate_size": 96,
    "moe_intermediate_size": 32,
    "shared_expert_intermediate_size": 32,
    "expert_ffn_hidden_size": 32,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 16,
    "qk_nope_head_dim": 16,
    "v_head_dim": 16,
    "num_experts": 8,
    "num_local_experts": 8,
    "n_routed_experts": 8,
    "moe_num_experts": 8,
    "num_experts_per_tok": 2,
    "moe_k": 2,
    "moe_topk": 2,
    "top_k_experts": 2,
    "n_shared_experts": 1,
    "moe_num_shared_experts": 1,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "dense_intermediate_size": 64,
    "shared_intermediate_size": 64,
    "moe_shared_expert_intermediate_size": 32,
    "moe_hidden_size": 96,
    "index_n_heads": 2,
    "index_head_dim": 16,
    "index_topk": 8,
    "linear_num_heads": 4,
    "linear_head_dim": 16,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 2,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
    "mamba_num_heads": 8,
    "mamba_head_dim": 16,
    "ssm_state_size": 16,
    "n_groups": 1,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
LAYER_KINDS = ("layer_types", "mlp_layer_types")
GEMMA = {"num_experts": 8, "top_k_experts": 2, "moe_intermediate_size": 32, "global_head_dim": 16}

# What the configuration of one architecture needs beyond that.
OVERRIDES: dict[str, dict[str, Any]] = {
    "dbrx": {
        "attn_config": {"kv_n_heads": 2, "rope_theta": 10000.0, "clip_qkv": 8.0},
        "ffn_config": {"ffn_hidden_size": 32, "moe_num_experts": 8, "moe_top_k": 2, "hidden_size": 64},
        "n_heads": 4,
        "n_layers": 2,
        "max_seq_len": 64,
    },
    "deepseek_ocr2": {
        "n_routed_experts": 8,
        "num_experts_per_tok": 2,
        "mlp_layer_types": ["dense", "sparse"],
    },
    "diffusion_gemma": GEMMA,
    "doge": {"is_moe": True, "num_experts": 16},
    "dots3_note": {"num_key_value_heads": 4, "layer_types": ["indexed_attention"] * 2},
    "ernie4_5_vl_moe": {"moe_intermediate_size": [32, 16], "head_dim": 128},
    "flint": {"mlp_only_layers": [0]},
    "gemma4": GEMMA | {"enable_moe_block": True, "vocab_size_per_layer_input": 128, "hidden_size_per_layer_input": 16},
    "glm4v_moe": {"head_dim": 128},
    "glm5_next": {"num_key_value_heads": 4, "qk_rope_head_dim": 0, "index_kpool": 4},
    "granitemoehybrid": {
        "layer_types": ["linear_attention", "full_attention"],
        "mamba_n_heads": 8,
        "mamba_d_state": 16,
    },
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"], "num_dense_layers": 1},
    "longcat_flash": {"zero_expert_num": 2, "num_layers": 1},
    "nllb_moe": {
        "encoder_layers": 2,
        "decoder_layers": 2,
        "encoder_sparse_step": 2,
        "decoder_sparse_step": 2,
        "encoder_ffn_dim": 64,
        "decoder_ffn_dim": 64,
        "encoder_attention_heads": 4,
        "decoder_attention_heads": 4,
    },
    "mistral4": {"head_dim": 32},
    "qwen4_exp": {
        "indexer_n_heads": 2,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 16,
        "indexer_budget": 8,
        "indexer_compress_ratio": 4,
        "hc_lowrank": 8,
        "hc_count": 2,
    },
    "step3p7": {
        "layer_types": ["full_attention", "sliding_attention"],
        "sliding_window": 8,
        "mlp_layer_types": ["dense", "sparse"],
        "share_expert_dim": 32,
    },
    "switch_transformers": {
        "d_ff": 64,
        "d_kv": 16,
        "num_heads": 4,
        "num_layers": 2,
        "num_decoder_layers": 2,
        "num_sparse_encoder_layers": 1,
        "num_sparse_decoder_layers": 1,
    },
    "vitpose_backbone": {"num_experts": 2, "part_features": 16},
    "zaya": {"num_experts_per_tok": 1},
}


def architecture_names() -> list[str]:
    """The architectures that the compiler must capture: those with stacked weights of the common form."""
    return [name for name, text in _candidates() if STACKED.search(text) and name not in REFUSED]


def refused_names() -> list[str]:
    """The architectures that the compiler must refuse: all others with experts of any kind."""
    supported = architecture_names()
    return [name for name, _ in _candidates() if name not in supported]


def _candidates() -> Iterator[tuple[str, str]]:
    """Every model folder of transformers that holds experts of any kind, with the text of its modeling file."""
    for path in sorted(MODELS.glob("*/modeling_*.py")):
        text = path.read_text(encoding="utf-8")
        of_the_model = path.stem == f"modeling_{path.parent.name}"
        if of_the_model and (STACKED.search(text) or MOE_CLASS.search(text)):
            yield path.parent.name, text


def build(name: str) -> PreTrainedModel:
    """A tiny model of an architecture: random weights, eval mode, float32, on the CPU, always the same."""
    problems = []
    for cls in _model_classes(name):
        try:
            config = _tiny_config(cls.config_class, OVERRIDES.get(name, {}))
            with torch.device("meta"):
                skeleton = cls(config)
        except Exception as error:
            problems.append(f"{cls.__name__}: {type(error).__name__}: {error}")
            continue
        if not _has_experts(skeleton):
            problems.append(f"{cls.__name__}: no experts")
        elif skeleton.num_parameters() > 4_000_000:
            problems.append(f"{cls.__name__}: {skeleton.num_parameters()} parameters")
        else:
            return _random_model(cls, config)
    raise RuntimeError(f"no tiny {name} could be built: " + "; ".join(problems))


def example_inputs(model: PreTrainedModel, batch: int, sequence: int) -> dict[str, Tensor]:
    """Random token ids of shape `(batch, sequence)`, the same for the same shape."""
    generator = torch.Generator().manual_seed(1000 * batch + sequence)
    ids = torch.randint(3, model.config.get_text_config().vocab_size, (batch, sequence), generator=generator)
    if model.config.is_encoder_decoder:
        return {"input_ids": ids, "decoder_input_ids": ids}
    return {"input_ids": ids}


def logits(output: Any) -> Tensor:
    """The logits of a model's output; of a model without a head its last hidden state."""
    value = getattr(output, "logits", None)
    return output[0] if value is None else value


def _model_classes(name: str) -> list[type[PreTrainedModel]]:
    """The model classes of an architecture, a causal language model first, then bare text models."""
    module = importlib.import_module(f"transformers.models.{name}.modeling_{name}")
    order = ("ForCausalLM", "TextModel", "ForConditionalGeneration", "ForTokenClassification", "Model", "")
    classes = [
        cls
        for _, cls in inspect.getmembers(module, inspect.isclass)
        if issubclass(cls, PreTrainedModel) and cls.__module__ == module.__name__ and cls.config_class
    ]
    rank = {cls: next(i for i, suffix in enumerate(order) if cls.__name__.endswith(suffix)) for cls in classes}
    return sorted(classes, key=lambda cls: (rank[cls], len(cls.__name__)))


def _tiny_config(config_class: type[PretrainedConfig], overrides: dict[str, Any]) -> PretrainedConfig:
    """The configuration with tiny sizes, and as many layers as it takes to see every kind of layer once."""
    default = config_class()
    known = dict(_attributes(default, (*SIZES, *LAYER_KINDS, "num_hidden_layers")))
    values = {key: SIZES[key] for key in SIZES if key in known and not isinstance(known[key], list | tuple | dict)}
    if known.get("kv_lora_rank") is not None and "num_key_value_heads" in values:
        values["num_key_value_heads"] = values["num_attention_heads"]
    kinds = {key: list(dict.fromkeys(known[key])) for key in LAYER_KINDS if known.get(key)}
    layers = max([2, *map(len, kinds.values())])
    values |= {key: (value + value[-1:] * layers)[:layers] for key, value in kinds.items()}
    if "num_hidden_layers" in known:
        values["num_hidden_layers"] = layers
    return config_class(**(values | overrides))


def _attributes(config: PretrainedConfig, names: tuple[str, ...]) -> Iterator[tuple[str, Any]]:
    """The attributes among `names` that can be set; one that raises (it varies by layer) counts as `None`."""
    for name in names:
        if isinstance(getattr(type(config), name, None), property):
            continue
        try:
            yield name, getattr(config, name)
        except AttributeError:
            continue
        except Exception:
            yield name, None


def _has_experts(model: PreTrainedModel) -> bool:
    name = re.compile(r"(Experts|MoE|Moe|SparseMLP)$")
    return any(name.search(type(module).__name__) for module in model.modules())


def _random_model(cls: type[PreTrainedModel], config: PretrainedConfig) -> PreTrainedModel:
    """Matrices at a standard deviation of 0.15: far from alike, so that a wrong expert changes the logits."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = cls(config).float().eval()
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.dim() > 1:
                    parameter.normal_(0.0, 0.15)
    return model.requires_grad_(False)
