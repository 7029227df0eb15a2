"""The activations that the fused operators know, by the names that the operators take."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial

import torch.nn.functional as F
from torch import Tensor

ACTIVATIONS: Mapping[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": partial(F.gelu, approximate="tanh"),
    "relu": F.relu,
}


def gated(gate_up: Tensor, activation: str) -> Tensor:
    """`act(gate) · up` of the two halves of `gate_up` `(..., 2I)`, computed in float32 (float64 stays); `(..., I)`.

    Raises:
        ValueError: `activation` is not one that the operators know.
    """
    if activation not in ACTIVATIONS:
        raise ValueError(f"`activation` must be one of {', '.join(ACTIVATIONS)}, but is {activation!r}")
    wide = gate_up if gate_up.dtype.itemsize >= 4 else gate_up.float()
    gate, up = wide.chunk(2, dim=-1)
    return (ACTIVATIONS[activation](gate) * up).to(gate_up.dtype)
