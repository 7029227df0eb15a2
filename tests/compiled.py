"""Tiny compiled models and what tests of the run time compare about them."""

from typing import Any

import torch
from tiny import datasets, olmoe, tokens
from torch import Tensor

from moe_compiler.api import dynamo_compile

OPTIONS: dict[str, Any] = {"target_bits": 3.6, "master": "memory", "pool_fraction": 0.02, "progress": False}


def compiled_olmoe(layers: int = 2, **changes: Any) -> Any:
    """A compiled OLMoE; `changes` are options of `dynamo_compile`."""
    return dynamo_compile(olmoe(num_hidden_layers=layers), datasets(), **(OPTIONS | changes))


def new_data(seed: int = 9) -> Tensor:
    """Samples over a small part of the vocabulary."""
    return tokens(6, 32, seed, high=12)


def other_data(seed: int = 5) -> Tensor:
    """Samples over another small part of it."""
    return tokens(6, 32, seed, low=80)


def state(model: Any) -> dict[str, Tensor]:
    """A copy of all that is saved of a model."""
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def unchanged(model: Any, before: dict[str, Tensor]) -> bool:
    """Whether the model is bit for bit what `state` copied."""
    return all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


@torch.no_grad()
def logits(model: Any, shape: tuple[int, int] = (2, 9)) -> Tensor:
    """The logits of fixed tokens."""
    return model(input_ids=tokens(*shape, 3), use_cache=False).logits
