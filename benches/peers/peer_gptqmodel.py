"""GPTQModel (ModelCloud): GPTQ with its own damping, group-aware reordering and treatment of rarely used experts."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path

from exchange import Quantized, Task
from gptqmodel import BACKEND, GPTQModel, QuantizeConfig
from plan_rules import dynamic_rules, read_plan
from storage import checkpoint_expert_tensors, count_storage
from transformers import AutoTokenizer

SAMPLES_PER_BATCH = 8
ATTENTION_AS_IT_IS: dict[str, dict[str, int]] = {r"-:.*self_attn.*": {}}
"""Only the experts are quantized, as by `dynamo_compile`: what the attention would lose is no part of the figures."""


def quantize(task: Task) -> Quantized:
    """Quantizes with `settings`: `bits`, `group_size`, and `plan`, a file of widths, where there is one."""
    bits, plan = task.settings["bits"], task.settings.get("plan")
    widths = {} if plan is None else read_plan(Path(plan))
    config = QuantizeConfig(
        bits=bits,
        group_size=task.settings["group_size"],
        dynamic=ATTENTION_AS_IT_IS | dynamic_rules(widths, bits),
        device="cpu",
        offload_to_disk=False,
    )
    loaded = GPTQModel.load(task.model, config)
    samples = [{"input_ids": one[None], "attention_mask": one[None].new_ones(1, len(one))} for one in task.samples]
    tokenizer = AutoTokenizer.from_pretrained(task.model)
    start = time.perf_counter()
    loaded.quantize(samples, tokenizer=tokenizer, batch_size=SAMPLES_PER_BATCH)
    seconds = time.perf_counter() - start
    saved = task.folder / "quantized"
    loaded.save(str(saved))
    found = GPTQModel.load(str(saved), backend=BACKEND.TORCH, device="cpu")
    storage = count_storage(checkpoint_expert_tensors(saved), task.expert_weights)
    return Quantized(found.model, storage, "files", _code_bits(saved, widths, bits), seconds)


def _code_bits(saved: Path, widths: Mapping[str, int], default: int) -> float:
    """Mean width of the codes over the weights of the checkpoint's linears."""
    spent = count = 0.0
    for name, tensor in checkpoint_expert_tensors(saved):
        path, _, kind = name.rpartition(".")
        if kind == "qweight":
            bits = widths.get(path, default)
            spent += 32 * tensor.numel()
            count += 32 * tensor.numel() / bits
    return spent / count
