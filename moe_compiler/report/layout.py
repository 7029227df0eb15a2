"""Placing the nodes of a directed graph in layers, from top to bottom, without overlaps."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from itertools import pairwise
from typing import Any

import networkx as nx

SWEEPS = 12
Place = tuple[float, float]


def layered_layout(
    graph: nx.DiGraph, widths: Mapping[Hashable, float], gap: float = 1.0
) -> tuple[dict[Hashable, Place], dict[tuple[Hashable, Hashable], list[Place]]]:
    """Places a directed graph in layers so that every edge points downwards, with few crossings.

    Layers are the graph's topological generations; a source moves down to just above its first reader. An edge that
    spans several layers bends around their nodes. The order in a layer is that of the mean place of the neighbours
    (Sugiyama, Tagawa and Toda 1981), found by sweeps down and up.

    Args:
        graph: without cycles.
        widths: the width of each node's box.
        gap: between two boxes of a layer.

    Returns:
        The centre of each node, `y` the negative number of its layer, and the points of each edge, ends included.

    Raises:
        ValueError: the graph has a cycle.
    """
    if not nx.is_directed_acyclic_graph(graph):
        raise ValueError("`graph` must have no cycle, but has one")
    level = _levels(graph)
    layers: list[list[Any]] = [[] for _ in range(max(level.values(), default=-1) + 1)]
    for node in graph:
        layers[level[node]].append(node)
    size = dict(widths)
    chains: dict[tuple[Any, Any], list[Any]] = {}
    above: dict[Any, list[Any]] = {}
    below: dict[Any, list[Any]] = {}
    for source, target in graph.edges:
        chain = [source]
        for between in range(level[source] + 1, level[target]):
            bend = ("bend", source, target, between)
            layers[between].append(bend)
            size[bend] = 0.0
            chain.append(bend)
        chain.append(target)
        chains[source, target] = chain
        for upper, lower in pairwise(chain):
            below.setdefault(upper, []).append(lower)
            above.setdefault(lower, []).append(upper)
    x: dict[Any, float] = {}
    for layer in layers:
        x |= _packed(layer, {node: float(i) for i, node in enumerate(layer)}, size, gap)
    for sweep in range(SWEEPS):
        downwards = sweep % 2 == 0
        for layer in layers if downwards else reversed(layers):
            neighbours = above if downwards else below
            wanted = {node: _mean([x[one] for one in neighbours.get(node, ())], x[node]) for node in layer}
            layer.sort(key=wanted.__getitem__)
            x |= _packed(layer, wanted, size, gap)
    row = {node: -float(number) for number, layer in enumerate(layers) for node in layer}
    places = {node: (x[node], row[node]) for node in graph}
    return places, {edge: [(x[one], row[one]) for one in chain] for edge, chain in chains.items()}


def _levels(graph: nx.DiGraph) -> dict[Any, int]:
    level: dict[Any, int] = {}
    for number, generation in enumerate(nx.topological_generations(graph)):
        level.update(dict.fromkeys(generation, number))
    for node in graph:
        readers = [level[reader] for reader in graph.successors(node)]
        if readers and not graph.in_degree(node):
            level[node] = min(readers) - 1
    return level


def _packed(layer: list[Any], wanted: Mapping[Any, float], size: Mapping[Any, float], gap: float) -> dict[Any, float]:
    """Places in the order of the layer, as near to the wanted ones as boxes that do not overlap can be.

    The least sum of squared distances, by pooling neighbours that push each other (isotonic regression).
    """
    offset, total = {}, 0.0
    for previous, node in zip([None, *layer], layer, strict=False):
        if previous is not None:
            total += (size[previous] + size[node]) / 2 + gap
        offset[node] = total
    blocks: list[list[Any]] = []
    means: list[float] = []
    for node in layer:
        blocks.append([node])
        means.append(wanted[node] - offset[node])
        while len(means) > 1 and means[-2] > means[-1]:
            count, more = len(blocks[-2]), len(blocks[-1])
            means[-2] = (means[-2] * count + means[-1] * more) / (count + more)
            blocks[-2] += blocks[-1]
            del blocks[-1], means[-1]
    return {node: mean + offset[node] for block, mean in zip(blocks, means, strict=True) for node in block}


def _mean(values: list[float], default: float) -> float:
    return sum(values) / len(values) if values else default
