"""Which experts a router chooses together: counts per pair of experts."""

from __future__ import annotations

import torch
from torch import Tensor


def observe_coactivation_(expert_ids: Tensor, top_k: int, coactivation: Tensor) -> None:
    """Adds the pairs of experts that a batch was routed to; arguments as in `moe_compiler.kernels.ops`.

    One product of `(E, T)` with `(T, E)` zeros and ones in float32, exact below 2^24 tokens.
    """
    num_experts = coactivation.shape[0]
    chosen = expert_ids.view(-1, top_k).clamp(max=num_experts)
    routed = torch.zeros(chosen.shape[0], num_experts + 1, device=expert_ids.device).scatter_(1, chosen, 1.0)
    routed = routed[:, :num_experts]
    coactivation += (routed.t() @ routed).long()
