"""The rewritten graphs of a MoE block, drawn."""

from __future__ import annotations

from collections.abc import Hashable

import networkx as nx
from matplotlib.figure import Figure as Canvas
from matplotlib.patches import FancyBboxPatch, Patch

from moe_compiler.graph_record import GraphNode, GraphRecord
from moe_compiler.report.figure import OKABE_ITO, Figure, Text, canvas, finish
from moe_compiler.report.layout import layered_layout

_ROW = 0.68
_CHARACTER = 0.072
_LINE, _INNER = "#666666", "#000000"
_KINDS = {
    "tensors": ("tensors that it reads", "#e4e4e4"),
    "module": ("module", OKABE_ITO[5]),
    "operator": ("operator of this package", OKABE_ITO[1]),
    "observer": ("observer or recorder", OKABE_ITO[3]),
    "plain": ("function, method, argument", "#ffffff"),
}
_CAPTIONS = {
    "captured": "as it was captured from the model, with its experts traced",
    "observed": "with the observer that collects the statistics of DynaMo's section III-A before the experts",
    "lowered": "as it runs now, with packed operators in place of the experts",
}


def block_graph(path: str, stage: str, record: GraphRecord) -> Figure:
    """One graph of a MoE block as boxes and arrows.

    Args:
        path: the block.
        stage: `"captured"`, `"observed"` or `"lowered"`.
        record: its graph.
    """
    graph, label, kind = drawable(record)
    width = {node: _CHARACTER * max(map(len, text.splitlines())) + 0.22 for node, text in label.items()}
    places, routes = layered_layout(graph, width, gap=0.16)
    calls = list(dict.fromkeys(node.inner for node in record.nodes if node.inner))
    inner = {box for box in graph if record.nodes[box[1] if isinstance(box, tuple) else box].inner}
    bends = [x for route in routes.values() for x, _ in route]
    left = min(*bends, *(places[node][0] - width[node] / 2 for node in graph))
    right = max(*bends, *(places[node][0] + width[node] / 2 for node in graph))
    rows = 1 + max(-y for _, y in places.values())
    size = (max(5.0, right - left + 0.3), _ROW * rows + 0.7)
    with canvas(*size) as picture:
        _draw(picture, (left, right, rows), places, routes, width, label, kind, inner)
        used = [name for name in _KINDS if name in kind.values()]
        handles = [Patch(facecolor=_KINDS[n][1], edgecolor=_LINE, label=_KINDS[n][0]) for n in used]
        columns = max(1, min(len(handles), int(size[0] / 2.2)))
        picture.legend(handles=handles, loc="outside upper center", ncols=columns, fontsize=8)
        return finish(
            picture,
            Text(
                f"graph-{stage}",
                f"Graph, {stage}",
                f"The graph of MoE block {path} {_CAPTIONS.get(stage, stage)}. Data flow downwards; "
                + (f"heavy frames are what the graph inside the node {', '.join(calls)} does. " if calls else "")
                + "Nodes that only read the size of a tensor are left out.",
                f"A directed graph of {len(graph)} boxes.",
            ),
        )


def drawable(record: GraphRecord) -> tuple[nx.DiGraph, dict[Hashable, str], dict[Hashable, str]]:
    """A graph to draw: sizes left out, and the tensors that a node reads put into one box.

    Returns:
        The graph, and by node its label and its kind.
    """
    hidden = {i for i, node in enumerate(record.nodes) if node.op == "call_method" and node.target in ("size", "dim")}
    tensors = {i for i, node in enumerate(record.nodes) if node.op == "get_attr"}
    graph = nx.DiGraph()
    label: dict[Hashable, str] = {}
    kind: dict[Hashable, str] = {}
    for i, node in enumerate(record.nodes):
        if i not in hidden and i not in tensors:
            graph.add_node(i)
            label[i] = _label(node)
            kind[i] = _kind(node)
    read: dict[int, list[str]] = {}
    for source, target in record.edges:
        if source in hidden or target in hidden:
            continue
        if source in tensors:
            read.setdefault(target, []).append(record.nodes[source].target)
        else:
            graph.add_edge(source, target)
    for target, names in read.items():
        box = ("tensors", target)
        graph.add_edge(box, target)
        label[box], kind[box] = _tensors(names), "tensors"
    return graph, label, kind


def _draw(
    picture: Canvas,
    extent: tuple[float, float, float],
    places: dict[Hashable, tuple[float, float]],
    routes: dict[tuple[Hashable, Hashable], list[tuple[float, float]]],
    width: dict[Hashable, float],
    label: dict[Hashable, str],
    kind: dict[Hashable, str],
    inner: set[Hashable],
) -> None:
    left, right, rows = extent
    axes = picture.subplots()
    axes.set_xlim(left - 0.1, right + 0.1)
    axes.set_ylim(-rows + 0.45, 0.55)
    axes.set_axis_off()
    half = 0.27
    for (x, y), *bends, (end_x, end_y) in routes.values():
        route = [(x, y - half)]
        for bend_x, bend_y in bends:  # upright where it passes other boxes, slanting only between rows
            route += [(bend_x, bend_y + half), (bend_x, bend_y - half)]
        axes.plot(*zip(*route, strict=True), color=_LINE, linewidth=0.8, zorder=1)
        arrow = {"arrowstyle": "-|>", "color": _LINE, "linewidth": 0.8, "shrinkA": 0, "shrinkB": 0}
        axes.annotate("", (end_x, end_y + half), route[-1], arrowprops=arrow, zorder=1)
    for node, (x, y) in places.items():
        box = FancyBboxPatch(
            (x - width[node] / 2, y - half),
            width[node],
            2 * half,
            boxstyle="round,pad=0,rounding_size=0.06",
            facecolor=_KINDS[kind[node]][1],
            edgecolor=_INNER if node in inner else _LINE,
            linewidth=1.8 if node in inner else 0.8,
            zorder=2,
        )
        axes.add_patch(box)
        axes.text(x, y, label[node], ha="center", va="center", fontsize=7.5, linespacing=1.15, zorder=3)


def _label(node: GraphNode) -> str:
    if node.op in ("placeholder", "output"):
        return node.name if node.op == "output" else f"{node.name}\nargument"
    called = {"call_module": f"module {node.target}", "call_method": f".{node.target}()"}.get(node.op, node.target)
    return f"{node.name.removeprefix(node.inner + '.')}\n{called}"


def _kind(node: GraphNode) -> str:
    if node.op == "call_module":
        return "module"
    if node.target.startswith(("observe_", "record_")):
        return "observer"
    if node.target in ("expert_linear", "packed_expert_linear", "packed_experts", "begin_forward", "end_forward_"):
        return "operator"
    return "plain"


def _tensors(names: list[str]) -> str:
    """The tensors of one box: all names where they are few, else those of the linears, or the first, and a count."""
    if len(names) <= 2:
        return "\n".join(names)
    roots = [name for name in names if not any(name != other and name.startswith(other + "_") for other in names)]
    shown = roots if len(roots) <= 2 else names[:1]
    return f"{', '.join(shown)}\nand {len(names) - len(shown)} more tensors"
