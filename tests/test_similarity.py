"""Similarity of experts and the graphs drawn from it."""

import pytest
import torch

from moe_compiler.passes import similarity as module
from moe_compiler.passes.similarity import coactivation_graph, cosine_similarity, expert_graph


def test_cosine_similarity_worked_example() -> None:
    weights = torch.tensor([[3.0, 4.0], [4.0, 3.0], [-6.0, -8.0], [0.0, 0.0]])
    expected = [[1, 0.96, -1, 0], [0.96, 1, -0.96, 0], [-1, -0.96, 1, 0], [0, 0, 0, 1]]
    torch.testing.assert_close(cosine_similarity(weights), torch.tensor(expected, dtype=torch.float64))


@pytest.mark.parametrize("chunk", [1, 50, 1 << 22])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_cosine_similarity_of_several_linears(monkeypatch: pytest.MonkeyPatch, chunk: int, dtype: torch.dtype) -> None:
    monkeypatch.setattr(module, "CHUNK_ELEMENTS", chunk)
    gate_up, down = torch.randn(5, 7, 6).to(dtype), torch.randn(5, 6, 3).to(dtype).transpose(1, 2)
    joined = torch.cat([gate_up.flatten(1), down.flatten(1)], dim=1).double()
    oracle = torch.nn.functional.cosine_similarity(joined[:, None], joined[None], dim=2)
    result = cosine_similarity([gate_up, down])
    torch.testing.assert_close(result, oracle, atol=1e-5, rtol=0)
    assert torch.equal(result, result.T)
    assert torch.equal(cosine_similarity(gate_up[:, :1].flatten(1)).diagonal(), torch.ones(5).double())


def test_cosine_similarity_refuses_experts_that_do_not_match() -> None:
    with pytest.raises(ValueError, match=r"`weights` must be one or more tensors .* got shapes \[\(2, 3\), \(3, 3\)\]"):
        cosine_similarity([torch.ones(2, 3), torch.ones(3, 3)])
    with pytest.raises(ValueError, match=r"got shapes \[\]"):
        cosine_similarity([])


def test_expert_graph() -> None:
    similarity = torch.tensor([[1, 0.9, 0.1], [0.9, 1, -0.2], [0.1, -0.2, 1]], dtype=torch.float64)
    graph = expert_graph(similarity)
    assert {(i, j): d["weight"] for i, j, d in graph.edges(data=True)} == {
        (0, 1): 0.9,
        (0, 2): 0.1,
        (1, 2): -0.2,
    }
    assert sorted(expert_graph(similarity, minimum=0.1).edges) == [(0, 1), (0, 2)]
    assert list(expert_graph(similarity, minimum=2).nodes) == [0, 1, 2]


def test_coactivation_graph() -> None:
    counts = torch.tensor([[9, 4, 0], [4, 5, 1], [0, 1, 1]])
    graph = coactivation_graph(counts)
    assert list(graph.nodes(data="tokens")) == [(0, 9), (1, 5), (2, 1)]
    assert {(i, j): d["weight"] for i, j, d in graph.edges(data=True)} == {(0, 1): 4, (1, 2): 1}
    assert list(coactivation_graph(counts, minimum=2).edges) == [(0, 1)]


def test_graphs_refuse_matrices_that_are_not_symmetric() -> None:
    with pytest.raises(ValueError, match=r"`similarity` must be a square, symmetric matrix, got shape \(2, 3\)"):
        expert_graph(torch.ones(2, 3))
    with pytest.raises(ValueError, match=r"`counts` must be a square, symmetric matrix, got shape \(2, 2\)"):
        coactivation_graph(torch.tensor([[1, 2], [0, 1]]))
