"""Lowering: the experts' linears become packed operators, shared experts' linears become packed linears."""

from __future__ import annotations

import copy
from collections.abc import Mapping

from torch import nn
from torch.fx import GraphModule

from moe_compiler.kernels import ops
from moe_compiler.kernels.buffers import FixedDtypeBuffers
from moe_compiler.kernels.experts import PackedExpertLinear
from moe_compiler.kernels.linear import PackedLinear
from moe_compiler.kernels.shared import append_experts
from moe_compiler.passes.absorb import AbsorbSharedExperts, ExtendRouting, SharedExperts, find_shared_experts
from moe_compiler.passes.base import MoEPass, run_passes
from moe_compiler.passes.capture import MoEBlock, trace_experts
from moe_compiler.passes.fuse import FuseExperts, fusible_activation
from moe_compiler.passes.graph import MoEGraph


class LoweredExperts(FixedDtypeBuffers, MoEGraph):
    """The experts of one layer as a graph of packed operators; its buffers are the packed weights and the pools.

    `spec` is the description of the experts it replaces. `meta` keeps the `group_size`, as `"absorbed"` the shared
    experts that run as routed ones, as `"unfused"` the graph with one operator per linear, which an observer can look
    into, and as `"replaced"` the names of the original weights.
    """

    def unfused(self) -> MoEGraph:
        """The same computation with one operator per linear, over the same buffers."""
        return MoEGraph(self, copy.deepcopy(self.meta["unfused"]), type(self).__name__)

    @property
    def num_experts(self) -> int:
        """The number of experts `E`."""
        return int(self.spec.num_experts)

    def packed(self, projection: str) -> PackedExpertLinear:
        """The packed linear `projection` (`"gate_up_proj"`, `"up_proj"` or `"down_proj"`) of the routed experts, by
        reference.
        """
        return self._whole(projection).routed(self.num_experts)

    def all_packed(self) -> dict[str, PackedExpertLinear]:
        """Every packed linear of the routed experts by its projection's name."""
        return {one.name: self.packed(one.name) for one in self.spec.projections}

    def shared_packed(self) -> dict[str, PackedExpertLinear]:
        """Every packed linear of the shared experts that run as routed ones; empty if none do."""
        whole = {one.name: self._whole(one.name) for one in self.spec.projections}
        return {n: one.appended(self.num_experts) for n, one in whole.items() if one.num_experts > self.num_experts}

    def _whole(self, projection: str) -> PackedExpertLinear:
        for one in self.spec.projections:
            if one.name == projection:
                group_size = self.meta["group_size"]
                return PackedExpertLinear.from_module(self, projection, one.in_features, group_size)
        raise KeyError(f"experts `{self.spec.path}` have no linear {projection!r}")


class LowerExperts(MoEPass):
    """Replaces the linears of an experts graph by packed ones.

    Before::

        gate_up_proj = self.gate_up_proj                                     # (E, 2I, H)
        gate_up = expert_linear(hidden_states, expert_ids, gate_up_proj, bias, transposed)

    After (the planes keep the name of the weight; `packed_expert_linear` reads every expert at its own width)::

        gate_up_proj = self.gate_up_proj                                     # int16 planes, flat
        gate_up_proj_table = self.gate_up_proj_table                         # (E, 2)
        ...
        gate_up = packed_expert_linear(hidden_states, expert_ids, [gate_up_proj, gate_up_proj_table, ...], ...)
    """

    def __init__(self, packed: Mapping[str, PackedExpertLinear]) -> None:
        super().__init__()
        self.packed = packed

    def rewrite(self, graph_module: GraphModule) -> int:
        """Replaces the linears, returns how many."""
        graph = graph_module.graph
        linears = [node for node in graph.nodes if node.target == ops.expert_linear]
        for node, (name, packed) in zip(linears, self.packed.items(), strict=True):
            x, expert_ids, weight, bias, _ = node.args
            if hasattr(graph_module, name):
                delattr(graph_module, name)
            buffers = []
            for buffer, tensor in packed.buffers(name).items():
                graph_module.register_buffer(buffer, tensor)
                with graph.inserting_before(node):
                    reuse = buffer == name and weight.op == "get_attr"
                    buffers.append(weight if reuse else graph.get_attr(buffer))
            node.target = ops.packed_expert_linear
            node.args = (x, expert_ids, buffers, bias, packed.group_size)
            if not weight.users:  # stacked from a list of experts by a module of its own
                graph.erase_node(weight)
            if bias is not None and bias.op == "call_module":
                stack = graph_module.get_submodule(bias.target)
                delattr(graph_module, bias.target)
                graph_module.register_parameter(bias.target, nn.Parameter(stack().detach(), requires_grad=False))
                bias.op, bias.args = "get_attr", ()
        return len(linears)

    def requires(self, graph_module: GraphModule) -> None:
        """The graph has one high-precision linear per packed one, which reads the weight of that name."""
        read = [node.args[2].target for node in graph_module.graph.nodes if node.target == ops.expert_linear]
        if read != list(self.packed):
            raise RuntimeError(
                f"the experts graph must read the weights {', '.join(self.packed)} in that order, but reads "
                f"{', '.join(map(str, read))}"
            )

    def ensures(self, graph_module: GraphModule) -> None:
        """No high-precision linear is left."""
        if any(node.target == ops.expert_linear for node in graph_module.graph.nodes):
            raise RuntimeError("a high-precision expert linear is left in the lowered graph")


def lower_experts(block: MoEBlock, packed: Mapping[str, PackedExpertLinear]) -> LoweredExperts:
    """The experts of a captured block as a graph of packed operators, one per linear. The block is left as it is.

    Args:
        block: the captured block, its experts still the model's own.
        packed: the packed linears by projection, in the order of `block.spec.projections`. They may hold more experts
            than the block routes to.
    """
    traced = trace_experts(block.experts, block.spec)
    lowered = LoweredExperts(traced, traced.graph, type(traced).__name__)
    lowered.spec = block.spec
    lowered.meta["group_size"] = next(iter(packed.values())).group_size
    lowered.meta["replaced"] = tuple(name for name, weight in block.experts.named_parameters() if weight.dim() > 1)
    run_passes(lowered, [LowerExperts(packed)])
    lowered.meta["unfused"] = copy.deepcopy(lowered.graph)
    return lowered


def lower_block(
    model: nn.Module,
    block: MoEBlock,
    packed: Mapping[str, PackedExpertLinear],
    shared: Mapping[str, PackedExpertLinear],
) -> LoweredExperts:
    """Puts the lowered block into the model, in place of the original, whose experts nothing refers to afterwards.

    The experts become one operator where they can, and take in the shared experts where those can be (see
    `FuseExperts` and `AbsorbSharedExperts`).

    Args:
        model: the model that `block` was captured from.
        block: the captured block; its graph becomes the model's block.
        packed: the packed linears of the experts by projection.
        shared: the packed linears of shared experts by path in the block, one expert each.

    Returns:
        The lowered experts, now part of the model.
    """
    lowered = lower_experts(block, packed)
    activation = fusible_activation(lowered, block.spec)
    absorbed = None
    if activation is not None and shared:
        absorbed = find_shared_experts(block, activation, lowered.meta["group_size"])
    if absorbed is not None:
        both = zip(packed.items(), absorbed.split(shared), strict=True)
        packed = {name: append_experts(linear, extra) for (name, linear), extra in both}
        shared = {}
    return place_block(model, block, packed, shared, absorbed)


def place_block(
    model: nn.Module,
    block: MoEBlock,
    packed: Mapping[str, PackedExpertLinear],
    shared: Mapping[str, PackedExpertLinear],
    absorbed: SharedExperts | None,
) -> LoweredExperts:
    """What `lower_block` does once it is decided which shared experts run as routed ones; nothing is computed.

    Args:
        model: the model that `block` was captured from; on the meta device if the packed linears are.
        block: the captured block; its graph becomes the model's block.
        packed: the packed linears by projection: of the experts, then of the shared ones in `absorbed`.
        shared: the packed linears of other shared experts by path in the block.
        absorbed: the shared experts that run as routed ones; kept as `meta["absorbed"]` of the result.

    Returns:
        The lowered experts, now part of the model.
    """
    lowered = lower_experts(block, packed)
    lowered.meta["absorbed"] = absorbed
    passes: list[MoEPass] = []
    if fusible_activation(lowered, block.spec) is not None:
        passes.append(FuseExperts(block.spec))
    if absorbed is not None:
        passes.append(ExtendRouting(block.spec.num_experts, absorbed))
        run_passes(block.graph, [AbsorbSharedExperts(block)])
    run_passes(lowered, passes)
    for path, linear in shared.items():
        original = block.graph.get_submodule(path)
        assert isinstance(original, nn.Linear)
        block.graph.set_submodule(path, PackedLinear(linear, original.bias))
    block.graph.set_submodule(block.experts_target, lowered)
    model.set_submodule(block.path, lowered if block.path == block.spec.path else block.graph)
    return lowered
