"""What compiling found out about a model's experts and datasets, as one record with a file of its own."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from moe_compiler.graph_record import GraphRecord
from moe_compiler.passes.significance import PowerLaw, fit_power_law, token_utilization
from moe_compiler.replace_file import replace_file

FORMAT_VERSION = 1
QUANTILES = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.99, 1.0)
"""At which shares of an expert's input channels their significance is kept."""

_HEADER = "moe_compiler.analysis"
_LAYER_TENSORS = (
    "significance",
    "counts",
    "gate_mass",
    "baseline",
    "dynamics",
    "correlation",
    "dataset_weights",
    "coactivation",
    "similarity",
)
_OPTIONAL = ("coactivation", "similarity")


@dataclass(frozen=True, eq=False)
class TokenFrequencies:
    """How often each token occurs in one dataset.

    Attributes:
        ids: `(V',)` int64, the tokens that occur, the most frequent first.
        counts: `(V',)` int64, how often.
    """

    ids: Tensor
    counts: Tensor

    @property
    def law(self) -> PowerLaw:
        """The power law fitted to the relative frequencies (MoQa, arXiv 2503.21135v1, eq. 1)."""
        return fit_power_law(self.frequency())

    def frequency(self) -> Tensor:
        """`(V',)` float64, the share of each token, by rank."""
        return self.counts.double() / self.counts.sum()

    def utilization(self, top_k: int) -> Tensor:
        """`(V',)` float64, `U = k·f`, by rank (MoQa eq. 1)."""
        return token_utilization(self.frequency(), top_k)


@dataclass(frozen=True, eq=False)
class LayerAnalysis:
    """What was found out about one MoE block with `E` experts on `n` datasets; tensors are on the host.

    Attributes:
        path: the block's path in the model.
        top_k: experts per token.
        significance: `(n, E)` float64, expert significance by dataset, each row summing to `top_k` (DynaMo eq. 1).
        counts: `(n, E)` int64, tokens routed to each expert.
        gate_mass: `(n, E)` float64, the sum of their routing weights.
        baseline: `(E,)` float64, the synthesized baseline significance (DynaMo eq. 2).
        dynamics: `(E,)` float64, standard deviation over datasets / mean over datasets.
        correlation: `(n, n)` float64, of the significance between datasets.
        dataset_weights: `(n,)` float64, the weight of each dataset in the baseline, summing to 1.
        bits: by linear, the width of each expert.
        clusters: the cluster of each expert, 0 for the least significant, where the strategy made clusters.
        centers: the centres of the clusters, where the strategy made clusters by fuzzy c-means.
        channel_quantiles: by linear, `(E, Q)` float32: quantiles, at `QUANTILES`, of the significance of an expert's
            input channels on all datasets together, as a share of what a channel of the linear has on average.
        coactivation: `(E, E)` int64, tokens routed to both experts, on all datasets together; `None` if unknown.
        similarity: `(E, E)` float32, cosine similarity of the experts' original weights; `None` if not computed.
        stages: by stage (`"captured"`, `"observed"`, `"lowered"`), the position of its graph in `Analysis.graphs`.
    """

    path: str
    top_k: int
    significance: Tensor
    counts: Tensor
    gate_mass: Tensor
    baseline: Tensor
    dynamics: Tensor
    correlation: Tensor
    dataset_weights: Tensor
    bits: Mapping[str, tuple[int, ...]]
    clusters: tuple[int, ...] | None
    centers: tuple[float, ...] | None
    channel_quantiles: Mapping[str, Tensor]
    coactivation: Tensor | None
    similarity: Tensor | None
    stages: Mapping[str, int]

    @property
    def num_experts(self) -> int:
        """The number of experts `E`."""
        return self.significance.shape[1]


@dataclass(frozen=True, eq=False)
class Analysis:
    """What compiling found out about a model; hangs on it as `model.moe_report.analysis`.

    Attributes:
        strategy: the allocation strategy.
        datasets: the names of the calibration datasets, in order.
        layers: each MoE block, by path, in the model's order.
        tokens: by dataset, how often each token occurs.
        alpha: the exponent of the token weights (MoQa eq. 2).
        reweighted: whether the statistics were collected with those weights; otherwise every token counted 1.
        graphs: the different graphs of all blocks and stages; `LayerAnalysis.stages` says whose they are.
    """

    strategy: str
    datasets: tuple[str, ...]
    layers: Mapping[str, LayerAnalysis]
    tokens: Mapping[str, TokenFrequencies]
    alpha: float
    reweighted: bool
    graphs: tuple[GraphRecord, ...]

    def stages(self, path: str) -> dict[str, GraphRecord]:
        """The graphs of one block by stage.

        Raises:
            KeyError: the model has no such MoE block.
        """
        return {stage: self.graphs[number] for stage, number in self.layers[path].stages.items()}

    def with_stages(self, stages: Mapping[str, Mapping[str, GraphRecord]]) -> Analysis:
        """The same with more graphs, by block path and stage; equal graphs are kept once."""
        graphs = list(self.graphs)
        number = {graph: position for position, graph in enumerate(graphs)}
        layers = dict(self.layers)
        for path, records in stages.items():
            found = dict(layers[path].stages)
            for stage, record in records.items():
                if record not in number:
                    number[record] = len(graphs)
                    graphs.append(record)
                found[stage] = number[record]
            layers[path] = replace(layers[path], stages=found)
        return replace(self, layers=layers, graphs=tuple(graphs))

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes the analysis to one safetensors file, with what is no tensor as JSON in its header.

        `path` is never half written.

        Raises:
            FileNotFoundError: the folder of `path` does not exist.
            OSError: the file could not be written. Whatever `path` held before is still there.
        """
        target = Path(path)
        if not target.parent.is_dir():
            raise FileNotFoundError(f"`path` must lie in a folder that exists, but {target.parent} does not")
        data = safetensors.torch.save(_tensors(self), {_HEADER: json.dumps(_header(self))})
        replace_file(target, data)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Analysis:
        """Reads what `save` wrote.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: it is no analysis, is damaged or of another version.
        """
        source = Path(path)
        if not source.is_file():
            raise FileNotFoundError(f"`path` must be the file of an analysis, but {source} does not exist or is none")
        data = source.read_bytes()
        try:
            tensors = safetensors.torch.load(data)
            size = int.from_bytes(data[:8], "little")
            header = json.loads(data[8 : 8 + size])["__metadata__"][_HEADER]
            return _analysis(json.loads(header), tensors)
        except (SafetensorError, ValueError, KeyError, TypeError, IndexError) as error:
            reason = f"it lacks {error}" if isinstance(error, KeyError) else str(error)
            raise ValueError(f"{source} is no analysis that can be read: {reason}") from error


def _tensors(analysis: Analysis) -> dict[str, Tensor]:
    named: dict[str, Tensor | None] = {}
    for dataset, tokens in enumerate(analysis.tokens.values()):
        named |= {f"tokens.{dataset}.ids": tokens.ids, f"tokens.{dataset}.counts": tokens.counts}
    for number, layer in enumerate(analysis.layers.values()):
        named |= {f"layers.{number}.{name}": getattr(layer, name) for name in _LAYER_TENSORS}
        for linear, quantiles in layer.channel_quantiles.items():
            named[f"layers.{number}.channel_quantiles.{linear}"] = quantiles
    copies = {name: tensor.detach().cpu().clone() for name, tensor in named.items() if tensor is not None}
    return {name: tensor.contiguous() for name, tensor in copies.items()}  # a file may not hold one memory twice


def _header(analysis: Analysis) -> dict[str, Any]:
    return {
        "format_version": FORMAT_VERSION,
        "strategy": analysis.strategy,
        "datasets": list(analysis.datasets),
        "tokens": list(analysis.tokens),
        "alpha": analysis.alpha,
        "reweighted": analysis.reweighted,
        "graphs": [graph.to_dict() for graph in analysis.graphs],
        "layers": [
            {
                "path": layer.path,
                "top_k": layer.top_k,
                "bits": {linear: list(widths) for linear, widths in layer.bits.items()},
                "clusters": layer.clusters,
                "centers": layer.centers,
                "stages": dict(layer.stages),
            }
            for layer in analysis.layers.values()
        ],
    }


def _analysis(header: dict[str, Any], tensors: Mapping[str, Tensor]) -> Analysis:
    if header["format_version"] != FORMAT_VERSION:
        raise ValueError(f"its `format_version` must be {FORMAT_VERSION}, but is {header['format_version']!r}")
    layers = [_layer(entry, f"layers.{number}.", tensors) for number, entry in enumerate(header["layers"])]
    return Analysis(
        strategy=header["strategy"],
        datasets=tuple(header["datasets"]),
        layers={layer.path: layer for layer in layers},
        tokens={
            name: TokenFrequencies(tensors[f"tokens.{number}.ids"], tensors[f"tokens.{number}.counts"])
            for number, name in enumerate(header["tokens"])
        },
        alpha=header["alpha"],
        reweighted=header["reweighted"],
        graphs=tuple(GraphRecord.from_dict(graph) for graph in header["graphs"]),
    )


def _layer(entry: dict[str, Any], prefix: str, tensors: Mapping[str, Tensor]) -> LayerAnalysis:
    found: dict[str, Any] = {name: tensors[prefix + name] for name in _LAYER_TENSORS if name not in _OPTIONAL}
    found |= {name: tensors.get(prefix + name) for name in _OPTIONAL}
    return LayerAnalysis(
        path=entry["path"],
        top_k=entry["top_k"],
        bits={linear: tuple(widths) for linear, widths in entry["bits"].items()},
        clusters=None if entry["clusters"] is None else tuple(entry["clusters"]),
        centers=None if entry["centers"] is None else tuple(entry["centers"]),
        channel_quantiles={linear: tensors[f"{prefix}channel_quantiles.{linear}"] for linear in entry["bits"]},
        stages=entry["stages"],
        **found,
    )


def frequencies(samples: list[Tensor]) -> TokenFrequencies:
    """Counts the tokens of a dataset; tokens that are equally frequent come in the order of their ids."""
    ids, counts = torch.unique(torch.cat(samples), return_counts=True)
    order = torch.argsort(counts, descending=True, stable=True)
    return TokenFrequencies(ids[order], counts[order])
