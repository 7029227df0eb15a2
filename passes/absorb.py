"""Absorbing: shared experts join the routed ones, as experts that every token takes, in the same operator."""

from __future__ import annotations

import operator
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node

from moe_compiler.kernels import ops
from moe_compiler.kernels.activation import gated
from moe_compiler.kernels.experts import PackedExpertLinear
from moe_compiler.kernels.shared import split_shared
from moe_compiler.passes.base import MoEPass
from moe_compiler.passes.capture import MoEBlock

_LINEARS = ("gate_proj", "up_proj", "down_proj")
_VIEWS = ("view", "reshape")
_TOLERANCE = {torch.float64: 1e-4, torch.float32: 1e-4}
_LOW_PRECISION_TOLERANCE = 3e-2


@dataclass(frozen=True)
class SharedExperts:
    """Shared experts of a captured block that can run as routed ones.

    Attributes:
        target: path in the block of the MLP.
        gate: path in the block of the linear whose sigmoid weights its output, or `None`.
        copies: into how many experts of the routed size it splits.
    """

    target: str
    gate: str | None
    copies: int

    def split(self, packed: Mapping[str, PackedExpertLinear]) -> tuple[PackedExpertLinear, PackedExpertLinear]:
        """Its packed linears (by path in the block) as the two linears of `copies` experts."""
        gate, up, down = (packed[f"{self.target}.{name}"] for name in _LINEARS)
        return split_shared(gate, up, down, self.copies)


@dataclass(frozen=True)
class _Match:
    """The nodes of a block graph: the call of the shared experts, their gate, the routed output, the sum of both."""

    call: Node
    gate: Node | None
    routed: Node
    total: Node


def find_shared_experts(block: MoEBlock, activation: str, group_size: int) -> SharedExperts | None:
    """The shared experts of a block that `AbsorbSharedExperts` can take in, or `None`.

    They must be one MLP `down(act(gate(x)) · up(x))` without biases, over the same tokens as the experts, whose output
    is added to theirs, as it is or weighted by the sigmoid of a linear. Its intermediate size must be a multiple of the
    experts' own that cuts no group of input channels.

    Args:
        block: the captured block, its shared experts still the model's own.
        activation: that of the experts, as the operators call it.
        group_size: input channels that share a scale.
    """
    match = _match(block)
    if match is None:
        return None
    mlp = block.graph.get_submodule(str(match.call.target))
    gate, up, down = (getattr(mlp, name) for name in _LINEARS)
    size = block.spec.intermediate_size
    copies, rest = divmod(gate.out_features, size)
    shapes = gate.in_features == up.in_features == down.out_features == block.spec.hidden_size
    if not shapes or rest or not copies or (copies > 1 and size % group_size):
        return None
    if any(linear.bias is not None or linear.weight.is_meta for linear in (gate, up, down)):
        return None
    if not _computes(mlp, activation):
        return None
    return SharedExperts(
        target=str(match.call.target), gate=None if match.gate is None else str(match.gate.target), copies=copies
    )


class AbsorbSharedExperts(MoEPass):
    """Takes the shared experts out of a block graph; the experts have them from now on.

    Before::

        shared_expert = self.shared_expert(view)
        experts = self.experts(view, top_k_index, top_k_weights)
        shared_expert_gate = self.shared_expert_gate(view)
        sigmoid = shared_expert_gate.sigmoid()
        mul = sigmoid * shared_expert
        add = experts + mul

    After::

        shared_expert_gate = self.shared_expert_gate(view)
        shared_weights = shared_expert_gate.sigmoid()
        experts = self.experts(view, top_k_index, top_k_weights, shared_weights)
    """

    def __init__(self, block: MoEBlock) -> None:
        super().__init__()
        self.block = block

    def rewrite(self, graph_module: GraphModule) -> int:
        """Rewrites the one sum of routed and shared experts, returns 1 if it was found."""
        match = _match(self.block)
        if match is None:
            return 0
        graph = graph_module.graph
        experts = next(node for node in graph.nodes if node.name == self.block.experts_node)
        if match.gate is not None:
            with graph.inserting_before(experts):
                gate = graph.call_module(str(match.gate.target), (experts.args[0],))
                weights = graph.create_node("call_method", "sigmoid", (gate,), name="shared_weights")
            experts.args = (*experts.args, weights)
        match.total.replace_all_uses_with(match.routed)
        for node in reversed(list(graph.nodes)):
            dead = node is match.call or node is match.gate or node.op in ("call_function", "call_method")
            if dead and not node.users:
                graph.erase_node(node)
        graph_module.delete_submodule(str(match.call.target))
        return 1


class ExtendRouting(MoEPass):
    """Sends every token of a fused experts graph to the shared experts too, which follow the routed ones.

    Before::

        experts = packed_experts(hidden_states, top_k_index, top_k_weights, ...)

    After (`shared_weights` is an argument, or ones)::

        num_tokens = hidden_states.size(0)
        shared_ids = self.shared_ids                                                   # [E, E + 1, ...]
        index = torch.cat([top_k_index, shared_ids.expand(num_tokens, -1)], 1)
        weights = torch.cat([top_k_weights, shared_weights.expand(-1, copies)], 1)
        experts = packed_experts(hidden_states, index, weights, ...)
    """

    def __init__(self, num_experts: int, shared: SharedExperts) -> None:
        super().__init__()
        self.num_experts = num_experts
        self.shared = shared

    def rewrite(self, graph_module: GraphModule) -> int:
        """Extends the routing, returns how many operators there are."""
        graph = graph_module.graph
        operators = [node for node in graph.nodes if node.target == ops.packed_experts]
        copies = self.shared.copies
        for node in operators:
            hidden_states, top_k_index, top_k_weights = node.args[:3]
            ids = torch.arange(self.num_experts, self.num_experts + copies)
            like = graph_module.get_buffer("down_proj")
            graph_module.register_buffer("shared_ids", ids.to(like.device), persistent=False)
            if self.shared.gate is not None:
                with graph.inserting_after(top_k_weights):
                    given = graph.placeholder("shared_weights", Tensor)
            with graph.inserting_before(node):
                tokens = graph.create_node("call_method", "size", (hidden_states, 0), name="num_tokens")
                shared_ids = graph.get_attr("shared_ids")
                ids_of_all = graph.call_method("expand", (shared_ids, tokens, -1))
                if self.shared.gate is not None:
                    alike = graph.call_method("type_as", (given, top_k_weights))
                    ones = graph.call_method("expand", (alike, -1, copies))
                else:
                    ones = graph.call_method("new_ones", (top_k_weights, (tokens, copies)))
                index = graph.call_function(torch.cat, ([top_k_index, ids_of_all], 1))
                weights = graph.call_function(torch.cat, ([top_k_weights, ones], 1))
            node.args = (hidden_states, index, weights, *node.args[3:])
        return len(operators)


def _match(block: MoEBlock) -> _Match | None:
    targets = {path.rpartition(".")[0] for path in block.shared_linears}
    if len(targets) != 1 or {path.rpartition(".")[2] for path in block.shared_linears} != set(_LINEARS):
        return None
    nodes = list(block.graph.graph.nodes)
    calls = [node for node in nodes if node.op == "call_module" and node.target in targets]
    experts = next(node for node in nodes if node.name == block.experts_node)
    if len(calls) != 1 or len(calls[0].args) != 1 or _viewed(calls[0].args[0]) is not _viewed(experts.args[0]):
        return None
    call = calls[0]
    routed, total = _only_user(experts), None
    shared = _only_user(call)
    gate = None
    if shared.user is not None and _is(shared.user, operator.mul, "mul"):
        gate = _sigmoid_of(shared.user, shared.value, _viewed(call.args[0]))
        if gate is None:
            return None
        shared = _only_user(shared.user)
    if routed.user is not None and routed.user is shared.user and _is(routed.user, operator.add, "add"):
        total = routed.user
    return None if total is None else _Match(call, gate, routed.value, total)


@dataclass(frozen=True)
class _Use:
    """A value, seen through views and products with one, and the one node that uses it otherwise, if there is one."""

    value: Node
    user: Node | None


def _only_user(node: Node) -> _Use:
    while len(node.users) == 1:
        user = next(iter(node.users))
        is_one = _is(user, operator.mul, "mul") and 1.0 in user.args
        if not (_is(user, *_VIEWS) and user.args[0] is node) and not is_one:
            return _Use(node, user)
        node = user
    return _Use(node, None)


def _sigmoid_of(product: Node, shared: Node, tokens: Any) -> Node | None:
    """The linear whose sigmoid weights `shared` in `product`, if it reads the same tokens."""
    others: list[Any] = [arg for arg in product.args if arg is not shared]
    if len(others) != 1 or not _is(others[0], torch.sigmoid, nn.functional.sigmoid, "sigmoid"):
        return None
    linear = others[0].args[0]
    alone = all(len(node.users) == 1 for node in (others[0], linear))
    is_linear = isinstance(linear, Node) and linear.op == "call_module" and len(linear.args) == 1
    return linear if is_linear and alone and _viewed(linear.args[0]) is tokens else None


def _is(node: object, *targets: object) -> bool:
    return isinstance(node, Node) and node.op in ("call_function", "call_method") and node.target in targets


def _viewed(node: Any) -> Any:
    """What `node` is a view of."""
    while _is(node, *_VIEWS):
        node = node.args[0]
    return node


@torch.no_grad()
def _computes(mlp: nn.Module, activation: str) -> bool:
    """Whether `mlp` is `down(act(gate(x)) · up(x))`, tried on random tokens."""
    gate, up, down = (getattr(mlp, name) for name in _LINEARS)
    weight = gate.weight
    x = torch.randn(4, gate.in_features, generator=torch.Generator().manual_seed(0)).to(weight)
    expected = down(gated(torch.cat([gate(x), up(x)], dim=-1), activation))
    difference = (mlp(x) - expected).abs().max() / expected.abs().max().clamp(min=torch.finfo(weight.dtype).tiny)
    return bool(difference <= _TOLERANCE.get(weight.dtype, _LOW_PRECISION_TOLERANCE))
