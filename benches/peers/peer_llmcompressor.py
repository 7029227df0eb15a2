"""LLM Compressor (vLLM project): GPTQ as its `GPTQModifier` does it, every expert calibrated on every token."""

from __future__ import annotations

import time

from exchange import Quantized, Task
from llmcompressor import oneshot
from llmcompressor.modeling.moe.linearize import load_quantizable_moe
from llmcompressor.modifiers.gptq import GPTQModifier
from storage import checkpoint_expert_tensors, count_storage
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM


def quantize(task: Task) -> Quantized:
    """Quantizes the experts' linears with `settings`: `bits`, `group_size`; the rest are its defaults."""
    bits, group_size = task.settings["bits"], task.settings["group_size"]
    weights = {"num_bits": bits, "type": "int", "symmetric": True, "strategy": "group", "group_size": group_size}
    recipe = GPTQModifier(config_groups={"experts": {"targets": [r"re:.*\.experts\..*_proj$"], "weights": weights}})
    with load_quantizable_moe():
        model = AutoModelForCausalLM.from_pretrained(task.model, dtype="auto")
    samples = [{"input_ids": one, "attention_mask": one.new_ones(len(one))} for one in task.samples]
    start = time.perf_counter()
    oneshot(model=model, dataset=DataLoader(samples, batch_size=4), recipe=recipe, num_calibration_samples=len(samples))
    seconds = time.perf_counter() - start
    saved = task.folder / "quantized"
    model.save_pretrained(saved, save_compressed=True)
    storage = count_storage(checkpoint_expert_tensors(saved), task.expert_weights)
    return Quantized(model, storage, "files", float(bits), seconds)
