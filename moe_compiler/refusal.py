"""What makes a loader that does not know the format refuse a saved model, instead of filling its experts with noise.

transformers only warns of an unknown `quant_method`, and gives random numbers to weights that the files lack. It raises
where a tensor of a file has another shape than the weight of that name. Packed planes are flat, and keep the name of
the stacked weight that they stand for. Where the original experts were modules of their own (`experts.0.up_proj.weight`
and so on) no packed tensor has such a name, so the files hold one more tensor that does.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from moe_compiler.passes.lower import LoweredExperts


def refusing_tensors(experts: Iterable[LoweredExperts]) -> dict[str, Tensor]:
    """The tensors that a saved model's files hold beside its state.

    Args:
        experts: the lowered experts of all its layers.

    Returns:
        By name, for each layer whose packed tensors have no name of an original weight: a tensor `(1,)` with the name
        of the first one. Empty for models whose experts were stacked.
    """
    found = {}
    for one in experts:
        original = one.meta["replaced"]
        if not set(original) & one._buffers.keys():
            found[f"{one.spec.path}.{original[0]}"] = torch.zeros(1, dtype=torch.int16)
    return found
