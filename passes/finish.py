"""Observing fused lowered experts at the cost of their operator: it gives the layer's output and what is between."""

from __future__ import annotations

import operator

from torch.fx import GraphModule
from torch.fx.node import map_arg

from moe_compiler.kernels import ops
from moe_compiler.passes.base import MoEPass, run_passes
from moe_compiler.passes.calibrate import ObservedModel
from moe_compiler.passes.lower import LoweredExperts
from moe_compiler.passes.observe import OBSERVER


class ObserveFused(MoEPass):
    """Lets an observer of fused experts compute them by their one operator, and return the result.

    Before::

        observe_experts_(hidden_states, expert_ids, routing_weights, ...)
        gate_up = packed_expert_linear(hidden_states, expert_ids, [gate_up_proj, ...], ...)
        ...
        act = silu(gate) * up
        observe_experts_(act, expert_ids, routing_weights, ...)
        return hidden_states

    After::

        experts = packed_experts_hidden(hidden_states, top_k_index, top_k_weights, [gate_up_proj, ...], ...)
        experts_output = experts[0]                                      # (T, H)
        hidden = experts[1]                                              # (R, I)
        observe_experts_(hidden_states, expert_ids, routing_weights, ...)
        observe_experts_(hidden, expert_ids, routing_weights, ...)
        return experts_output
    """

    def __init__(self, experts: LoweredExperts) -> None:
        super().__init__()
        self.experts = experts

    def rewrite(self, graph_module: GraphModule) -> int:
        """Replaces what is computed, returns 1."""
        graph = graph_module.graph
        inputs = [node for node in graph.nodes if node.op == "placeholder"]
        first, last = (node for node in graph.nodes if node.target == ops.observe_experts_)
        (fused,) = (node for node in self.experts.graph.nodes if node.target == ops.packed_experts)

        with graph.inserting_before(first):
            weights = map_arg(fused.args[3:], lambda node: graph.get_attr(str(node.target)))
            node = graph.create_node("call_function", ops.packed_experts_hidden, (*inputs, *weights), name="experts")
            out, hidden = (graph.create_node("call_function", operator.getitem, (node, i)) for i in range(2))
        last.update_arg(0, hidden)
        graph.output_node().args = (out,)
        graph.eliminate_dead_code()
        return 1


class TakeFromObserver(MoEPass):
    """Replaces observed experts by what their observer returns.

    Before::

        experts_observer = self.experts_observer(view, index, weights)
        experts = self.experts(experts_observer, index, weights)

    After (the observer returns the experts' output)::

        experts_observer = self.experts_observer(view, index, weights)
    """

    def rewrite(self, graph_module: GraphModule) -> int:
        """Takes the call out, returns 1."""
        (observer,) = (node for node in graph_module.graph.nodes if node.target == OBSERVER)
        (experts,) = observer.users
        experts.replace_all_uses_with(observer)
        graph_module.graph.erase_node(experts)
        return 1


def finish_from_observers(observed: ObservedModel) -> int:
    """Spares the observed blocks their experts, where these are fused and have no shared ones: the observer's are used.

    Returns:
        How many blocks it was.
    """
    changed = 0
    for path, observer in observed.observers.items():
        experts = observed.blocks[path].experts
        graph = observed.model.get_submodule(path)
        if not isinstance(experts, LoweredExperts) or not isinstance(graph, GraphModule) or experts.shared_packed():
            continue
        if not any(node.target == ops.packed_experts for node in experts.graph.nodes):
            continue
        run_passes(observer, [ObserveFused(experts)])
        run_passes(graph, [TakeFromObserver()])
        changed += 1
    return changed
