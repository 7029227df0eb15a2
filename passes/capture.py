"""Capturing the MoE blocks of a model: routers and experts stay modules, the glue becomes nodes."""

from __future__ import annotations

import inspect
import re
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Graph, Node

from moe_compiler.passes.detect import FoundExperts, find_experts, refusal
from moe_compiler.passes.experts import (
    CONTRACT,
    check_canonical,
    expert_bias,
    expert_weight,
    read_spec,
    trace_experts,
)
from moe_compiler.passes.graph import MoEGraph, MoETracer, rename_node, trace_module
from moe_compiler.passes.module_list import dispatched_block, experts_per_token
from moe_compiler.passes.spec import ExpertsSpec, Projection

__all__ = [
    "BlockCall",
    "ExpertsSpec",
    "MoEBlock",
    "Projection",
    "capture_moe_blocks",
    "expert_bias",
    "expert_weight",
    "trace_experts",
]

_GATE_NAME = re.compile(r"(^|_)(gate|router)$")
_TRACE_ERRORS = (
    AttributeError,
    IndexError,
    KeyError,
    NotImplementedError,
    RuntimeError,
    TypeError,
    ValueError,
)


@dataclass(frozen=True)
class BlockCall:
    """How a block is called; its graph is traced for that.

    Attributes:
        ranks: the number of dimensions of each tensor argument, by name.
        none_args: the arguments that are `None`.
    """

    ranks: Mapping[str, int] = field(default_factory=dict)
    none_args: frozenset[str] = frozenset()


@dataclass(frozen=True)
class MoEBlock:
    """One captured MoE block.

    Attributes:
        path: path of the block in the model; that of the experts where the model has no block around them.
        graph: the block as a graph, over the model's own children and parameters. Where there is no block, a
            graph that does nothing but call its one child, `experts`.
        experts_node: name of the node in `graph` that calls the experts, always as
            `(hidden_states (T, H), top_k_index (T, k), top_k_weights (T, k))`.
        spec: the description of the experts.
        shared_linears: paths in the block of the linears of shared experts; routers and gates are not among
            them.
        call: how the block is called.
    """

    path: str
    graph: MoEGraph
    experts_node: str
    spec: ExpertsSpec
    shared_linears: tuple[str, ...]
    call: BlockCall = field(default_factory=BlockCall)

    @property
    def experts_target(self) -> str:
        """Path of the experts in `graph`."""
        return next(str(node.target) for node in self.graph.graph.nodes if node.name == self.experts_node)

    @property
    def experts(self) -> nn.Module:
        """The experts: the model's own, or what has taken their place in `graph`."""
        return self.graph.get_submodule(self.experts_target)


def capture_moe_blocks(
    model: nn.Module,
    example: Mapping[str, Tensor] | Tensor | None = None,
    *,
    calls: Mapping[str, BlockCall] | None = None,
) -> dict[str, MoEBlock]:
    """Capture every MoE block of `model`. Nothing in the model is changed.

    The graphs are for inference: branches on `self.training` are followed as in eval mode. They are dynamic
    in every size. A block is specialised on an optional argument being `None` only where its code depends on
    that; it then refuses any other value.

    A model that holds a MoE block of an unsupported form is refused as a whole, even if others are supported.

    Args:
        model: the model.
        example: token ids `(batch, sequence)`, or the keyword arguments of a forward pass, which is run once
            to see how the blocks are called. Without it, or for a block that it does not reach, the first
            argument of a block counts as `(batch, sequence, features)` and optional arguments as `None`. A
            model on the meta device must be captured without it.
        calls: how blocks are called, by path, where that is known without running an example.

    Returns:
        The blocks by path, in module order.

    Raises:
        ValueError: the model has no MoE block, or has one that cannot be captured: names the model's class,
            the block and the reason.
    """
    found = find_experts(model)
    if example is not None:
        calls = _record_calls(model, found, example)
    calls = calls or {}
    return {one.block_path: _capture(model, one, calls.get(one.block_path)) for one in found}


def _capture(model: nn.Module, found: FoundExperts, call: BlockCall | None) -> MoEBlock:
    block = model.get_submodule(found.block_path)
    call = call or _default_call(block)
    try:
        spec = read_spec(model.get_submodule(found.path), found.path)
        view = dispatched_block(block, found.name) if spec.kind == "list" else block
        graph = _trace_block(view, call) if found.has_block else _bare_graph(block)
        graph.spec = spec
        name = found.name if found.has_block else "experts"
        node = _experts_node(graph, name)
        if spec.kind != "interface":
            check_canonical(graph.get_submodule(name), spec, experts_per_token(block))
    except _TRACE_ERRORS as error:
        raise refusal(model, found.block_path, error) from error
    shared = tuple(_shared_linears(graph, name)) if found.has_block else ()
    return MoEBlock(found.block_path, graph, node.name, spec, shared, call)


def _trace_block(block: nn.Module, call: BlockCall) -> MoEGraph:
    """Trace a block, specialised on `None` arguments only if that makes a difference."""
    if not call.none_args:
        return trace_module(block, ranks=call.ranks)
    special = trace_module(block, ranks=call.ranks, none_args=call.none_args)
    try:
        general = trace_module(block, ranks=call.ranks)
    except _TRACE_ERRORS:
        return special
    same = _structure(general.graph, call.none_args) == _structure(special.graph, call.none_args)
    return general if same else special


def _structure(graph: Graph, none_args: Collection[str]) -> list[tuple[Any, ...]]:
    """Write a graph as a list that can be compared, with the arguments `none_args` as `None`."""
    number: dict[Node, int | None] = {}
    lines: list[tuple[Any, ...]] = []
    for node in graph.nodes:
        is_none = node.op == "placeholder" and node.target in none_args
        if is_none or getattr(node.target, "__name__", "") == "_assert_is_none":
            number[node] = None
        else:
            number[node] = len(lines)
            args = torch.fx.map_arg((node.args, node.kwargs), lambda arg: number[arg])
            lines.append((node.op, node.target, args))
    return lines


def _bare_graph(experts: nn.Module) -> MoEGraph:
    """Make a graph that does nothing but call its child `experts`."""
    root = nn.Module()
    root.training = experts.training
    root.add_module("experts", experts)
    graph = Graph(tracer_cls=MoETracer)
    arguments = tuple(graph.placeholder(name, Tensor) for name in CONTRACT)
    graph.output(graph.call_module("experts", arguments))
    return MoEGraph(root, graph, f"{type(experts).__name__}Block")


def _experts_node(graph: MoEGraph, name: str) -> Node:
    """Find the one node that calls the experts, and bring its arguments in order.

    Raises:
        ValueError: the block does not call its experts once, as `(hidden states, expert index, routing
            weights)`; the message is the reason alone.
    """
    nodes: list[Node] = [n for n in graph.graph.nodes if n.op == "call_module" and n.target == name]
    if len(nodes) != 1:
        raise ValueError(f"its forward must call `{name}` once, but does so {len(nodes)} times")
    node = nodes[0]
    bound = inspect.signature(graph.get_submodule(name).forward).bind(*node.args, **node.kwargs)
    if len(bound.args) != len(CONTRACT) or not all(isinstance(arg, Node) for arg in bound.args):
        raise ValueError(
            f"its forward must call `{name}` with (hidden states, expert index, routing weights), but gives "
            f"it {bound.args}"
        )
    node.args, node.kwargs = bound.args, {}
    for position, argument in enumerate(CONTRACT[1:], start=1):
        producer = node.args[position]
        if isinstance(producer, Node) and producer.op in ("call_function", "call_method"):
            rename_node(producer, argument)
    graph.recompile()
    return node


def _shared_linears(graph: MoEGraph, experts: str) -> Iterator[str]:
    for child_name, child in graph.named_children():
        if "shared" in child_name and child_name != experts:
            for path, module in child.named_modules(prefix=child_name):
                if isinstance(module, nn.Linear) and not _GATE_NAME.search(path):
                    yield path


def _default_call(block: nn.Module) -> BlockCall:
    parameters = inspect.signature(block.forward).parameters
    optional = frozenset(name for name, parameter in parameters.items() if parameter.default is None)
    return BlockCall(dict.fromkeys([*parameters][:1], 3), optional)


def _record_calls(
    model: nn.Module, found: list[FoundExperts], example: Mapping[str, Tensor] | Tensor
) -> dict[str, BlockCall]:
    """Run one forward pass and note how it called each block (the first time)."""
    calls: dict[str, BlockCall] = {}

    def recorder(path: str, signature: inspect.Signature) -> Any:
        def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            bound = signature.bind(*args, **kwargs)
            bound.apply_defaults()
            given = bound.arguments
            ranks = {name: value.dim() for name, value in given.items() if isinstance(value, Tensor)}
            calls.setdefault(path, BlockCall(ranks, frozenset(name for name in given if given[name] is None)))

        return hook

    handles = []
    for one in found:
        block = model.get_submodule(one.block_path)
        hook = recorder(one.block_path, inspect.signature(block.forward))
        handles.append(block.register_forward_pre_hook(hook, with_kwargs=True))
    inputs = {"input_ids": example} if isinstance(example, Tensor) else dict(example)
    try:
        with torch.no_grad(), _eval_mode(model):
            model(**inputs)
    finally:
        for handle in handles:
            handle.remove()
    return calls


@contextmanager
def _eval_mode(model: nn.Module) -> Iterator[None]:
    flags = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in flags:
            module.training = training
