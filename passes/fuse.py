"""Fusing: both packed linears of an experts graph, the activation between and the weighted sum in one operator."""

from __future__ import annotations

import operator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from moe_compiler.kernels import ops
from moe_compiler.kernels.activation import ACTIVATIONS
from moe_compiler.passes.base import MoEPass
from moe_compiler.passes.spec import ExpertsSpec


@dataclass(frozen=True)
class _Match:
    """The nodes of a graph that one operator can take the place of."""

    gate_up: Node
    down: Node
    activation: str


class FuseExperts(MoEPass):
    """Replaces all of an experts graph by one operator, where the operator computes the same.

    Before::

        expert_ids = top_k_index.reshape(-1)
        gate_up = packed_expert_linear(hidden_states, expert_ids, [gate_up_proj, ...], bias, ...)
        chunk = gate_up.chunk(2, dim=-1)
        act_fn = self.act_fn(chunk[0])
        activated = act_fn * chunk[1]
        down = packed_expert_linear(activated, expert_ids, [down_proj, ...], bias, ...)
        ... routing weights, sum over k ...

    After::

        experts_output = packed_experts(hidden_states, top_k_index, top_k_weights, [gate_up_proj, ...], bias,
                                        [down_proj, ...], bias, "silu", ...)

    The operator sums in float32 where the unfused graph rounds after every step.
    """

    def __init__(self, spec: ExpertsSpec) -> None:
        super().__init__()
        self.spec = spec

    def rewrite(self, graph_module: GraphModule) -> int:
        """Fuses the graph, returns 1 if it could be."""
        match = _match(graph_module, self.spec)
        if match is None:
            return 0
        graph = graph_module.graph
        hidden_states, top_k_index, top_k_weights = (node for node in graph.nodes if node.op == "placeholder")
        output = graph.output_node()
        with graph.inserting_before(output):
            fused = graph.create_node(
                "call_function",
                ops.packed_experts,
                (
                    hidden_states, top_k_index, top_k_weights, *match.gate_up.args[2:4], *match.down.args[2:4],
                    match.activation, match.down.args[4],
                ),
                name="experts",
            )  # fmt: skip
        output.args = (fused,)
        graph.eliminate_dead_code()
        return 1

    def ensures(self, graph_module: GraphModule) -> None:
        """No packed linear is left beside the operator."""
        if any(node.target == ops.packed_expert_linear for node in graph_module.graph.nodes):
            raise RuntimeError(f"a packed linear is left in the fused experts graph of `{self.spec.path}`")


def fusible_activation(graph_module: GraphModule, spec: ExpertsSpec) -> str | None:
    """The activation of a lowered experts graph that one operator can take the place of, or `None`.

    It cannot for experts without a gate, with gate and up rows that alternate, with a gate of the model's own, with a
    normalisation after the experts, or with an activation that the operator does not know.
    """
    match = _match(graph_module, spec)
    return None if match is None else match.activation


def _match(graph_module: GraphModule, spec: ExpertsSpec) -> _Match | None:
    linears = [node for node in graph_module.graph.nodes if node.target == ops.packed_expert_linear]
    if len(linears) != 2 or not spec.has_gate or spec.has_post_norm:
        return None
    gate_up, down = linears
    activated = down.args[0]
    if not _is_call(activated, operator.mul, torch.mul, "mul") or len(gate_up.users) != 1:
        return None
    act, up = activated.args
    gate = act.args[0] if isinstance(act, Node) and len(act.args) == 1 and not act.kwargs else None
    if not (_is_half(gate, gate_up, 0) and _is_half(up, gate_up, 1)):
        return None
    activation = _activation(graph_module, act)
    return None if activation is None else _Match(gate_up, down, activation)


def _is_call(node: object, *targets: object) -> bool:
    return isinstance(node, Node) and node.op in ("call_function", "call_method") and node.target in targets


def _is_half(node: object, gate_up: Node, half: int) -> bool:
    """Whether `node` is `gate_up.chunk(2, dim=-1)[half]`."""
    if not isinstance(node, Node) or not _is_call(node, operator.getitem) or node.args[1] != half:
        return False
    chunk = node.args[0]
    if not isinstance(chunk, Node) or not _is_call(chunk, "chunk", torch.chunk) or chunk.args[0] is not gate_up:
        return False
    arguments = {**dict(zip(("chunks", "dim"), chunk.args[1:], strict=False)), **chunk.kwargs}
    return arguments == {"chunks": 2, "dim": -1}


def _activation(graph_module: GraphModule, node: Node) -> str | None:
    """The operator's name for the activation that `node` calls, found by trying it; `None` if it has none."""
    if node.op == "call_module":
        module = graph_module.get_submodule(str(node.target))
        if any(True for _ in module.parameters()):
            return None
        function = module
    elif node.op == "call_function":
        function = node.target  # type: ignore[assignment]
    else:
        return None
    probe = torch.cat([torch.linspace(-12, 12, 481), torch.tensor([-1e4, -100.0, 100.0, 1e4])])
    with torch.no_grad():
        result: Tensor = function(probe)
    for name, known in ACTIVATIONS.items():
        if torch.allclose(result, known(probe), rtol=1e-6, atol=1e-6):
            return name
    return None
