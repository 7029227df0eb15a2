"""AutoRound (Cheng et al. 2023, arXiv 2309.05516): rounding and clipping learned by signed gradients, block by block.

Its exported model needs kernels that a CPU may lack: the figures are those of the model in memory, with weights as it
dequantizes them, the bits those of its export.
"""

from __future__ import annotations

import time

from auto_round import AutoRound
from exchange import Quantized, Task
from storage import checkpoint_expert_tensors, count_storage
from transformers import AutoModelForCausalLM, AutoTokenizer


def quantize(task: Task) -> Quantized:
    """Quantizes the experts' linears with `settings`: `bits`, `group_size`, `iters`; the rest are its defaults."""
    settings = task.settings
    model = AutoModelForCausalLM.from_pretrained(task.model, dtype="auto")
    start = time.perf_counter()
    rounder = AutoRound(
        model,
        AutoTokenizer.from_pretrained(task.model),
        bits=settings["bits"],
        group_size=settings["group_size"],
        iters=settings["iters"],
        layer_config={name: {"bits": 16} for name in ("q_proj", "k_proj", "v_proj", "o_proj")},
        dataset=[{"input_ids": one[None], "attention_mask": one[None].new_ones(1, len(one))} for one in task.samples],
        seqlen=len(task.samples[0]),
        nsamples=len(task.samples),
        device_map="cpu",
    )
    found, _ = rounder.quantize()
    seconds = time.perf_counter() - start
    rounder.save_quantized(str(task.folder / "quantized"), format="auto_round", inplace=False)
    stored = checkpoint_expert_tensors(task.folder / "quantized")
    return Quantized(found, count_storage(stored, task.expert_weights), "files", float(settings["bits"]), seconds)
