"""Observer nodes: inserting them, reading them, taking them out again."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node

from moe_compiler.kernels import ops
from moe_compiler.passes.base import MoEPass, run_passes
from moe_compiler.passes.capture import ExpertsSpec, MoEBlock, trace_experts
from moe_compiler.passes.graph import MoEGraph
from moe_compiler.passes.lower import LoweredExperts
from moe_compiler.passes.statistics import BlockStatistics, LinearStatistics

OBSERVER = "experts_observer"
ACCUMULATORS = "accumulators"
"""Where the `meta` of an observer lists its accumulators; it may share other buffers with the model."""
_LINEARS = (ops.expert_linear, ops.packed_expert_linear)
_OBSERVERS = (ops.observe_experts_, ops.observe_routing_, ops.observe_coactivation_)


class ObserveLinears(MoEPass):
    """Puts an observer before each expert linear of an experts graph and cuts off what comes after the last one.

    Before (`T` tokens, `k` experts each, `R = T·k`; the same for `packed_expert_linear`)::

        expert_ids = top_k_index.reshape(-1)                             # (R,)
        gate_up = expert_linear(hidden_states, expert_ids, ...)          # (R, 2I)
        act = silu(gate) * up                                            # (R, I)
        down = expert_linear(act, expert_ids, ...)                       # (R, H)
        ... routing weights, sum over k ...
        return out                                                       # (T, H)

    After::

        expert_ids = top_k_index.reshape(-1)
        routing_weights = top_k_weights.reshape(-1)                      # (R,)
        observe_routing_(expert_ids, routing_weights, ...)
        observe_coactivation_(expert_ids, ...)
        observe_experts_(hidden_states, expert_ids, routing_weights, ...)
        gate_up = expert_linear(hidden_states, expert_ids, ...)
        act = silu(gate) * up
        observe_experts_(act, expert_ids, routing_weights, ...)
        return hidden_states

    The accumulators are non-persistent buffers of the graph.
    """

    def __init__(self, spec: ExpertsSpec, hessian: bool, device: torch.device) -> None:
        super().__init__()
        self.spec = spec
        self.hessian = hessian
        self.device = device

    def requires(self, graph_module: GraphModule) -> None:
        """The graph has one linear per projection of the specification, and none is observed yet."""
        if any(node.target in _OBSERVERS for node in graph_module.graph.nodes):
            raise RuntimeError(f"the experts graph of `{self.spec.path}` is observed already")
        linears = [node for node in graph_module.graph.nodes if node.target in _LINEARS]
        if len(linears) != len(self.spec.projections):
            raise RuntimeError(
                f"the experts graph of `{self.spec.path}` should have {len(self.spec.projections)} expert linears "
                f"but has {len(linears)}"
            )

    def rewrite(self, graph_module: GraphModule) -> int:
        """Inserts the observers, returns how many linears they watch."""
        graph = graph_module.graph
        hidden_states, top_k_index, top_k_weights = (n for n in graph.nodes if n.op == "placeholder")
        linears = [node for node in graph.nodes if node.target in _LINEARS]
        experts = self.spec.num_experts

        def buffer(name: str, *shape: int, dtype: torch.dtype) -> Node:
            zeros = torch.zeros(shape, dtype=dtype, device=self.device)
            graph_module.register_buffer(name, zeros, persistent=False)
            graph_module.meta.setdefault(ACCUMULATORS, []).append(name)
            return graph.get_attr(name)

        expert_ids = linears[0].args[1]
        with graph.inserting_before(linears[0]):
            graph_module.register_buffer(
                "token_weight", torch.ones(1, dtype=torch.float64, device=self.device), persistent=False
            )
            token_weight = graph.get_attr("token_weight")
            gate = graph.create_node("call_method", "reshape", (top_k_weights, -1), name="routing_weights")
            top_k = graph.create_node("call_method", "size", (top_k_index, -1), name="top_k")
            routing = [
                buffer("tokens", 3, dtype=torch.float64),
                buffer("count", experts, dtype=torch.int64),
                buffer("token_mass", experts, dtype=torch.float64),
                buffer("gate_mass", experts, dtype=torch.float64),
            ]
            graph.create_node(
                "call_function",
                ops.observe_routing_,
                (expert_ids, gate, token_weight, top_k, *routing),
                name="observe_routing",
            )
            coactivation = buffer("coactivation", experts, experts, dtype=torch.int64)
            graph.create_node(
                "call_function",
                ops.observe_coactivation_,
                (expert_ids, top_k, coactivation),
                name="observe_coactivation",
            )
        for linear, projection in zip(linears, self.spec.projections, strict=True):
            size = projection.in_features
            with graph.inserting_before(linear):
                sums = [
                    buffer(f"{projection.name}_abs_sum", experts, size, dtype=torch.float64),
                    buffer(f"{projection.name}_sq_sum", experts, size, dtype=torch.float64),
                    buffer(
                        f"{projection.name}_hessian",
                        *((experts, size, size) if self.hessian else (0,)),
                        dtype=torch.float32,
                    ),
                ]
                last = graph.create_node(
                    "call_function",
                    ops.observe_experts_,
                    (linear.args[0], expert_ids, gate, token_weight, *sums),
                    name=f"observe_{projection.name}",
                )
        output = graph.output_node()
        output.args = (hidden_states,)
        nodes = list(graph.nodes)
        for node in reversed(nodes[nodes.index(last) + 1 : nodes.index(output)]):
            graph.erase_node(node)
        return len(linears)

    def ensures(self, graph_module: GraphModule) -> None:
        """Every linear left in the graph is preceded by its observer."""
        watched = {node.args[0] for node in graph_module.graph.nodes if node.target == ops.observe_experts_}
        for node in graph_module.graph.nodes:
            if node.target in _LINEARS and node.args[0] not in watched:
                raise RuntimeError(f"expert linear `{node.name}` of `{self.spec.path}` has no observer")


class ObserveExperts(MoEPass):
    """Puts the observer of the experts before the experts node of a block graph.

    Before::

        experts = self.experts(view, index, weights)

    After (the observer returns its input, unchanged)::

        experts_observer = self.experts_observer(view, index, weights)
        experts = self.experts(experts_observer, index, weights)
    """

    def __init__(self, experts_node: str, observer: nn.Module) -> None:
        super().__init__()
        self.experts_node = experts_node
        self.observer = observer

    def rewrite(self, graph_module: GraphModule) -> int:
        """Inserts the call, returns 1 if the experts node was found."""
        found = [node for node in graph_module.graph.nodes if node.name == self.experts_node]
        for node in found:
            graph_module.add_submodule(OBSERVER, self.observer)
            with graph_module.graph.inserting_before(node):
                observed = graph_module.graph.call_module(OBSERVER, node.args[:3])
            node.args = (observed, *node.args[1:])
        return len(found)


class RemoveObservers(MoEPass):
    """Takes the observer out of a block graph: the inverse of `ObserveExperts`, to the letter of the code.

    Before::

        experts_observer = self.experts_observer(view, index, weights)
        experts = self.experts(experts_observer, index, weights)

    After::

        experts = self.experts(view, index, weights)
    """

    def rewrite(self, graph_module: GraphModule) -> int:
        """Removes the calls, returns how many there were."""
        found = [node for node in graph_module.graph.nodes if node.op == "call_module" and node.target == OBSERVER]
        for node in found:
            node.replace_all_uses_with(node.args[0])
            graph_module.graph.erase_node(node)
        if found:
            graph_module.delete_submodule(OBSERVER)
        return len(found)


def observed_block(block: MoEBlock, *, hessian: bool) -> tuple[MoEGraph, MoEGraph]:
    """A copy of a captured block with observers, over the same tensors; the captured graph is left as it is.

    Args:
        block: the captured block; its experts may be the model's own or already lowered.
        hessian: whether the observers collect Hessians, `4·E·K²` bytes per linear.

    Returns:
        The block graph with the observer node, and the observer (an experts graph) whose buffers hold the sums.
    """
    graph = MoEGraph(block.graph, copy.deepcopy(block.graph.graph), type(block.graph).__name__)
    experts = block.experts
    if isinstance(experts, LoweredExperts):
        observer = experts.unfused()
    else:
        observer = trace_experts(experts, block.spec)
    device = next(iter(experts.state_dict(keep_vars=True).values())).device
    run_passes(observer, [ObserveLinears(block.spec, hessian, device)])
    run_passes(graph, [ObserveExperts(block.experts_node, observer)])
    return graph, observer


def read_statistics(observer: nn.Module, spec: ExpertsSpec) -> BlockStatistics:
    """What an observer has summed so far, as copies; Hessians by reference, since they are large.

    Raises:
        RuntimeError: no token has passed the block yet.
    """
    tokens, weight_sum, top_k = observer.get_buffer("tokens").tolist()
    if not tokens:
        raise RuntimeError(f"MoE block `{spec.path}` saw no token: the model's forward did not call it")

    def copied(name: str) -> Tensor:
        return observer.get_buffer(name).clone()

    linears = {}
    for projection in spec.projections:
        hessian = observer.get_buffer(f"{projection.name}_hessian")
        linears[projection.name] = LinearStatistics(
            abs_sum=copied(f"{projection.name}_abs_sum"),
            sq_sum=copied(f"{projection.name}_sq_sum"),
            hessian=hessian if hessian.numel() else None,
        )
    return BlockStatistics(
        top_k=int(top_k),
        tokens=int(tokens),
        token_weight_sum=weight_sum,
        count=copied("count"),
        token_mass=copied("token_mass"),
        gate_mass=copied("gate_mass"),
        linears=linears,
        coactivation=copied("coactivation"),
    )


def reset_statistics(observer: MoEGraph) -> None:
    """Sets every accumulator of an observer to zero."""
    for name in observer.meta[ACCUMULATORS]:
        observer.get_buffer(name).zero_()
