"""What the packed operators are measured against: the layer in bfloat16, by every means that PyTorch users have."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from functools import partial

import torch
import torch.nn.functional as F
from int4 import AtenLinear
from torch import Tensor, nn
from transformers import MixtralConfig
from transformers.models.mixtral.modeling_mixtral import MixtralExperts
from workloads import LayerShape, random_tensor

BFLOAT16 = torch.bfloat16


class Layer:
    """One MoE layer's weights in bfloat16: routed experts in transformers' own module, shared experts as one MLP.

    Args:
        shape: the layer.
        shared_copies: sets of the shared experts' weights, to cycle through.
        device: where.
    """

    def __init__(self, shape: LayerShape, shared_copies: int, device: torch.device) -> None:
        config = MixtralConfig(
            hidden_size=shape.hidden_size,
            intermediate_size=shape.intermediate_size,
            num_local_experts=shape.num_experts,
            num_experts_per_tok=shape.top_k,
            hidden_act="silu",
        )
        with torch.device("meta"):
            self.experts = MixtralExperts(config).requires_grad_(False)
        for name, parameter in list(self.experts.named_parameters()):
            weight = random_tensor(parameter.shape, BFLOAT16, device, parameter.shape[2] ** -0.5)
            setattr(self.experts, name, nn.Parameter(weight, requires_grad=False))
        self.shared = [
            (
                random_tensor((2 * shape.shared_size, shape.hidden_size), BFLOAT16, device, shape.hidden_size**-0.5),
                random_tensor((shape.hidden_size, shape.shared_size), BFLOAT16, device, shape.shared_size**-0.5),
            )
            for _ in range(shared_copies if shape.shared_size else 0)
        ]

    def with_shared(self, out: Tensor, x: Tensor, call: int) -> Tensor:
        """Adds the shared experts' output."""
        return out + mlp(x, *self.shared[call % len(self.shared)]) if self.shared else out


def mlp(x: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    """`down(silu(gate(x)) · up(x))`."""
    gate, up = F.linear(x, gate_up).chunk(2, dim=-1)
    return F.linear(F.silu(gate) * up, down)


def transformers_experts(
    layer: Layer, implementation: str, compiled: bool, x: Tensor, ids: Sequence[Tensor], weights: Tensor
) -> list[Callable[[], Tensor]]:
    """The layer by transformers' experts interface, `"grouped_mm"` or `"batched_mm"`; one call per routing in `ids`."""
    experts = copy.copy(layer.experts)  # another object over the same weights, with a configuration of its own
    experts.config = copy.copy(experts.config)
    experts.config._experts_implementation = implementation

    def forward(x: Tensor, ids: Tensor, weights: Tensor, shared: Sequence[Tensor]) -> Tensor:
        out: Tensor = experts(x, ids, weights)
        return out + mlp(x, *shared) if shared else out

    run = torch.compile(forward, fullgraph=True, dynamic=False) if compiled else forward

    def call(index: int) -> Tensor:
        return run(x, ids[index], weights, layer.shared[index % len(layer.shared)] if layer.shared else ())

    return [partial(call, index) for index in range(len(ids))]


def linear_per_expert(
    layer: Layer, compiled: bool, x: Tensor, ids: Sequence[Tensor], weights: Tensor
) -> list[Callable[[], Tensor]]:
    """One `F.linear` per matrix and hit expert. The rows are sorted by expert beforehand, which favours it."""
    run = torch.compile(mlp, fullgraph=True, dynamic=True) if compiled else mlp

    def prepare(index: int) -> Callable[[], Tensor]:
        rows = rows_by_expert(ids[index])

        def call() -> Tensor:
            out = torch.zeros_like(x)
            for expert, token, slot in rows:
                y = run(x[token], layer.experts.gate_up_proj[expert], layer.experts.down_proj[expert])
                out.index_add_(0, token, y * weights[token, slot, None])
            return layer.with_shared(out, x, index)

        return call

    return [prepare(index) for index in range(len(ids))]


def rows_by_expert(ids: Tensor) -> list[tuple[int, Tensor, Tensor]]:
    """For each hit expert its index, the tokens routed to it, and the position of the expert among each token's."""
    found = []
    for expert in ids.unique().tolist():
        token, slot = torch.where(ids == expert)
        found.append((expert, token, slot))
    return found


def int4_per_expert(shape: LayerShape, x: Tensor, ids: Sequence[Tensor], weights: Tensor) -> list[Callable[[], Tensor]]:
    """The layer by ATen's 4-bit matrix product, one per matrix and hit expert; shared experts are experts like others.

    Args:
        shape: the layer.
        x: `(T, H)` bfloat16 on the CPU.
        ids: routings, the shared experts among them.
        weights: `(T, k)`, theirs too.
    """
    gate_up = AtenLinear(shape.all_experts, 2 * shape.intermediate_size, shape.hidden_size)
    down = AtenLinear(shape.all_experts, shape.hidden_size, shape.intermediate_size)

    def prepare(index: int) -> Callable[[], Tensor]:
        rows = rows_by_expert(ids[index])

        def call() -> Tensor:
            out = torch.zeros_like(x)
            for expert, token, slot in rows:
                gate, up = gate_up(x[token], expert).chunk(2, dim=-1)
                y = down(F.silu(gate) * up, expert)
                out.index_add_(0, token, y * weights[token, slot, None])
            return out

        return call

    return [prepare(index) for index in range(len(ids))]


def batched_mm_bytes(shape: LayerShape, tokens: int) -> int:
    """Memory that `"batched_mm"` gathers at once: the larger weight of every (token, expert) pair."""
    return tokens * shape.top_k * 2 * 2 * shape.intermediate_size * shape.hidden_size
