"""A small compiled model in a folder, and how tests change its files."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from tiny import datasets, olmoe
from torch import Tensor
from transformers import AutoModelForCausalLM

from moe_compiler.api import dynamo_compile

OPTIONS: dict[str, Any] = {
    "strategy": "dynamo",
    "target_bits": None,
    "widths": (2, 4, 6),
    "quantizer": "rtn",
    "group_size": 32,
    "pool_fraction": 0.05,
    "progress": False,
}


def small(**changes: Any) -> Any:
    """An OLMoE with one layer, so small that its kernels are not compiled."""
    return olmoe(**({"num_hidden_layers": 1, "hidden_size": 64, "intermediate_size": 64} | changes))


def compiled(folder: Path, **changes: Any) -> Any:
    """A small model, compiled from the files in `folder`, where it is saved first."""
    small().save_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return dynamo_compile(model, datasets(), **(OPTIONS | changes))


def load(folder: Path, **options: Any) -> Any:
    """The model in a folder."""
    return AutoModelForCausalLM.from_pretrained(folder, **options)


def edit(path: Path, change: Callable[[Any], Any]) -> None:
    """Rewrites a JSON file."""
    contents = json.loads(path.read_text())
    change(contents)
    path.write_text(json.dumps(contents))


def tensors(model: Any) -> dict[str, Tensor]:
    """The state by name, as it is."""
    return dict(model.state_dict())


def same(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    """Whether two states are the same, bit for bit."""
    names = first.keys() == second.keys()
    return names and all(
        first[name].dtype == second[name].dtype and torch.equal(first[name], second[name]) for name in first
    )
