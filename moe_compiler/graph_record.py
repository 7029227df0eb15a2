"""A rewritten graph as plain data: its code, its nodes and its edges, with the graphs inside it taken apart."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch.fx import GraphModule, Node, map_arg
from torch.nn import Module

from moe_compiler.inspection import readable
from moe_compiler.passes.capture import MoEBlock, trace_experts
from moe_compiler.passes.observe import observed_block


@dataclass(frozen=True)
class GraphNode:
    """One node of a graph.

    Attributes:
        name: its name; that of a node of an inner graph begins with the name of the node that calls the graph.
        op: as in `torch.fx`: `"placeholder"`, `"get_attr"`, `"call_function"`, `"call_method"`, `"call_module"`,
            `"output"`.
        target: what it calls or reads: the name of an operator, function or method, the class of a module, the name of
            an attribute or argument.
        inner: the node that calls the graph it lies in; empty in the outer graph.
    """

    name: str
    op: str
    target: str
    inner: str = ""


@dataclass(frozen=True)
class GraphRecord:
    """A graph, to keep or to draw.

    Attributes:
        text: its code and that of the graphs inside it.
        nodes: its nodes in the order they run in.
        edges: pairs of positions in `nodes`: the second reads what the first gives.
    """

    text: str
    nodes: tuple[GraphNode, ...]
    edges: tuple[tuple[int, int], ...]

    def to_dict(self) -> dict[str, Any]:
        """The record as JSON types."""
        nodes = [[node.name, node.op, node.target, node.inner] for node in self.nodes]
        return {"text": self.text, "nodes": nodes, "edges": [list(edge) for edge in self.edges]}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> GraphRecord:
        """Reads what `to_dict` wrote."""
        edges = tuple((source, target) for source, target in data["edges"])
        return cls(data["text"], tuple(GraphNode(*node) for node in data["nodes"]), edges)


def record_graph(graph: GraphModule, inner: Mapping[str, GraphModule] | None = None) -> GraphRecord:
    """Takes a graph down.

    A call of a graph is replaced by that graph's nodes: its placeholders by what it is given, its output by what
    returns it.

    Args:
        graph: the graph.
        inner: by the path of a module in `graph`, a graph of what the module does, where the module itself is none.
    """
    nodes: list[GraphNode] = []
    edges: list[tuple[int, int]] = []

    def add(module: GraphModule, arguments: list[tuple[int, ...]] | None, prefix: str) -> tuple[int, ...]:
        """Adds a graph's nodes; returns the positions of those that give its output."""
        given: dict[Node, tuple[int, ...]] = {}
        rest = list(arguments or ())
        output: tuple[int, ...] = ()
        for node in module.graph.nodes:
            read = _positions(given, node)
            if arguments is not None and node.op == "placeholder":
                given[node] = rest.pop(0) if rest else ()
                continue
            if arguments is not None and node.op == "output":
                output = read
                continue
            if node.op == "call_module":
                called = (inner or {}).get(str(node.target), module.get_submodule(str(node.target)))
                if isinstance(called, GraphModule):
                    sources = [given[one] if isinstance(one, Node) else () for one in node.args]
                    given[node] = add(called, sources, f"{prefix}{node.name}.")
                    continue
            nodes.append(GraphNode(prefix + node.name, node.op, _target(module, node), prefix.rstrip(".")))
            given[node] = (len(nodes) - 1,)
            edges.extend((source, len(nodes) - 1) for source in read)
        return output

    add(graph, None, "")
    return GraphRecord(readable(graph), tuple(nodes), tuple(dict.fromkeys(edges)))


def stages_before(block: MoEBlock) -> dict[str, GraphRecord]:
    """The graphs of a block before it is lowered: captured, and with observers. The block is left as it is."""
    observed, _ = observed_block(block, hessian=False)
    experts = {block.experts_target: trace_experts(block.experts, block.spec)}
    return {"captured": record_graph(block.graph, experts), "observed": record_graph(observed)}


def _positions(given: Mapping[Node, tuple[int, ...]], node: Node) -> tuple[int, ...]:
    found: list[int] = []
    map_arg((node.args, node.kwargs), lambda one: found.extend(given[one]))
    return tuple(dict.fromkeys(found))


def _target(module: GraphModule, node: Node) -> str:
    if node.op == "call_module":
        called: Module = module.get_submodule(str(node.target))
        return type(called).__name__
    if node.op != "call_function":
        return str(node.target)
    name = getattr(node.target, "__name__", str(node.target))
    return name.removesuffix(".default")
