"""The inside of the experts: one graph and one layout of weights for every form a model keeps them in."""

from __future__ import annotations

import inspect
import operator
from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.fx import Graph, Node

from moe_compiler.kernels import ops
from moe_compiler.passes.graph import MoEGraph, rename_node, trace_module
from moe_compiler.passes.module_list import StackedExperts, list_spec, stacked_bias, stacked_weight
from moe_compiler.passes.spec import ExpertsSpec, Projection, make_spec

CONTRACT = ("hidden_states", "top_k_index", "top_k_weights")
"""The arguments of experts: `(T, H)`, `(T, k)` int64 and `(T, k)`, in this order."""

INTERFACE_FLAGS = ("has_gate", "has_bias", "is_transposed", "is_concatenated")
"""What transformers' `use_experts_implementation` sets on every instance; newer versions set one flag more."""

_TOLERANCE = {torch.float64: 1e-4, torch.float32: 1e-4}
_LOW_PRECISION_TOLERANCE = 3e-2


def experts_kind(module: nn.Module) -> Literal["interface", "structural", "list"] | None:
    """Tell in which of the supported forms `module` holds experts, if in any.

    `"interface"`: it has the flags of transformers' `use_experts_implementation`. `"structural"`: it owns
    stacked 3-D weights `down_proj` and `gate_up_proj` or `up_proj` of equally many experts, and its forward
    takes three inputs. `"list"`: it is an `nn.ModuleList` of MLPs with a gate, an up and a down linear.
    """
    if all(flag in module.__dict__ for flag in INTERFACE_FLAGS):
        return "interface"
    if isinstance(module, nn.ModuleList):
        try:
            list_spec(module, "")
        except ValueError:
            return None
        return "list"
    weights = dict(module.named_parameters(recurse=False))
    first = weights.get("gate_up_proj", weights.get("up_proj"))
    second = weights.get("down_proj")
    if first is None or second is None or not first.dim() == second.dim() == 3:
        return None
    if first.shape[0] != second.shape[0] or len(inspect.signature(module.forward).parameters) != len(CONTRACT):
        return None
    return "structural"


def read_spec(experts: nn.Module, path: str) -> ExpertsSpec:
    """Describe experts of a supported form. Sizes come from the weights, not from the model's configuration.

    Args:
        experts: the module.
        path: its path in the model.

    Raises:
        ValueError: the form is not supported or the shapes contradict it; the message is the reason alone.
    """
    kind = experts_kind(experts)
    if kind == "list":
        assert isinstance(experts, nn.ModuleList)
        return list_spec(experts, path)
    if kind is None:
        raise ValueError("it has neither stacked expert weights nor a list of expert MLPs")
    weights = dict(experts.named_parameters(recurse=False))
    known = (*INTERFACE_FLAGS, "has_post_expert_norm")
    flags = {flag: bool(experts.__dict__[flag]) for flag in known if flag in experts.__dict__}
    has_gate = flags.get("has_gate", "gate_up_proj" in weights)
    name = "gate_up_proj" if has_gate else "up_proj"
    if name not in weights or "down_proj" not in weights:
        raise ValueError(f"it has no parameters {name} and down_proj, but {', '.join(weights) or 'none'}")
    first, second = tuple(weights[name].shape), tuple(weights["down_proj"].shape)
    if len(first) != 3 or len(second) != 3:
        raise ValueError(f"{name} {first} and down_proj {second} are not stacked 3-D weights")
    # Without flags, a gate tells the two layouts apart: it doubles the output features of the first linear.
    transposed = flags.get("is_transposed", has_gate and first[1] == second[2] and first[2] == 2 * second[1])
    if transposed:
        first, second = (first[0], first[2], first[1]), (second[0], second[2], second[1])
    return make_spec(
        path,
        kind,
        (first[0], first[1], first[2]),
        (second[0], second[1], second[2]),
        has_gate=has_gate,
        has_bias=flags.get("has_bias", f"{name}_bias" in weights),
        is_transposed=transposed,
        is_concatenated=flags.get("is_concatenated", True),
        has_post_norm=flags.get("has_post_expert_norm", hasattr(experts, "post_expert_norm")),
    )


def expert_weight(experts: nn.Module, spec: ExpertsSpec, projection_name: str) -> Tensor:
    """Return the weights of one linear of all experts in the canonical layout.

    Args:
        experts: the model's experts.
        spec: their description.
        projection_name: which linear.

    Returns:
        `(E, N, K)`. Stacked weights are not copied (a transposed view where the model stores `(E, K, N)`);
        those of a list are, with the gate's rows before the up's.

    Raises:
        ValueError: the experts have no such linear.
    """
    name = spec.projection(projection_name).name
    if spec.kind == "list":
        with torch.no_grad():
            return stacked_weight(experts, name)
    weight = experts.get_parameter(name).detach()
    return weight.transpose(1, 2) if spec.is_transposed else weight


def expert_bias(experts: nn.Module, spec: ExpertsSpec, projection_name: str) -> Tensor | None:
    """Return the biases of one linear of all experts, `(E, N)`, or `None` where it has none.

    Raises:
        ValueError: the experts have no such linear.
    """
    projection = spec.projection(projection_name)
    if projection.bias is None:
        return None
    if spec.kind == "list":
        with torch.no_grad():
            return stacked_bias(experts, projection.name)
    return experts.get_parameter(projection.bias).detach()


def trace_experts(experts: nn.Module, spec: ExpertsSpec) -> MoEGraph:
    """Trace the inside of experts into one graph, the same for every form a model may keep them in.

    ::

        expert_ids = top_k_index.reshape(-1)                                           # (R,), R = T·k
        gate_up = expert_linear(hidden_states, expert_ids, gate_up_proj, bias, ...)    # (R, 2I)
        ... the model's own activation and gate, traced ...                            # (R, I)
        down = expert_linear(activated, expert_ids, down_proj, bias, ...)              # (R, H)
        ... post_expert_norm, where the model has one ...
        weighted = down * top_k_weights.reshape(-1, 1)
        experts_output = weighted.view(num_tokens, top_k, num_features).sum(dim=1)
        return experts_output.type_as(hidden_states)                                   # (T, H)

    The formula is that of transformers' `batched_mm_experts_forward`. Arguments: `hidden_states` `(T, H)`,
    `top_k_index` `(T, k)` int64, `top_k_weights` `(T, k)` of any floating-point dtype.

    Args:
        experts: the model's experts; left as they are.
        spec: their description.

    Returns:
        The graph. Stacked weights are shared with `experts`, under the same names. Those of a list are
        children `gate_up_proj` and `down_proj` that stack them on every call.
    """
    root = StackedExperts(experts, spec) if spec.kind == "list" else experts
    names: dict[Node, str] = {}
    view_class: Any = type(type(root).__name__, (type(root),), {"forward": _canonical_forward(spec, names)})
    view: nn.Module = view_class.__new__(view_class)
    view.__dict__ = root.__dict__
    traced = trace_module(view, ranks=dict.fromkeys(CONTRACT, 2), class_name=type(experts).__name__)
    for node, name in names.items():
        rename_node(node, name)
    _name_halves(traced.graph)
    traced.recompile()
    traced.spec = spec
    return traced


def check_canonical(experts: nn.Module, spec: ExpertsSpec, top_k: int) -> None:
    """Compare the experts' own forward with the canonical graph on random input that hits every expert.

    Args:
        experts: the model's experts; weights on the meta device are not compared.
        spec: their description.
        top_k: how many experts each token of the input is sent to.

    Raises:
        ValueError: they differ by more than 1e-4 of the largest output (3e-2 below float32), or the experts
            fail; the message is the reason alone.
    """
    weight = next(experts.parameters())
    if weight.is_meta:
        return
    top_k = min(top_k, spec.num_experts)
    tokens = -(-spec.num_experts // top_k) + 1
    generator = torch.Generator().manual_seed(0)
    hidden_states = torch.randn(tokens, spec.hidden_size, generator=generator)
    index = (torch.arange(tokens * top_k) % spec.num_experts).view(tokens, top_k)
    weights = torch.rand(tokens, top_k, generator=generator)
    inputs = (hidden_states.to(weight), index.to(weight.device), weights.to(weight))
    with torch.no_grad():
        try:
            expected = experts(*inputs)
        except (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError) as error:
            raise ValueError(f"it fails on (hidden states, expert index, routing weights): {error}") from error
        difference = (trace_experts(experts, spec)(*inputs) - expected).abs().max() / expected.abs().max()
    if not difference <= _TOLERANCE.get(weight.dtype, _LOW_PRECISION_TOLERANCE):
        raise ValueError(
            "it does not compute the common formula (up, activation, down, weighted sum): on random input "
            f"the two differ by {float(difference):.1e} of the largest output"
        )


def _canonical_forward(spec: ExpertsSpec, names: dict[Node, str]) -> Callable[..., Any]:
    """Make the forward that `trace_experts` traces; when run, it notes in `names` what to call its nodes."""
    first, second = spec.projections

    def named(proxy: Any, name: str) -> Any:
        names[proxy.node] = name
        return proxy

    def linear(self: Any, x: Any, expert_ids: Any, projection: Projection) -> Any:
        bias = getattr(self, projection.bias) if projection.bias else None
        weight = getattr(self, projection.name)
        if isinstance(weight, nn.Module):
            weight = weight()
        args = (x, expert_ids, weight, bias, spec.is_transposed)
        # The overload itself, not the packet of overloads that calling it would record: passes match on it.
        out = expert_ids.tracer.create_proxy("call_function", ops.expert_linear, args, {})
        return named(out, projection.name.removesuffix("_proj"))

    def forward(self: Any, hidden_states: Any, top_k_index: Any, top_k_weights: Any) -> Any:
        tokens, features = hidden_states.shape
        top_k = named(top_k_index.shape[1], "top_k")
        expert_ids = named(top_k_index.reshape(-1), "expert_ids")
        gate_up = linear(self, hidden_states, expert_ids, first)
        if not spec.has_gate:
            active = self.act_fn(gate_up)
        elif hasattr(self, "_apply_gate"):
            active = self._apply_gate(gate_up)
        else:
            gate, up = gate_up.chunk(2, dim=-1)
            active = self.act_fn(gate) * up
        if active.node.op != "call_module":
            named(active, "activated")
        down = linear(self, active, expert_ids, second)
        if spec.has_post_norm:
            down = self.post_expert_norm(down)
        weighted = named(down * named(top_k_weights.reshape(-1, 1), "routing_weights"), "weighted")
        per_token = weighted.view(named(tokens, "num_tokens"), top_k, named(features, "num_features"))
        return named(per_token.sum(dim=1), "experts_output").type_as(hidden_states)

    forward.__annotations__ = dict.fromkeys((*CONTRACT, "return"), Tensor)
    return forward


def _name_halves(graph: Graph) -> None:
    """Call the two halves of `gate_up.chunk(2)` what they are."""
    halves = [
        (node, ("gate", "up")[node.args[1]])
        for node in graph.nodes
        if node.target is operator.getitem and node.args[0].target == "chunk" and node.args[1] in (0, 1)
    ]
    for node, name in halves:
        rename_node(node, name)
