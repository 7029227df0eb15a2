"""Observing lowered experts without computing their first linear twice: experts go on from what the observer has."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.fx import GraphModule

from moe_compiler.kernels import ops
from moe_compiler.passes.base import MoEPass, run_passes
from moe_compiler.passes.calibrate import ObservedModel
from moe_compiler.passes.lower import LoweredExperts
from moe_compiler.passes.observe import OBSERVER

FINISHED = "experts_from_observer"


class LastLinear(nn.Module):
    """The last linear of fused experts and the sum over a token's experts, as `packed_experts` computes them.

    Args:
        experts: lowered experts whose graph is one `packed_experts`, without shared experts in it.
    """

    def __init__(self, experts: LoweredExperts) -> None:
        super().__init__()
        (node,) = (node for node in experts.graph.nodes if node.target == ops.packed_experts)
        *_, weight, bias, _, self.group_size = node.args
        self.weight = [experts.get_buffer(one.target) for one in weight]
        self.bias = None if bias is None else experts.get_parameter(bias.target)

    def forward(self, inputs: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """`(T, H)` from the inputs of the linear `(R, I)` and the routing `(T, k)`."""
        rows = ops.packed_expert_linear(inputs, top_k_index.reshape(-1), self.weight, self.bias, self.group_size)
        wide = torch.promote_types(rows.dtype, torch.float32)
        weighted = rows.to(wide).view(*top_k_index.shape, -1) * top_k_weights.unsqueeze(-1).to(wide)
        out: Tensor = weighted.sum(dim=1).to(inputs.dtype)
        return out


class ReturnLastInput(MoEPass):
    """Lets an observer return the input of the last linear that it observes.

    Before::

        observe_experts_(act, expert_ids, routing_weights, ...)
        return hidden_states

    After::

        observe_experts_(act, expert_ids, routing_weights, ...)
        return act
    """

    def rewrite(self, graph_module: GraphModule) -> int:
        """Changes the output, returns 1."""
        last = [node for node in graph_module.graph.nodes if node.target == ops.observe_experts_][-1]
        graph_module.graph.output_node().args = (last.args[0],)
        return 1


class FinishExperts(MoEPass):
    """Replaces observed experts by their last linear.

    Before (the observer returns its input)::

        experts_observer = self.experts_observer(view, index, weights)
        experts = self.experts(experts_observer, index, weights)

    After (the observer returns the input of the last linear)::

        experts_observer = self.experts_observer(view, index, weights)
        experts = self.experts_from_observer(experts_observer, index, weights)
    """

    def __init__(self, last: LastLinear) -> None:
        super().__init__()
        self.last = last

    def rewrite(self, graph_module: GraphModule) -> int:
        """Replaces the call, returns 1."""
        (observer,) = (node for node in graph_module.graph.nodes if node.target == OBSERVER)
        (experts,) = observer.users
        graph_module.add_submodule(FINISHED, self.last)
        experts.target = FINISHED
        return 1


def finish_from_observers(observed: ObservedModel) -> int:
    """Spares the observed blocks their experts' first linear, where the experts are fused and have no shared ones.

    Returns:
        How many blocks it was.
    """
    changed = 0
    for path, observer in observed.observers.items():
        block = observed.blocks[path]
        experts = block.experts
        graph = observed.model.get_submodule(path)
        if not isinstance(experts, LoweredExperts) or not isinstance(graph, GraphModule) or experts.shared_packed():
            continue
        if not any(node.target == ops.packed_experts for node in experts.graph.nodes):
            continue
        run_passes(observer, [ReturnLastInput()])
        run_passes(graph, [FinishExperts(LastLinear(experts))])
        changed += 1
    return changed
