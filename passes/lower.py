"""Lowering: the experts' linears become packed operators, shared experts' linears become packed linears."""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn
from torch.fx import GraphModule

from moe_compiler.kernels import ops
from moe_compiler.kernels.buffers import FixedDtypeBuffers
from moe_compiler.kernels.experts import PackedExpertLinear
from moe_compiler.kernels.linear import PackedLinear
from moe_compiler.passes.base import MoEPass, run_passes
from moe_compiler.passes.capture import MoEBlock, trace_experts
from moe_compiler.passes.graph import MoEGraph


class LoweredExperts(FixedDtypeBuffers, MoEGraph):
    """The experts of one layer as a graph of packed operators; its buffers are the packed weights and the pools.

    `group_size` is kept in `meta`, and `spec` is the description of the experts it replaces.
    """

    @property
    def num_experts(self) -> int:
        """The number of experts `E`."""
        return int(self.spec.num_experts)

    def packed(self, projection: str) -> PackedExpertLinear:
        """The packed linear `projection` (`"gate_up_proj"`, `"up_proj"` or `"down_proj"`), by reference."""
        for one in self.spec.projections:
            if one.name == projection:
                group_size = self.meta["group_size"]
                return PackedExpertLinear.from_module(self, projection, one.in_features, group_size)
        raise KeyError(f"experts `{self.spec.path}` have no linear {projection!r}")

    def all_packed(self) -> dict[str, PackedExpertLinear]:
        """Every packed linear by its projection's name."""
        return {one.name: self.packed(one.name) for one in self.spec.projections}


class LowerExperts(MoEPass):
    """Replaces the linears of an experts graph by packed ones.

    Before::

        gate_up_proj = self.gate_up_proj                                     # (E, 2I, H)
        gate_up = expert_linear(hidden_states, expert_ids, gate_up_proj, bias, transposed)

    After (the planes keep the name of the weight; `packed_expert_linear` reads every expert at its own width)::

        gate_up_proj = self.gate_up_proj                                     # int16 planes, flat
        gate_up_proj_table = self.gate_up_proj_table                         # (E, 2)
        ...
        gate_up = packed_expert_linear(hidden_states, expert_ids, gate_up_proj, gate_up_proj_table, ...)
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
            planes, table, scale, zero_point, *pool = buffers
            node.target = ops.packed_expert_linear
            node.args = (
                x, expert_ids, planes, table, scale, zero_point, bias, *pool, packed.group_size,
            )  # fmt: skip
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
    """The experts of a captured block as a graph of packed operators. The block is left as it is.

    Args:
        block: the captured block, its experts still the model's own.
        packed: the packed linears by projection, in the order of `block.spec.projections`.
    """
    traced = trace_experts(block.experts, block.spec)
    lowered = LoweredExperts(traced, traced.graph, type(traced).__name__)
    lowered.spec = block.spec
    lowered.meta["group_size"] = next(iter(packed.values())).group_size
    run_passes(lowered, [LowerExperts(packed)])
    return lowered


def lower_block(
    model: nn.Module,
    block: MoEBlock,
    packed: Mapping[str, PackedExpertLinear],
    shared: Mapping[str, PackedExpertLinear],
) -> LoweredExperts:
    """Puts the lowered block into the model, in place of the original, whose experts nothing refers to afterwards.

    Args:
        model: the model that `block` was captured from.
        block: the captured block; its graph becomes the model's block.
        packed: the packed linears of the experts by projection.
        shared: the packed linears of shared experts by path in the block, one expert each.

    Returns:
        The lowered experts, now part of the model.
    """
    lowered = lower_experts(block, packed)
    for path, linear in shared.items():
        original = block.graph.get_submodule(path)
        assert isinstance(original, nn.Linear)
        block.graph.set_submodule(path, PackedLinear(linear, original.bias))
    block.graph.set_submodule(block.experts_target, lowered)
    model.set_submodule(block.path, lowered if block.path == block.spec.path else block.graph)
    return lowered
