"""Analyses, reports and profiles of models that were never there, of any size."""

from types import SimpleNamespace
from typing import Any

import torch

from moe_compiler.analysis import QUANTILES, Analysis, LayerAnalysis, frequencies
from moe_compiler.config import CompileConfig
from moe_compiler.coverage import CompileReport, CoverageEntry
from moe_compiler.graph_record import GraphNode, GraphRecord
from moe_compiler.kernels.pool import ChannelPool
from moe_compiler.passes.plan import LayerPlan, PrecisionPlan
from moe_compiler.passes.significance import fit_joint_distribution
from moe_compiler.runtime.profile import Profile
from moe_compiler.runtime.report import AdaptReport, LayerChange, LinearChange

LINEARS = {"gate_up_proj": (2048, 2048), "down_proj": (2048, 1024)}
SLOTS = 600


def layer_analysis(path: str, experts: int, datasets: int, top_k: int = 8) -> LayerAnalysis:
    """One layer with random numbers of the right kind, drawn from the global generator."""
    top_k = min(top_k, experts)
    common = torch.rand(experts, dtype=torch.float64) + 0.05
    significance = common * (torch.rand(datasets, experts, dtype=torch.float64) + 0.2)
    significance *= top_k / significance.sum(dim=1, keepdim=True)
    joint = fit_joint_distribution(significance)
    rank = joint.baseline.argsort().argsort()
    clusters = tuple((4 * rank // experts).tolist())
    widths = tuple((2, 4, 6, 8)[cluster] for cluster in clusters)
    vectors = torch.randn(experts, 40)
    vectors /= vectors.norm(dim=1, keepdim=True)
    routed = (torch.rand(200, experts) < top_k / experts).double()
    quantiles = torch.rand(experts, len(QUANTILES)).cumsum(dim=1)
    return LayerAnalysis(
        path=path,
        top_k=top_k,
        significance=significance,
        counts=(1000 * significance).long(),
        gate_mass=400 * significance,
        baseline=joint.baseline,
        dynamics=joint.dynamics,
        correlation=joint.correlation,
        dataset_weights=joint.weights,
        bits=dict.fromkeys(LINEARS, widths),
        clusters=clusters,
        centers=tuple(joint.baseline.quantile(torch.tensor([0.1, 0.4, 0.6, 0.9]).double()).tolist()),
        channel_quantiles=dict.fromkeys(LINEARS, quantiles),
        coactivation=(routed.T @ routed).long(),
        similarity=vectors @ vectors.T,
        stages={},
    )


def graph_record(name: str) -> GraphRecord:
    """A graph of four nodes, one of them in an inner graph."""
    nodes = (
        GraphNode("hidden_states", "placeholder", "hidden_states"),
        GraphNode("experts.down_proj", "get_attr", "down_proj", "experts"),
        GraphNode(f"experts.{name}", "call_function", "packed_experts", "experts"),
        GraphNode("output", "output", "output"),
    )
    return GraphRecord(f"class {name}(nn.Module): <&>", nodes, ((0, 2), (1, 2), (2, 3)))


def analysis(layers: int, experts: int, datasets: tuple[str, ...] = ("wiki", "code")) -> Analysis:
    """An analysis of a model of that size."""
    torch.manual_seed(0)
    paths = [f"model.layers.{i}.mlp" for i in range(layers)]
    samples = {name: [(torch.rand(4000) ** 3 * 500).long()] for name in datasets}
    found = Analysis(
        strategy="dynamo",
        datasets=datasets,
        layers={path: layer_analysis(path, experts, len(datasets)) for path in paths},
        tokens={name: frequencies(windows) for name, windows in samples.items()},
        alpha=0.3,
        reweighted=False,
        graphs=(),
    )
    stages = {stage: graph_record(stage) for stage in ("captured", "observed", "lowered")}
    return found.with_stages(dict.fromkeys(paths, stages))


def compile_report(found: Analysis) -> CompileReport:
    """The report of the compilation that such an analysis belongs to."""
    plans = {
        path: LayerPlan(path, layer.bits, LINEARS, dict.fromkeys(LINEARS, 0.25), clusters=layer.clusters)
        for path, layer in found.layers.items()
    }
    entries = []
    for path, plan in plans.items():
        for linear, widths in plan.bits.items():
            weights = plan.num_experts * LINEARS[linear][0] * LINEARS[linear][1]
            bits = sum(widths) / len(widths)
            size = int(weights * (bits + 0.25) / 8)
            entries.append(
                CoverageEntry(f"{path}.experts.{linear}", "experts", True, "", weights, size, bits, bits + 0.25)
            )
        entries.append(CoverageEntry(f"{path}.gate", "other", False, "not an expert", 4096, 8192, 16.0, 16.0))
    blended = {path: {"gate_up_proj": (1,), "down_proj": ()} for path in plans}
    return CompileReport(
        CompileConfig(target_bits=5.5), PrecisionPlan("dynamo", plans, 5.5), blended, tuple(entries), analysis=found
    )


def profile(name: str, found: Analysis, seed: int) -> Profile:
    """A profile with random slots and routing."""
    generator = torch.Generator().manual_seed(seed)
    pools, histograms = {}, {}
    for path, layer in found.layers.items():
        histograms[path] = torch.rand(layer.num_experts, generator=generator, dtype=torch.float64) + 0.01
        for linear in layer.bits:
            pool = ChannelPool.empty(layer.num_experts, SLOTS, 1, 1)
            share = torch.rand(layer.num_experts, generator=generator)
            pool.offset[1:] = (SLOTS * share.cumsum(0) / share.sum()).int()
            pools[path, linear] = pool
    return Profile(name, "lowrank", 2048, pools, histograms)


def adapt_report(name: str, found: Analysis) -> AdaptReport:
    """What adapting to a profile's data did."""
    changes = []
    for path, layer in found.layers.items():
        linears = tuple(
            LinearChange(path, linear, SLOTS, SLOTS, SLOTS // 2, 2.0, float(1 + torch.rand(())))
            for linear in layer.bits
        )
        changes.append(LayerChange(path, 0.1, 3, linears))
    return AdaptReport(name, "calibration", "lowrank", 2048, tuple(changes), {"observe": 1.0, "choose": 2.0})


def model(layers: int = 2, experts: int = 6, profiles: tuple[str, ...] = ("calibration", "law")) -> Any:
    """What a report is made from: a thing with `moe_report` and `runtime.profiles`."""
    found = analysis(layers, experts)
    known = {name: profile(name, found, seed) for seed, name in enumerate(profiles)}
    return SimpleNamespace(moe_report=compile_report(found), runtime=SimpleNamespace(profiles=known), config=None)
