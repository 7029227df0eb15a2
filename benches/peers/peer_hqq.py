"""HQQ (Badri and Shaji 2023): needs no calibration.

Its conversion of a model replaces `nn.Linear` and so passes over fused experts: here its `HQQLinear` quantizes every
expert's matrix, and the model runs with what that dequantizes to.
"""

from __future__ import annotations

import time

import torch
from exchange import Quantized, Task
from hqq.core.quantize import BaseQuantizeConfig, HQQLinear
from storage import count_storage, expert_matrices
from torch import nn
from transformers import AutoModelForCausalLM

NOTE = (
    "its HQQLinear on every expert's matrix, since its conversion of models skips fused experts; "
    "evaluated with dequantized weights"
)


@torch.no_grad()
def quantize(task: Task) -> Quantized:
    """Quantizes with `settings`: `bits`, `group_size`."""
    model, bits = AutoModelForCausalLM.from_pretrained(task.model, dtype="auto"), task.settings["bits"]
    config = BaseQuantizeConfig(nbits=bits, group_size=task.settings["group_size"], axis=1)
    stored, start = [], time.perf_counter()
    for name, matrix in expert_matrices(model):
        linear = nn.Linear(matrix.shape[1], matrix.shape[0], bias=False, dtype=matrix.dtype)
        linear.weight.copy_(matrix)
        packed = HQQLinear(linear, config, compute_dtype=matrix.dtype, device="cpu")
        stored += [(name, packed.W_q), (name, packed.meta["scale"]), (name, packed.meta["zero"])]
        matrix.copy_(packed.dequantize())
    storage = count_storage(stored, task.expert_weights)
    return Quantized(model, storage, "buffers", float(bits), time.perf_counter() - start, NOTE)
