"""What the run time needs in a lowered graph: a routing histogram, and where a forward pass begins and ends."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from dataclasses import replace

import torch
from torch.fx import GraphModule, Node

from moe_compiler.kernels import ops
from moe_compiler.passes.base import MoEPass, run_passes
from moe_compiler.passes.capture import MoEBlock
from moe_compiler.passes.graph import MoEGraph
from moe_compiler.passes.lower import LoweredExperts

HISTOGRAM = "routing_histogram"
MARKER = "forward_marker"
PLAIN = "plain_experts"
_RECORDERS = (ops.record_routing_, ops.begin_forward, ops.end_forward_)


class RecordRouting(MoEPass):
    """Keeps a decayed histogram of the experts that tokens are routed to.

    Before::

        experts = packed_experts(hidden_states, top_k_index, top_k_weights, ...)

    After (the histogram is a non-persistent buffer, `(E + 1,)` float32)::

        routing_histogram = self.routing_histogram
        record_routing = record_routing_(routing_histogram, top_k_index, 0.9995)
        experts = packed_experts(hidden_states, top_k_index, top_k_weights, ...)

    Args:
        num_experts: `E`, without appended shared experts.
        decay: what one more token multiplies the weight of those before it with.
        device: where the experts are.
    """

    def __init__(self, num_experts: int, decay: float, device: torch.device) -> None:
        super().__init__()
        self.num_experts = num_experts
        self.decay = decay
        self.device = device

    def requires(self, graph_module: GraphModule) -> None:
        """The graph records nothing yet."""
        if any(node.target == ops.record_routing_ for node in graph_module.graph.nodes):
            raise RuntimeError(f"the experts graph of {graph_module._get_name()} records its routing already")

    def rewrite(self, graph_module: GraphModule) -> int:
        """Inserts the recorder, returns 1."""
        _, top_k_index, *_ = _placeholders(graph_module)
        zeros = torch.zeros(self.num_experts + 1, dtype=torch.float32, device=self.device)
        graph_module.register_buffer(HISTOGRAM, zeros, persistent=False)
        graph = graph_module.graph
        with graph.inserting_after(_placeholders(graph_module)[-1]):
            histogram = graph.get_attr(HISTOGRAM)
        with graph.inserting_after(histogram):
            arguments = (histogram, top_k_index, self.decay)
            graph.create_node("call_function", ops.record_routing_, arguments, name="record_routing")
        return 1


class BeginForward(MoEPass):
    """Marks a layer's experts as the first of a forward pass.

    Before::

        experts = packed_experts(hidden_states, top_k_index, top_k_weights, ...)

    After::

        begin_forward = begin_forward(top_k_index, 3)                            # (T, k), a copy
        experts = packed_experts(hidden_states, begin_forward, top_k_weights, ...)
    """

    def __init__(self, lock: int) -> None:
        super().__init__()
        self.lock = lock

    def rewrite(self, graph_module: GraphModule) -> int:
        """Inserts the operator before all that reads the routing, returns 1."""
        _, top_k_index, *_ = _placeholders(graph_module)
        graph = graph_module.graph
        with graph.inserting_after(_placeholders(graph_module)[-1]):
            begin = graph.create_node(
                "call_function", ops.begin_forward, (top_k_index, self.lock), name="begin_forward"
            )
        top_k_index.replace_all_uses_with(begin, delete_user_cb=lambda user: user is not begin)
        return 1


class EndForward(MoEPass):
    """Marks a layer's experts as the last of a forward pass.

    Before::

        experts = packed_experts(hidden_states, top_k_index, top_k_weights, ...)
        return experts

    After (the marker is a non-persistent buffer that nothing reads)::

        experts = packed_experts(hidden_states, top_k_index, top_k_weights, ...)
        forward_marker = self.forward_marker
        end_forward = end_forward_(forward_marker, experts, 3)
        return experts
    """

    def __init__(self, lock: int, device: torch.device) -> None:
        super().__init__()
        self.lock = lock
        self.device = device

    def rewrite(self, graph_module: GraphModule) -> int:
        """Inserts the operator before the output, returns 1."""
        marker = torch.zeros(1, dtype=torch.uint8, device=self.device)
        graph_module.register_buffer(MARKER, marker, persistent=False)
        graph = graph_module.graph
        output = graph.output_node()
        with graph.inserting_before(output):
            arguments = (graph.get_attr(MARKER), output.args[0], self.lock)
            graph.create_node("call_function", ops.end_forward_, arguments, name="end_forward")
        return 1


class RemoveRecorders(MoEPass):
    """Takes out what the other passes of this file put in: their inverse, to the letter of the code.

    Before::

        record_routing = record_routing_(routing_histogram, top_k_index, 0.9995)
        begin_forward = begin_forward(top_k_index, 3)
        experts = packed_experts(hidden_states, begin_forward, top_k_weights, ...)
        end_forward = end_forward_(forward_marker, experts, 3)

    After::

        experts = packed_experts(hidden_states, top_k_index, top_k_weights, ...)
    """

    def rewrite(self, graph_module: GraphModule) -> int:
        """Removes the operators, returns how many there were."""
        graph = graph_module.graph
        found = [node for node in graph.nodes if node.target in _RECORDERS]
        for node in found:
            if node.target == ops.begin_forward:
                node.replace_all_uses_with(node.args[0])
            buffers = [one for one in node.all_input_nodes if one.op == "get_attr"]
            graph.erase_node(node)
            for buffer in buffers:
                graph.erase_node(buffer)
        return len(found)


def record_blocks(blocks: Iterable[MoEBlock], *, lock: int, decay: float) -> None:
    """Makes lowered blocks record their routing, and the first and the last of them begin and end a forward pass.

    Args:
        blocks: lowered blocks of one model, in the order in which a forward pass calls them.
        lock: the number of the lock that a forward pass holds.
        decay: of the histograms, per token.
    """
    layers = [_lowered(block) for block in blocks]
    for number, experts in enumerate(layers):
        device = next(experts.buffers()).device
        passes: list[MoEPass] = [RecordRouting(experts.num_experts, decay, device)]
        if number == 0:
            passes.append(BeginForward(lock))
        if number == len(layers) - 1:
            passes.append(EndForward(lock, device))
        run_passes(experts, passes)


def plain_block(block: MoEBlock) -> MoEBlock:
    """The same block, over the same tensors, whose experts record nothing and take no lock: to observe it by."""
    experts = _lowered(block)
    plain = LoweredExperts(experts, copy.deepcopy(experts.graph), type(experts).__name__)
    plain.meta.update(experts.meta)
    run_passes(plain, [RemoveRecorders()])
    for name in (HISTOGRAM, MARKER):
        plain._buffers.pop(name, None)
        plain._non_persistent_buffers_set.discard(name)
    graph = MoEGraph(block.graph, copy.deepcopy(block.graph.graph), type(block.graph).__name__)
    graph.add_submodule(PLAIN, plain)
    next(node for node in graph.graph.nodes if node.name == block.experts_node).target = PLAIN
    graph.recompile()
    return replace(block, graph=graph)


def _lowered(block: MoEBlock) -> LoweredExperts:
    experts = block.experts
    assert isinstance(experts, LoweredExperts)
    return experts


def _placeholders(graph_module: GraphModule) -> list[Node]:
    """The arguments: tokens, experts of each token, their weights, and more where there are shared experts."""
    return [node for node in graph_module.graph.nodes if node.op == "placeholder"]
