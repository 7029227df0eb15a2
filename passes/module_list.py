"""Experts in the older form: an `nn.ModuleList` of MLPs that a method of the block loops over.

The form of DeepSeek-MoE's published code (`modeling_deepseek.py` of deepseek-ai/deepseek-moe-16b-base): in
inference `forward` calls `self.moe_infer(hidden_states, flat_index, flat_weights)`, whose loop runs over
slices of data-dependent size and so cannot be traced. The call becomes a leaf, `DispatchedExperts`, with the
contract of stacked experts.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from types import FunctionType
from typing import Any

import torch
from torch import Tensor, nn

from moe_compiler.passes.spec import ExpertsSpec, make_spec

LINEAR_NAMES = (("gate_proj", "up_proj", "down_proj"), ("w1", "w3", "w2"))
_ACTIVATION_NAMES = ("act_fn", "activation_fn", "act", "activation")
_MODULE_ATTRIBUTES = frozenset(nn.Module().__dict__)


def expert_linears(expert: nn.Module) -> tuple[nn.Linear, nn.Linear, nn.Linear]:
    """Return the gate, up and down linear of one expert.

    Raises:
        ValueError: the expert is no MLP of this form; the message is the reason alone.
    """
    for names in LINEAR_NAMES:
        gate, up, down = (getattr(expert, name, None) for name in names)
        if isinstance(gate, nn.Linear) and isinstance(up, nn.Linear) and isinstance(down, nn.Linear):
            return gate, up, down
    forms = " or ".join(", ".join(names) for names in LINEAR_NAMES)
    raise ValueError(
        f"its experts are an nn.ModuleList of {type(expert).__name__}, which has no nn.Linear children {forms}"
    )


def list_spec(experts: nn.ModuleList, path: str) -> ExpertsSpec:
    """Describe a list of expert MLPs.

    Raises:
        ValueError: the experts differ in shape or are no MLPs of this form; the message is the reason alone.
    """
    shapes, biases = set(), set()
    for expert in experts:
        gate, up, down = expert_linears(expert)
        if gate.weight.shape != up.weight.shape:
            raise ValueError(f"gate {tuple(gate.weight.shape)} and up {tuple(up.weight.shape)} differ in shape")
        shapes.add((2 * gate.out_features, gate.in_features, down.out_features, down.in_features))
        biases |= {linear.bias is not None for linear in (gate, up, down)}
    if len(shapes) != 1 or len(biases) != 1:
        raise ValueError("its experts differ in shape, or only some of their linears have a bias")
    width, hidden, out_features, in_features = shapes.pop()
    return make_spec(
        path,
        "list",
        (len(experts), width, hidden),
        (len(experts), out_features, in_features),
        has_bias=biases.pop(),
    )


def stacked_weight(experts: nn.Module, name: str) -> Tensor:
    """Copy the weights of all experts into one tensor.

    Args:
        experts: the list.
        name: `"gate_up_proj"` (the gate's rows, then the up's) or `"down_proj"`.

    Returns:
        `(E, N, K)`.
    """
    return torch.stack([_joined(expert, name, lambda linear: linear.weight) for expert in experts.children()])


def stacked_bias(experts: nn.Module, name: str) -> Tensor:
    """Copy the biases of all experts into one tensor, `(E, N)`; rows as in `stacked_weight`."""
    return torch.stack([_joined(expert, name, lambda linear: linear.bias) for expert in experts.children()])


def _joined(expert: nn.Module, name: str, read: Callable[[nn.Linear], Tensor]) -> Tensor:
    gate, up, down = expert_linears(expert)
    return read(down) if name == "down_proj" else torch.cat([read(gate), read(up)])


class StackedWeight(nn.Module):
    """Stacks the weights of a list anew on every call: never more than one layer's copy is alive."""

    def __init__(self, experts: nn.Module, name: str) -> None:
        super().__init__()
        self.experts = nn.ModuleList(experts.children())
        self.name = name

    def forward(self) -> Tensor:
        """Return the weights, `(E, N, K)`."""
        return stacked_weight(self.experts, self.name)


class StackedExperts(nn.Module):
    """A list of experts in the layout of stacked ones, for tracing.

    Weights are children `gate_up_proj` and `down_proj` that stack on call; biases are parameters, copied.
    `act_fn` is the first expert's, as the experts of one layer share it.
    """

    def __init__(self, experts: nn.Module, spec: ExpertsSpec) -> None:
        super().__init__()
        self.act_fn = activation(next(experts.children()))
        for projection in spec.projections:
            self.add_module(projection.name, StackedWeight(experts, projection.name))
            if projection.bias:
                bias = stacked_bias(experts, projection.name).detach()
                self.register_parameter(projection.bias, nn.Parameter(bias, requires_grad=False))


def activation(expert: nn.Module) -> Callable[[Tensor], Tensor]:
    """Return the activation function of an expert MLP.

    Raises:
        ValueError: no attribute of the expert names one; the message is the reason alone.
    """
    for name in _ACTIVATION_NAMES:
        found = getattr(expert, name, None)
        if callable(found):
            return found  # type: ignore[no-any-return]
    names = ", ".join(_ACTIVATION_NAMES)
    raise ValueError(f"its expert {type(expert).__name__} has no activation under any of the names {names}")


class DispatchedExperts(nn.ModuleList):
    """A list of experts that is called like stacked experts, through the block's own dispatch method.

    The children keep their names, so the keys of `state_dict` stay the same. The method runs on a stand-in
    for the
    block: of the block's class, with its plain attributes, and of its modules only this list.

    Args:
        experts: the list of expert MLPs.
        block: the block that the list belongs to.
        name: the list's name in the block.
        method: the name of the dispatch method, `(hidden_states, index, weights) -> hidden_states`.

    Attributes:
        index_rank: 1 if the method wants the index as `(T·k,)`, 2 if as `(T, k)`.
        weights_rank: 1 if the method wants the weights as `(T·k,)`; otherwise as `(T·k, 1)` where the index
            is flat, and as `(T, k)` where it is not.
    """

    def __init__(self, experts: nn.ModuleList, block: nn.Module, name: str, method: str) -> None:
        super().__init__(experts)
        self.training = block.training
        self.block_class = type(block)
        self.block_attributes = {k: v for k, v in block.__dict__.items() if k not in _MODULE_ATTRIBUTES}
        self.list_name = name
        self.method = method
        self.index_rank = 2
        self.weights_rank = 2

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """Run the experts.

        Args:
            hidden_states: `(T, H)`.
            top_k_index: `(T, k)` int64.
            top_k_weights: `(T, k)`.

        Returns:
            `(T, H)`.
        """
        block = self.block_class.__new__(self.block_class)
        nn.Module.__init__(block)
        block.__dict__.update(self.block_attributes)
        block.training = False
        block.add_module(self.list_name, self)
        if self.index_rank == 1:
            top_k_index = top_k_index.reshape(-1)
        if self.weights_rank == 1:
            top_k_weights = top_k_weights.reshape(-1)
        elif self.index_rank == 1:
            top_k_weights = top_k_weights.reshape(-1, 1)
        result: Tensor = getattr(block, self.method)(hidden_states, top_k_index, top_k_weights)
        return result


def dispatched_block(block: nn.Module, name: str) -> nn.Module:
    """Make a view of a block in which the call of its dispatch method is a call of its list of experts.

    Where the block flattens the index to `(T·k,)` and the weights to `(T·k, 1)` or `(T·k,)` first, the view
    brings both back to `(T, k)` before the call, and the list flattens them again: whoever reads the graph
    sees one contract.

    Args:
        block: the block; left as it is.
        name: the list's name in the block.

    Returns:
        A module with the same attributes and children; tracing it records one call of the child `name`.

    Raises:
        ValueError: there is no dispatch method, or more than one; the message is the reason alone.
    """
    methods = _dispatch_methods(type(block), name)
    if len(methods) != 1:
        what = f"there are several: {', '.join(methods)}" if methods else f"it loops over `{name}` itself"
        raise ValueError(
            "its experts are an nn.ModuleList, so its forward must leave the loop over them to one other "
            f"method, but {what}"
        )
    experts = DispatchedExperts(getattr(block, name), block, name, methods[0])

    def dispatch(self: nn.Module, hidden_states: Any, index: Any, weights: Any) -> Any:
        experts.index_rank = 1 if getattr(index, "rank", None) == 1 else 2
        experts.weights_rank = 1 if getattr(weights, "rank", None) == 1 else 2
        if experts.index_rank == 1:
            index = index.reshape(hidden_states.size(0), -1)
        if 1 in (experts.index_rank, experts.weights_rank):
            weights = weights.reshape(hidden_states.size(0), -1)
        return experts(hidden_states, index, weights)

    view_class: Any = type(type(block).__name__, (type(block),), {methods[0]: dispatch})
    view: nn.Module = view_class.__new__(view_class)
    view.__dict__.update(block.__dict__)
    view.__dict__["_modules"] = {**block._modules, name: experts}
    return view


def experts_per_token(block: nn.Module) -> int:
    """Read how many experts a block sends a token to: from it, its children or its configuration, else 2."""
    for owner in (block, *block.children(), getattr(block, "config", None)):
        for name in ("num_experts_per_tok", "top_k"):
            found = getattr(owner, name, None)
            if isinstance(found, int):
                return found
    return 2


def _dispatch_methods(block_class: type[nn.Module], name: str) -> list[str]:
    """List the methods that `forward` mentions and that, by themselves or through others, use `self.<name>`."""

    def functions(attribute: str) -> Iterator[FunctionType]:
        for base in block_class.__mro__:
            function = base.__dict__.get(attribute)
            function = inspect.unwrap(function) if callable(function) else None
            if isinstance(function, FunctionType):
                yield function

    def uses(attribute: str, seen: set[str]) -> bool:
        mentioned = {word for function in functions(attribute) for word in function.__code__.co_names}
        return name in mentioned or any(uses(word, seen | mentioned) for word in mentioned - seen)

    forward: Any = inspect.unwrap(block_class.forward)
    return [word for word in forward.__code__.co_names if uses(word, {word, "forward"})]
