"""A second model object over the same tensors, to run a rewritten graph while the real model stays as it is."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any, TypeVar

from torch import nn

Model = TypeVar("Model", bound=nn.Module)


def shadow(model: Model, replacements: Mapping[str, nn.Module]) -> Model:
    """Copies the structure of `model` and none of its tensors, with some submodules replaced.

    The copy sees every later in-place change of the model's parameters and buffers. Observing a calibration set or
    adapting a serving model runs on such a copy: the model itself, its compiled graphs and its guards are not touched,
    and other threads may keep running it.

    Args:
        model: the model.
        replacements: module path to the module that takes its place in the copy (used as it is, not copied).

    Raises:
        AttributeError: a path does not exist in `model`.
    """
    memo: dict[int, Any] = {}
    for module in model.modules():
        for tensor in (*module._parameters.values(), *module._buffers.values()):
            if tensor is not None:
                memo[id(tensor)] = tensor
        for value in _left_behind(module).values():
            memo[id(value)] = None
    for path, module in replacements.items():
        memo[id(model.get_submodule(path))] = module
    copied = copy.deepcopy(model, memo)
    for module in copied.modules():
        if module.__dict__.get("forward", module) is None:
            del module.__dict__["forward"]
    return copied


def _left_behind(module: nn.Module) -> dict[str, Any]:
    """Attributes that belong to the one real model: its runtime, its graphs and whatever was compiled from it."""
    names = ("runtime", "moe_graphs", "moe_report", "_compiled_call_impl", "_compiled_call")
    found = {name: module.__dict__[name] for name in names if module.__dict__.get(name) is not None}
    forward = module.__dict__.get("forward")
    if hasattr(forward, "_torchdynamo_orig_callable"):  # model.forward = torch.compile(model.forward)
        found["forward"] = forward
    return found
