"""Quantizers that transformers calls while it loads a model: bitsandbytes, optimum-quanto, torchao.

Each replaces `nn.Linear` modules and leaves fused expert parameters as they are, unless it says otherwise: the bits are
those of what the experts hold afterwards.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any

import torch
from exchange import Quantized, Task
from storage import count_storage, expert_tensors, tensor_parts
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, QuantoConfig, TorchAoConfig

LEFT_ALONE = "leaves the fused experts as they are: only attention is quantized, so these are no figures at its bits"


def _torchao() -> TorchAoConfig:
    from torchao.quantization import IntxWeightOnlyConfig, PerGroup

    return TorchAoConfig(IntxWeightOnlyConfig(weight_dtype=torch.int3, granularity=PerGroup(128)))


CONFIGS: Mapping[str, Callable[[], Any]] = {
    "bitsandbytes": lambda: BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4"),
    "quanto": lambda: QuantoConfig(weights="int2"),
    "torchao": _torchao,
}
"""The fewest bits that each offers near 3, by the setting `config`."""


def quantize(task: Task) -> Quantized:
    """Quantizes with `settings`: `config`, one of `CONFIGS`."""
    config = CONFIGS[task.settings["config"]]()
    start = time.perf_counter()
    model = AutoModelForCausalLM.from_pretrained(task.model, dtype="auto", device_map="cpu", quantization_config=config)
    seconds = time.perf_counter() - start
    tensors = [part for name, tensor in expert_tensors(model) for part in tensor_parts(name, tensor)]
    left = all(tensor.is_floating_point() and tensor.element_size() > 1 for _, tensor in tensors)
    storage = count_storage(tensors, task.expert_weights)
    if not left:
        raise RuntimeError(f"{task.settings['config']} quantizes fused experts now: count the width of its codes here")
    return Quantized(model, storage, "buffers", storage.effective_bits, seconds, LEFT_ALONE)
