"""Made-up evidence of MoE blocks for the tests of significance and allocation, and its permutations."""

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from moe_compiler.passes.statistics import BlockStatistics, LayerEvidence, LinearStatistics

SHAPES = {"gate_up_proj": (24, 16), "down_proj": (16, 12)}
OVERHEAD = {"gate_up_proj": 0.25, "down_proj": 0.5}
WIDTHS = (2, 4, 6, 8)


def make_block(
    abs_sums: Mapping[str, Sequence[Sequence[float]]], counts: Sequence[int], tokens: int, top_k: int
) -> BlockStatistics:
    """The statistics of one dataset, every routing weight and token weight being 1."""
    linears = {}
    for name, rows in abs_sums.items():
        sums = torch.tensor(rows, dtype=torch.float64)
        linears[name] = LinearStatistics(sums, sums.square())
    count = torch.tensor(counts)
    return BlockStatistics(top_k, tokens, float(tokens), count, count.double(), count.double(), linears)


def make_layer(
    seed: int = 0,
    *,
    path: str = "layers.0.mlp",
    experts: int = 8,
    datasets: int = 3,
    top_k: int = 2,
    spread: float = 1.0,
    measured: bool = True,
) -> LayerEvidence:
    """A layer whose experts' loads spread log-normally, with its own loads on every dataset."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    base = spread * draw(experts)
    statistics = {}
    load = torch.exp(base + 0.3 * spread * draw(datasets, experts))
    for d in range(datasets):
        count = (load[d] / load[d].sum() * 1000 * top_k).round().long()
        linears = {
            name: LinearStatistics(count[:, None] * draw(experts, K).abs(), count[:, None] * draw(experts, K).square())
            for name, (_, K) in SHAPES.items()
        }
        mass = count.double() * 0.9
        tokens = int(count.sum()) // top_k
        statistics[f"data{d}"] = BlockStatistics(top_k, tokens, tokens * 0.9, count, mass, mass / top_k, linears)
    signal = {name: load * torch.exp(0.2 * draw(datasets, experts)) for name in SHAPES}
    errors = {
        name: {b: signal[name] * 4.0**-b * torch.exp(0.2 * draw(datasets, experts)) for b in WIDTHS} for name in SHAPES
    }
    return LayerEvidence(
        path=path,
        statistics=statistics,
        column_norm={name: 1 + draw(experts, K).square() for name, (_, K) in SHAPES.items()},
        shapes=SHAPES,
        overhead_bits=OVERHEAD,
        errors=errors if measured else None,
        signal=signal if measured else None,
    )


def permute_experts(layer: LayerEvidence, order: Tensor) -> LayerEvidence:
    """The same layer with its experts renumbered: new expert `i` is old expert `order[i]`."""
    statistics = {
        dataset: replace(
            block,
            count=block.count[order],
            token_mass=block.token_mass[order],
            gate_mass=block.gate_mass[order],
            linears={
                name: LinearStatistics(linear.abs_sum[order], linear.sq_sum[order])
                for name, linear in block.linears.items()
            },
        )
        for dataset, block in layer.statistics.items()
    }
    assert layer.errors is not None
    assert layer.signal is not None
    return replace(
        layer,
        statistics=statistics,
        column_norm={name: norm[order] for name, norm in layer.column_norm.items()},
        errors={name: {b: e[:, order] for b, e in table.items()} for name, table in layer.errors.items()},
        signal={name: signal[:, order] for name, signal in layer.signal.items()},
    )


def permute_datasets(layer: LayerEvidence, order: Sequence[int]) -> LayerEvidence:
    """The same layer with its datasets given in another order."""
    names = layer.datasets
    index = torch.tensor(order)
    assert layer.errors is not None
    assert layer.signal is not None
    return replace(
        layer,
        statistics={names[i]: layer.statistics[names[i]] for i in order},
        errors={name: {b: e[index] for b, e in table.items()} for name, table in layer.errors.items()},
        signal={name: signal[index] for name, signal in layer.signal.items()},
    )
