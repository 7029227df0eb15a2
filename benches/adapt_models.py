"""Models for the benches of the run time: the embedded one, any from a folder, or OLMoE-1B-7B's sizes at random."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from models import build_original, model_config
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer
from workloads import widths

from moe_compiler import dynamo_compile
from moe_compiler.config import CompileConfig
from moe_compiler.data import load_samples
from moe_compiler.embedded import load_model, load_text
from moe_compiler.embedded.generators import Split
from moe_compiler.kernels.affine import WIDTHS
from moe_compiler.kernels.experts import PackedExpertLinear
from moe_compiler.kernels.planes import PlaneLayout
from moe_compiler.kernels.pool import ChannelPool
from moe_compiler.layer import pool_size
from moe_compiler.passes.capture import MoEBlock, Projection, capture_moe_blocks
from moe_compiler.passes.lower import lower_block
from moe_compiler.passes.quantize import quantize_experts
from moe_compiler.runtime.adaptation import RuntimeLayer
from moe_compiler.runtime.master import MemoryMaster, channel_error
from moe_compiler.runtime.runtime import Runtime

EMBEDDED = "embedded"
GROUP_SIZE = 128
TEMPLATES = 4
WINDOW = 256


def load(name: str, device: torch.device) -> tuple[Any, Any]:
    """A model and its tokenizer: `"embedded"`, or a folder that transformers can load."""
    if name == EMBEDDED:
        model, tokenizer = load_model(torch.bfloat16 if device.type == "cuda" else torch.float32)
    else:
        model = AutoModelForCausalLM.from_pretrained(name, dtype=torch.bfloat16)
        tokenizer = AutoTokenizer.from_pretrained(name)
    return model.to(device), tokenizer


def windows(text: str, tokens: int, tokenizer: Any, model: Any, *, name: str = "text") -> list[Tensor]:
    """The first tokens of a text as windows of 256.

    Raises:
        ValueError: the text is too short.
    """
    found = load_samples(
        text,
        name=name,
        tokenizer=tokenizer,
        sequence_length=WINDOW,
        max_tokens=tokens,
        vocab_size=model.get_input_embeddings().num_embeddings,
    )
    seen = sum(window.numel() for window in found)
    if seen < tokens:
        raise ValueError(f"`tokens` must be at most the {seen} that {name!r} has, but is {tokens}")
    return list(found)


def read_text(source: str, split: Split, tokens: int) -> str:
    """A file's text, or that of an embedded domain: enough for so many tokens."""
    path = Path(source)
    return path.read_text() if path.is_file() else load_text(source, split, max_characters=8 * tokens)


def compile_quickly(model: Any, calibration: dict[str, list[Tensor]], pool: float, master: str) -> None:
    """Compiles with rounding to nearest, which adapting does not depend on."""
    dynamo_compile(model, calibration, quantizer="rtn", pool_fraction=pool, master=master, progress=False)


def real_shape(layers: int, quick: bool, pool: float, device: torch.device) -> Any:
    """A compiled model at OLMoE-1B-7B's sizes with a master in memory, half 2-bit and half 4-bit, pools empty.

    Four experts of each linear are quantized; the others are copies of them, which no step of adapting can tell.
    """
    model = build_original(model_config(layers, quick), device)
    config = CompileConfig(pool_fraction=pool)
    found = {}
    for path, block in capture_moe_blocks(model).items():
        linears, masters = {}, {}
        for projection in block.spec.projections:
            linears[projection.name], masters[projection.name] = _template(block, projection, config, device)
        lower_block(model, block, linears, {})
        found[path] = RuntimeLayer(
            block=block,
            masters=masters,
            calibration_count=torch.ones(block.spec.num_experts, dtype=torch.int64),
            overhead_bits={name: one.effective_bits - one.code_bits for name, one in linears.items()},
            top_k=model.config.num_experts_per_tok,
        )
    model.runtime = Runtime(
        model,
        found,
        rule="lowrank",
        widths=WIDTHS,
        tokens_per_batch=config.tokens_per_batch,
        load=partial(_load, vocab_size=model.config.vocab_size),
    )
    return model


def _template(
    block: MoEBlock, projection: Projection, config: CompileConfig, device: torch.device
) -> tuple[PackedExpertLinear, MemoryMaster]:
    """A packed linear and its master, of which all experts are copies of the first few."""
    experts, rows, columns = block.spec.num_experts, projection.out_features, projection.in_features
    bits = widths(3, TEMPLATES)
    weight = torch.randn(TEMPLATES, rows, columns, device=device) * columns**-0.5
    few = PackedExpertLinear.from_quantized(quantize_experts("rtn", weight, None, bits, GROUP_SIZE))
    error = channel_error(weight, few)
    copies = [expert % TEMPLATES for expert in range(experts)]
    layout = PlaneLayout(tuple(bits), rows, columns).offsets
    packed = PackedExpertLinear(
        planes=torch.cat([few.planes[layout[one] : layout[one + 1]] for one in copies]),
        table=PlaneLayout(tuple(bits[one] for one in copies), rows, columns).table().to(device),
        scale=few.scale[copies],
        zero_point=few.zero_point[copies],
        pool=ChannelPool.empty(experts, *_sizes(pool_size(projection, experts, config), rows, columns), device),
        in_features=columns,
        group_size=GROUP_SIZE,
    )
    return packed, MemoryMaster.of(weight.to(torch.bfloat16)[copies], error[copies])


def _sizes(slots: Sequence[int], rows: int, columns: int) -> tuple[int, int, int, int]:
    """The arguments of `ChannelPool.empty` after the number of experts."""
    capacity, directions = slots
    return capacity, rows, columns, directions


def _load(samples: Any, *, name: str, tokenizer: Any, vocab_size: int) -> Any:
    return load_samples(samples, name=name, tokenizer=tokenizer, sequence_length=WINDOW, vocab_size=vocab_size)
