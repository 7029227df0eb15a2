"""The model that comes with the package: small, trained from scratch, loaded without a network.

`load_model` gives an OLMoE model of 6 million parameters that `moe_compiler.embedded.train` made; `load_text`
gives the text of the five domains it knows. What it can do is in ``model/README.md``.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from moe_compiler.embedded.corpus import DOMAINS, load_samples, load_text

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

__all__ = ["DOMAINS", "MODEL_FOLDER", "load_model", "load_samples", "load_text"]

MODEL_FOLDER = Path(__file__).resolve().parent / "model"


def load_model(dtype: torch.dtype | None = None) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load the embedded model and its tokenizer from the package data; nothing is downloaded.

    Args:
        dtype: of the weights, a floating-point one; float32 if `None`. The file has bfloat16.

    Returns:
        The model, in evaluation mode on the CPU, and the tokenizer.

    Raises:
        ValueError: `dtype` is not a floating-point type.
        RuntimeError: the installed package has no model files.
    """
    if dtype is not None and not dtype.is_floating_point:
        raise ValueError(f"`dtype` must be a floating-point type, but is {dtype}")
    if not (MODEL_FOLDER / "model.safetensors").is_file():
        raise RuntimeError(f"the embedded model is missing: {MODEL_FOLDER} has no model.safetensors; reinstall")
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer  # slow to import, and `load_text` needs neither

    model = AutoModelForCausalLM.from_pretrained(MODEL_FOLDER, dtype=dtype or torch.float32, local_files_only=True)
    return model.eval(), AutoTokenizer.from_pretrained(MODEL_FOLDER, local_files_only=True)
