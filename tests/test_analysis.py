"""The analysis of a compilation: what it holds, and its file."""

import json
from dataclasses import fields
from pathlib import Path
from typing import Any

import analysis_cases
import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import datasets, olmoe, qwen2_moe, tokens
from torch import Tensor
from torch.nn.functional import cosine_similarity

from moe_compiler import dynamo_compile
from moe_compiler.analysis import QUANTILES, Analysis, frequencies
from moe_compiler.analyze import analyze
from moe_compiler.graph_record import GraphNode, record_graph, stages_before
from moe_compiler.inspection import readable
from moe_compiler.kernels import ops
from moe_compiler.passes.calibrate import observe_datasets
from moe_compiler.passes.capture import capture_moe_blocks


@pytest.fixture(scope="module")
def model() -> Any:
    return dynamo_compile(
        qwen2_moe(layers=2), datasets(), strategy="dynamo", target_bits=4.5, quantizer="rtn", progress=False
    )


def routing(model: Any, ids: Tensor) -> dict[str, Tensor]:
    """By block, the experts that each token was sent to."""
    calls: dict[str, Tensor] = {}
    hooks = [
        module.register_forward_pre_hook(lambda _, args, name=name: calls.__setitem__(name[:-8], args[1]))
        for name, module in model.named_modules()
        if name.endswith(".experts")
    ]
    with torch.no_grad():
        model(input_ids=ids, use_cache=False)
    for hook in hooks:
        hook.remove()
    return calls


def same(first: Any, second: Any) -> bool:
    """Whether two values hold the same, tensors compared bit for bit."""
    if isinstance(first, Tensor):
        return isinstance(second, Tensor) and first.dtype == second.dtype and torch.equal(first, second)
    if isinstance(first, dict):
        return first.keys() == second.keys() and all(same(first[key], second[key]) for key in first)
    if hasattr(first, "__dataclass_fields__"):
        return all(same(getattr(first, field.name), getattr(second, field.name)) for field in fields(first))
    return bool(first == second)


def test_it_is_what_the_compilation_saw_and_decided(model: Any) -> None:
    found = model.moe_report.analysis
    original = qwen2_moe(layers=2)
    assert found.datasets == ("low", "high")
    for path, layer in found.layers.items():
        plan = model.moe_report.plan.layers[path]
        assert layer.bits == plan.bits
        assert layer.clusters == plan.clusters
        assert layer.centers == plan.notes["centers"]
        torch.testing.assert_close(layer.significance.sum(dim=1), torch.full((2,), 2.0).double())
        torch.testing.assert_close(layer.dataset_weights @ layer.significance, layer.baseline)
        total = torch.zeros(6, 6, dtype=torch.int64)
        for row, ids in enumerate(datasets().values()):
            chosen = torch.nn.functional.one_hot(routing(original, ids)[path], 6).sum(dim=1)
            assert torch.equal(layer.counts[row], chosen.sum(dim=0))
            total += chosen.T @ chosen
        assert layer.coactivation is not None
        assert torch.equal(layer.coactivation, total)
        experts = original.get_submodule(f"{path}.experts")
        flat = torch.cat([experts.gate_up_proj.flatten(1), experts.down_proj.flatten(1)], dim=1).detach().double()
        assert layer.similarity is not None
        oracle = cosine_similarity(flat[:, None], flat[None], dim=2).float()
        torch.testing.assert_close(layer.similarity, oracle, atol=1e-6, rtol=0)


def test_channel_quantiles_are_those_of_the_channels(model: Any) -> None:
    original = qwen2_moe(layers=2)
    blocks = capture_moe_blocks(original, tokens(1, 4))
    seen = observe_datasets(original, blocks, {name: list(ids) for name, ids in datasets().items()})
    path = next(iter(blocks))
    both = seen[path]["low"] + seen[path]["high"]
    norm = original.get_submodule(f"{path}.experts").down_proj.norm(dim=1).detach().double()
    significance = both.linears["down_proj"].abs_sum * norm
    found = model.moe_report.analysis.layers[path].channel_quantiles["down_proj"]
    assert found.shape == (6, len(QUANTILES))
    expected = torch.stack([significance.amin(dim=1), significance.median(dim=1).values, significance.amax(dim=1)], 1)
    torch.testing.assert_close(found[:, [0, -1]].double(), expected[:, [0, 2]] / significance.mean(), rtol=1e-4, atol=0)
    middle = found[:, QUANTILES.index(0.5)].double()
    assert bool((middle >= 0.99 * expected[:, 1] / significance.mean()).all())  # torch takes the lower of two medians
    assert bool((found.diff(dim=1) >= 0).all())


def test_graphs_are_those_of_the_model_and_kept_once(model: Any) -> None:
    found = model.moe_report.analysis
    for path, graph in model.moe_graphs.items():
        stages = found.stages(path)
        assert list(stages) == ["captured", "observed", "lowered"]
        assert stages["lowered"].text == readable(graph)
        assert {name: stages[name].text for name in ("captured", "observed")} == graph.meta["stages"]
        targets = {stage: [node.target for node in record.nodes] for stage, record in stages.items()}
        assert targets["captured"].count("expert_linear") == 2
        assert targets["observed"].count("observe_experts_") == 2
        assert targets["lowered"].count("packed_experts") == 1
    first, last = found.layers.values()
    assert first.stages["captured"] == last.stages["captured"]
    assert first.stages["lowered"] != last.stages["lowered"]  # they begin and end the forward pass
    assert len(found.graphs) == 4
    with pytest.raises(KeyError, match=r"model.layers.9.mlp"):
        found.stages("model.layers.9.mlp")


def test_a_record_keeps_who_reads_what() -> None:
    block = next(iter(capture_moe_blocks(olmoe(), tokens(1, 4)).values()))
    record = stages_before(block)["captured"]
    place = {node.name: i for i, node in enumerate(record.nodes)}
    edges = {(record.nodes[a].name, record.nodes[b].name) for a, b in record.edges}
    assert {
        ("view", "gate"),
        ("top_k_index", "experts.expert_ids"),
        ("view", "experts.gate_up"),
        ("experts.gate_up_proj", "experts.gate_up"),
        ("experts.type_as", "reshape"),
        ("reshape", "output"),
    } <= edges
    assert all(a < b for a, b in record.edges)
    assert record.nodes[place["gate"]] == GraphNode("gate", "call_module", "OlmoeTopKRouter")
    assert record.nodes[place["experts.down"]] == GraphNode("experts.down", "call_function", "expert_linear", "experts")
    plain = record_graph(block.graph)  # its experts are no graph
    assert [node.target for node in plain.nodes if node.name == "experts"] == ["OlmoeExperts"]


def test_similarity_and_weights_are_optional() -> None:
    model = olmoe(num_hidden_layers=1)
    compiled = dynamo_compile(olmoe(num_hidden_layers=1), datasets(), strategy="moqa", quantizer="rtn", progress=False)
    report = compiled.moe_report
    assert report.analysis.reweighted
    assert report.analysis.alpha == 0.3
    assert next(iter(report.analysis.layers.values())).centers is None
    blocks = capture_moe_blocks(model, tokens(1, 4))
    found = {name: list(ids) for name, ids in datasets().items()}
    evidence = [
        compiled.runtime.layers[path].evidence(seen) for path, seen in observe_datasets(model, blocks, found).items()
    ]
    without = analyze(evidence, report.plan, blocks, found, similarity=False)
    assert all(layer.similarity is None for layer in without.layers.values())
    assert not without.reweighted


@given(
    experts=st.integers(1, 5),
    top_k=st.integers(1, 3),
    batches=st.lists(st.integers(0, 6), min_size=1, max_size=3),
    seed=st.integers(0, 99),
)
@settings(deadline=None, max_examples=25)
def test_coactivation_counts_pairs(experts: int, top_k: int, batches: list[int], seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    top_k = min(top_k, experts)
    counts = torch.zeros(experts, experts, dtype=torch.int64)
    expected = torch.zeros_like(counts)
    for size in batches:
        ids = torch.stack(
            [torch.randperm(experts + 1, generator=generator)[:top_k] for _ in range(size)]
            or [torch.zeros(0, dtype=torch.int64)]
        ).view(-1, top_k)  # the id `experts` is computed elsewhere
        ops.observe_coactivation_(ids.reshape(-1), top_k, counts)
        for row in ids.tolist():
            for a in row:
                for b in row:
                    if a < experts and b < experts:
                        expected[a, b] += 1
    assert torch.equal(counts, expected)


def test_the_coactivation_operator_is_one() -> None:
    arguments = (torch.tensor([0, 1, 2, 0]), 2, torch.zeros(3, 3, dtype=torch.int64))
    torch.library.opcheck(ops.observe_coactivation_, arguments, test_utils=("test_schema", "test_faketensor"))


def test_frequencies_are_ranked() -> None:
    found = frequencies([torch.tensor([5, 3, 3]), torch.tensor([7, 7, 3])])
    assert found.ids.tolist() == [3, 7, 5]
    assert found.counts.tolist() == [3, 2, 1]
    torch.testing.assert_close(found.utilization(4), 4 * torch.tensor([3, 2, 1]).double() / 6)
    assert found.law.beta > 0


def test_it_survives_its_file(model: Any, tmp_path: Path) -> None:
    for name, found in (("real", model.moe_report.analysis), ("made up", analysis_cases.analysis(2, 5))):
        path = tmp_path / f"{name}.safetensors"
        found.save(path)
        found.save(path)  # replaces
        assert same(Analysis.load(path), found)
    assert sorted(one.name for one in tmp_path.iterdir()) == ["made up.safetensors", "real.safetensors"]


def test_what_is_unknown_stays_unknown_in_the_file(tmp_path: Path) -> None:
    found = analysis_cases.analysis(1, 4)
    layer = found.layers["model.layers.0.mlp"]
    bare = {**vars(layer), "similarity": None, "coactivation": None, "clusters": None, "centers": None}
    found.layers["model.layers.0.mlp"] = type(layer)(**bare)  # type: ignore[index]
    found.save(tmp_path / "a")
    assert same(Analysis.load(tmp_path / "a"), found)


def test_bad_files_are_refused(tmp_path: Path) -> None:
    found = analysis_cases.analysis(1, 4)
    whole = tmp_path / "whole"
    found.save(whole)
    with pytest.raises(FileNotFoundError, match=r"`path` must lie in a folder that exists, but .*nowhere does not"):
        found.save(tmp_path / "nowhere" / "a")
    with pytest.raises(FileNotFoundError, match=r"`path` must be the file of an analysis, but .*absent does not exist"):
        Analysis.load(tmp_path / "absent")
    (tmp_path / "cut").write_bytes(whole.read_bytes()[:-8])
    with pytest.raises(ValueError, match=r"cut is no analysis that can be read: Error while deserializing"):
        Analysis.load(tmp_path / "cut")
    safetensors.torch.save_file({"a": torch.zeros(1)}, tmp_path / "other")
    with pytest.raises(ValueError, match=r"other is no analysis that can be read: it lacks '__metadata__'"):
        Analysis.load(tmp_path / "other")
    tensors = safetensors.torch.load_file(whole)
    size = int.from_bytes(whole.read_bytes()[:8], "little")
    metadata = json.loads(whole.read_bytes()[8 : 8 + size])["__metadata__"]
    header = json.loads(metadata["moe_compiler.analysis"])
    newer = {"moe_compiler.analysis": json.dumps(header | {"format_version": 9})}
    safetensors.torch.save_file(tensors, tmp_path / "newer", newer)
    with pytest.raises(ValueError, match=r"its `format_version` must be 1, but is 9"):
        Analysis.load(tmp_path / "newer")
    del tensors["layers.0.baseline"]
    safetensors.torch.save_file(tensors, tmp_path / "lacking", metadata)
    with pytest.raises(ValueError, match=r"it lacks 'layers.0.baseline'"):
        Analysis.load(tmp_path / "lacking")
