"""The papers' drawn figures as data: DynaMo's 3 to 5 and MoQa's 2 to 5. `moe-compiler report` draws the same."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import paper_published as published
import torch
from harness import markdown_table
from paper_results import Finding, PaperRow, show
from paper_study import Study, by_rounding, dynamo, moqa, on_all
from paper_trace import DatasetTrace, trace
from torch import Tensor

from moe_compiler.analysis import Analysis, LayerAnalysis
from moe_compiler.passes.partition import moqa_partition
from moe_compiler.passes.significance import token_weights

ALPHA = 0.3
COMPARED_EXPERTS = 8  # MoQa, figure 5
_RANKS = (1, 10, 100, 1000, 10_000, 100_000)
_INTERVAL = (0.1, 0.5, 0.9)  # quantiles of the ranks of the tokens that an expert is given


def d_figures3_5(study: Study) -> Finding:
    """DynaMo, figures 3 (significance by data set), 4 (joint distribution) and 5 (clusters)."""
    case = by_rounding(on_all(dynamo(study.options.bits), study.texts.domains))
    model, _ = study.compiler.compile(case)
    analysis: Analysis = model.moe_report.analysis
    rows = [row for path, layer in analysis.layers.items() for row in _dynamo_rows(study, analysis, path, layer)]
    names = analysis.datasets
    significance, joint, clusters = [], [], []
    for path, layer in analysis.layers.items():
        spread = layer.significance.max(dim=0).values - layer.significance.min(dim=0).values
        expert = int(spread.argmax())
        values = layer.significance[:, expert].tolist()
        significance.append([path, str(expert), *(show(value, ".3f") for value in values)])
        pairs = [float(layer.correlation[i, j]) for i in range(len(names)) for j in range(i)]
        low = show(min(pairs, default=None), ".2f")
        joint.append(
            [
                path,
                show(float(layer.baseline.min()), ".3f"),
                show(float(layer.baseline.max()), ".3f"),
                show(float(layer.dynamics.mean()), ".3f"),
                low,
                *(show(value) for value in layer.dataset_weights.tolist()),
            ]
        )
        counts = Counter(next(iter(layer.bits.values())))
        centers = ", ".join(show(one, ".3f") for one in layer.centers or ())
        clusters.append([path, *(str(counts[width]) for width in (2, 4, 6, 8)), centers])
    return Finding(
        "d-figures3-5",
        f"significance, joint distribution, clusters ({published.DYNAMO}, figures 3 to 5)",
        f"{study.name}, calibrated on all domains: {_tokens(analysis)}. All experts are in the CSV and JSON files.",
        (
            markdown_table(("figure 3: MoE block", "expert", *names), significance)
            + "\n\nSignificance of the expert whose significance differs most between data sets; a layer's sum to the "
            "number of experts per token. The paper: expert 28, above 0.5 on WikiText-2 and below 0.1 on C4.",
            markdown_table(
                (
                    "figure 4: MoE block", "least baseline", "most", "mean dynamics", "least correlation",
                    *(f"weight of {name}" for name in names),
                ),
                joint,
            ),
            markdown_table(("figure 5: MoE block", "INT2", "INT4", "INT6", "INT8", "centres"), clusters)
            + "\n\nExperts of each width.",
        ),
        (
            "the joint distribution is a Gaussian over data sets; its correlations weigh the data sets, and an "
            "expert's baseline is the weighted mean of its significances. The figure's diagonal is taken as that "
            "baseline, its other bars as the dynamics (standard deviation / mean over data sets).",
            "the clusters start from centres at the quantiles of the baseline, weighted by token shares; a bound on "
            "the bits moves the boundaries between them.",
        ),
        rows,
    )  # fmt: skip


def m_figures2_5(study: Study) -> Finding:
    """MoQa, figures 2 (token utilization), 3 (mapping), 4 (expert significance) and 5 (similarity)."""
    case = by_rounding(on_all(moqa(study.options.bits), study.texts.domains))
    model, _ = study.compiler.compile(case)
    analysis: Analysis = model.moe_report.analysis
    traces = trace(study.model, study.texts.calibration)
    rows, utilization = [], []
    for name, tokens in analysis.tokens.items():
        top_k = next(iter(analysis.layers.values())).top_k
        before = tokens.utilization(top_k)
        after = before * token_weights(tokens.counts, ALPHA)
        utilization.append([name, show(tokens.law.beta), *_at_ranks(before), *_at_ranks(after)])
        rows += _ranked("m-figures2-5", study, name, {"utilization": before, "re-weighted utilization": after})
    mapping, partition = [], []
    for dataset, found in traces.items():
        for path, one in found.layers.items():
            rows += _mapping_rows(study, path, dataset, one)
        correlations = [one.rank_correlation for one in found.layers.values()]
        mapping.append([dataset, *(show(value) for value in (min(correlations), max(correlations)))])
        fits = [moqa_partition(one.significance) for one in found.layers.values()]
        patterns = Counter(fit.pattern for fit in fits)
        means = (sum(getattr(fit, name) for fit in fits) / len(fits) for name in ("mean", "std"))
        partition.append([dataset, *(show(value, ".3f") for value in means), str(patterns[1]), str(patterns[2])])
    similarity = []
    for path, layer in analysis.layers.items():
        chosen, values, agreement = _similarity(layer, next(iter(traces.values())).layers[path].significance)
        rows += [
            PaperRow("m-figures2-5", "measured", study.name, "original", "cosine similarity", item, value, "", path)
            for item, value in values.items()
        ]
        low, high = min(values.values()), max(values.values())
        similarity.append([path, ", ".join(map(str, chosen)), show(low, ".3f"), show(high, ".3f"), show(agreement)])
    ranks = [f"rank {rank:,}" for rank in _RANKS[:4]]
    return Finding(
        "m-figures2-5",
        f"utilization, mapping, significance, similarity ({published.MOQA}, figures 2 to 5)",
        f"{study.name}, analysed on all domains: {_tokens(analysis)}. All ranks, experts and pairs are in the CSV and "
        "JSON files.",
        (
            markdown_table(
                ("figure 2: data set", "β", *ranks, *(f"{rank}, re-weighted" for rank in ranks)), utilization
            )
            + "\n\nToken utilization, k times the share of the token.",
            markdown_table(("figure 3: data set", "least", "most over layers"), mapping)
            + "\n\nRank correlation between an expert's activation rate and the median rank of its tokens: the paper's "
            "experts with high activation rates have tokens from the head, which is a negative one.",
            markdown_table(("figure 4: data set", "mean μ", "mean σ", "layers of pattern 1", "of pattern 2"), partition)
            + "\n\nThe paper: WikiText-2 is pattern 1 with experts up to 0.8, C4 is pattern 2.",
            markdown_table(("figure 5: MoE block", "experts", "least", "most", "agreement"), similarity)
            + "\n\nCosine similarity of eight experts' weights, from the least to the most significant on the first "
            "data set; agreement is the correlation between a pair's similarity and minus its difference in "
            "significance.",
        ),
        (
            "re-weighting multiplies by (f(rank) / f(1))^0.3: the paper's text weakens the tail, its formula U^(-α) "
            "would weaken the head.",
            "the fitted power law is over the tokens' frequencies by rank; tokens that are equally frequent share a "
            "weight.",
            "pattern 1 is σ / μ above 0.5; the paper tells the patterns apart by eye.",
            "figures 3 and 4 are of the original's routing by data set, observed where its experts are called.",
        ),
        rows,
    )


def _tokens(analysis: Analysis) -> str:
    return ", ".join(f"{name} {int(one.counts.sum()):,} tokens" for name, one in analysis.tokens.items())


def _dynamo_rows(study: Study, analysis: Analysis, path: str, layer: LayerAnalysis) -> Iterator[PaperRow]:
    def row(quantity: str, item: str, value: float, unit: str = "", method: str = "DynaMo") -> PaperRow:
        return PaperRow("d-figures3-5", "measured", study.name, method, quantity, item, value, unit, path)

    for number, name in enumerate(analysis.datasets):
        for expert, value in enumerate(layer.significance[number].tolist()):
            yield row("significance", f"expert {expert} on {name}", value)
        yield row("data set weight", name, float(layer.dataset_weights[number]))
        for other, value in zip(analysis.datasets, layer.correlation[number].tolist(), strict=True):
            yield row("correlation", f"{name}, {other}", value)
    for expert in range(layer.num_experts):
        yield row("baseline", f"expert {expert}", float(layer.baseline[expert]))
        yield row("dynamics", f"expert {expert}", float(layer.dynamics[expert]))
        for linear, widths in layer.bits.items():
            yield row("width", f"expert {expert}, {linear}", widths[expert], "bits")
    for number, center in enumerate(layer.centers or ()):
        yield row("centre", f"cluster {number}", center)


def _at_ranks(values: Tensor) -> list[str]:
    return [show(float(values[rank - 1]) if rank <= len(values) else None, ".2e") for rank in _RANKS[:4]]


def _ranked(experiment: str, study: Study, name: str, curves: Mapping[str, Tensor]) -> Iterator[PaperRow]:
    """A curve over ranks, at ten ranks a decade."""
    for quantity, values in curves.items():
        ranks = sorted({round(10 ** (step / 10)) for step in range(10 * len(_RANKS))})
        for rank in (one for one in ranks if one <= len(values)):
            yield PaperRow(experiment, "measured", study.name, name, quantity, f"rank {rank}", float(values[rank - 1]))


def _mapping_rows(study: Study, path: str, dataset: str, one: DatasetTrace) -> Iterator[PaperRow]:
    def row(quantity: str, item: str, value: float) -> PaperRow:
        return PaperRow("m-figures2-5", "measured", study.name, "original", quantity, item, value, "", path)

    for expert in range(len(one.rate)):
        item = f"expert {expert} on {dataset}"
        yield row("activation rate", item, float(one.rate[expert]))
        yield row("significance", item, float(one.significance[expert]))
        if one.ranks[expert].numel():
            quantiles = torch.quantile(one.ranks[expert].double(), torch.tensor(_INTERVAL, dtype=torch.float64))
            for level, value in zip(_INTERVAL, quantiles.tolist(), strict=True):
                yield row(f"rank of its tokens, quantile {level}", item, value)


def _similarity(layer: LayerAnalysis, significance: Tensor) -> tuple[Sequence[int], dict[str, float], float | None]:
    """Eight experts evenly over the order of significance, their pairs' similarity, and the agreement of all pairs."""
    assert layer.similarity is not None
    order = significance.argsort().tolist()
    count = min(COMPARED_EXPERTS, len(order))
    chosen = [order[round(place * (len(order) - 1) / max(1, count - 1))] for place in range(count)]
    pairs = {f"experts {a}, {b}": float(layer.similarity[a, b]) for a, b in _pairs(chosen)}
    alike = [float(layer.similarity[a, b]) for a, b in _pairs(order)]
    apart = [abs(float(significance[a] - significance[b])) for a, b in _pairs(order)]
    varies = min(len(set(alike)), len(set(apart))) > 1
    agreement = -float(np.corrcoef(alike, apart)[0, 1]) if varies else None
    return chosen, pairs, agreement


def _pairs(experts: Sequence[int]) -> Iterator[tuple[int, int]]:
    for place, first in enumerate(experts):
        for second in experts[place + 1 :]:
            yield first, second
