"""How alike the experts of a layer are, in their weights and in their use, as matrices and graphs."""

from __future__ import annotations

from collections.abc import Sequence

import networkx as nx
import torch
from torch import Tensor

CHUNK_ELEMENTS = 1 << 22  # elements of the weights that are held in float32 at a time


def cosine_similarity(weights: Tensor | Sequence[Tensor]) -> Tensor:
    """Compute the cosine similarity of the experts' weights (MoQa, arXiv 2503.21135v1, 3.3 and figure 5).

    The weights of an expert are one long vector over all its linears. They are read in slices of a few
    million elements; a slice's products are taken in float32 (float64 where the weights are) and summed in
    float64.

    Args:
        weights: `(E, D)` or `(E, N, K)`, or several of them (the linears of an expert), of any floating
            dtype.

    Returns:
        `(E, E)` float64, symmetric, in [-1, 1], with ones on the diagonal. An expert whose weights are all
        zero is similar to none but itself.

    Raises:
        ValueError: if there is no tensor, one has fewer than two dimensions, or the numbers of experts
            differ.
    """
    tensors = [weights] if isinstance(weights, Tensor) else list(weights)
    shapes = [tuple(tensor.shape) for tensor in tensors]
    if not shapes or any(len(shape) < 2 for shape in shapes) or len({shape[0] for shape in shapes}) != 1:
        raise ValueError(
            f"`weights` must be one or more tensors (experts, ...) with the same number of experts, got shapes {shapes}"
        )
    gram = torch.zeros(shapes[0][0], shapes[0][0], dtype=torch.float64, device=tensors[0].device)
    with torch.no_grad():
        for tensor in tensors:
            dtype = torch.float64 if tensor.dtype == torch.float64 else torch.float32
            per_row = max(1, tensor.numel() // max(1, tensor.shape[1]))
            for rows in torch.split(tensor, max(1, CHUNK_ELEMENTS // per_row), dim=1):
                part = rows.flatten(1).to(dtype)
                gram += (part @ part.T).double()
    norm = gram.diagonal().clamp(min=0).sqrt()
    scale = torch.where(norm > 0, norm, 1.0)
    similarity = (gram / scale[:, None] / scale[None, :]).clamp(-1, 1)
    similarity = (similarity + similarity.T) / 2
    return similarity.fill_diagonal_(1)


def expert_graph(similarity: Tensor, minimum: float | None = None) -> nx.Graph:
    """Draw the experts of a layer as a graph with an edge per pair, weighted by similarity (MoQa 3.3).

    Args:
        similarity: `(E, E)`, symmetric.
        minimum: leave out edges that weigh less; by default every pair has one.

    Returns:
        An undirected graph on the nodes `0 … E − 1` with the attribute `weight` on its edges.

    Raises:
        ValueError: if the matrix is not square and symmetric.
    """
    matrix = _checked_symmetric("similarity", similarity)
    graph = nx.Graph()
    graph.add_nodes_from(range(len(matrix)))
    for i, row in enumerate(matrix):
        for j in range(i + 1, len(matrix)):
            if minimum is None or row[j] >= minimum:
                graph.add_edge(i, j, weight=row[j])
    return graph


def coactivation_graph(counts: Tensor, minimum: int = 1) -> nx.Graph:
    """Draw the experts of a layer as a graph with an edge per pair that was routed the same tokens.

    Args:
        counts: `(E, E)`, symmetric: tokens that were routed to both experts; on the diagonal, to the one.
        minimum: leave out pairs with fewer common tokens than this.

    Returns:
        An undirected graph on the nodes `0 … E − 1`, with the expert's own tokens as the attribute `tokens`
        of its node and the common tokens as the attribute `weight` of each edge.

    Raises:
        ValueError: if the matrix is not square and symmetric.
    """
    matrix = _checked_symmetric("counts", counts)
    graph = nx.Graph()
    for i, row in enumerate(matrix):
        graph.add_node(i, tokens=row[i])
        graph.add_edges_from((j, i, {"weight": row[j]}) for j in range(i) if row[j] >= minimum)
    return graph


def _checked_symmetric(argument: str, matrix: Tensor) -> list[list[float]]:
    square = matrix.dim() == 2 and matrix.shape[0] == matrix.shape[1]
    if not square or not torch.allclose(matrix.double(), matrix.double().T):
        raise ValueError(f"`{argument}` must be a square, symmetric matrix, got shape {tuple(matrix.shape)}")
    rows: list[list[float]] = matrix.tolist()
    return rows
