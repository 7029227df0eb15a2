"""The tables of a report."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from statistics import median
from typing import Any

from moe_compiler.analysis import Analysis, LayerAnalysis
from moe_compiler.coverage import CompileReport, put_together
from moe_compiler.report.adaptation import divergence_matrix
from moe_compiler.report.page import Cell, Part, table_part
from moe_compiler.report.tokens import weights_by_rank
from moe_compiler.runtime.profile import Profile
from moe_compiler.runtime.report import AdaptReport

FREQUENT = 10


def overview(report: CompileReport, analysis: Analysis) -> tuple[Part, ...]:
    """What was compiled and how, and its perplexities where somebody measured them."""
    measured = (perplexities(report),) if report.perplexities else ()
    return (summary(report, analysis), *measured, settings(report))


def summary(report: CompileReport, analysis: Analysis) -> Part:
    """What was compiled, in a few lines."""
    layers = list(analysis.layers.values())
    experts = sorted({layer.num_experts for layer in layers})
    top_k = sorted({layer.top_k for layer in layers})
    target = report.plan.target_bits
    rows = [
        ("strategy", analysis.strategy),
        ("MoE blocks", str(len(layers))),
        ("experts in a block", " or ".join(map(str, experts))),
        ("experts per token", " or ".join(map(str, top_k))),
        ("weights of routed experts", f"{report.experts.weights:,}"),
        ("their size now, MB", f"{report.experts.size_bytes / 1e6:,.3f}"),
        ("code bits per weight", f"{report.code_bits:.3f}"),
        ("effective bits per weight", f"{report.effective_bits:.3f}"),
        ("target, effective bits", "none" if target is None else f"{target:g}"),
    ]
    return table_part(
        "summary", "Summary", "Bits are those of the routed experts, everything counted.", ("", "value"), rows
    )


def perplexities(report: CompileReport) -> Part:
    """The perplexities that were recorded in the report."""
    rows: list[tuple[Cell, ...]] = [
        (name, original, compiled, 100 * math.log(compiled / original))
        for name, (original, compiled) in report.perplexities.items()
    ]
    caption = "Perplexity as it was recorded with the model; loss is 100 ln(compiled / original)."
    return table_part("perplexities", "Perplexity", caption, ("dataset", "original", "compiled", "loss"), rows)


def settings(report: CompileReport) -> Part:
    """Every field of the configuration."""
    rows = [(name, "–" if value is None else str(value)) for name, value in asdict(report.config).items()]
    caption = "The fields of CompileConfig that the model was compiled with."
    return table_part("settings", "Settings", caption, ("field", "value"), rows)


def datasets(analysis: Analysis) -> Part:
    """The calibration data and their token statistics."""
    rows: list[tuple[Cell, ...]] = []
    for name, tokens in analysis.tokens.items():
        law = tokens.law
        weights = weights_by_rank(tokens, analysis.alpha)
        mean = float((weights * tokens.frequency()).sum())
        rows.append((name, int(tokens.counts.sum()), len(tokens.ids), law.C, law.beta, mean))
    caption = (
        "Tokens of each calibration dataset, the power law f = C·rank^(-β) of their relative frequencies (MoQa's "
        f"equation 1) and the mean weight of a token at α = {analysis.alpha:g} (equation 2)."
    )
    header = ("dataset", "tokens", "different tokens", "C", "β", "mean weight")
    return table_part("datasets", "Datasets", caption, header, rows)


def frequent_tokens(analysis: Analysis, tokenizer: Any) -> Part:
    """The most frequent tokens of each dataset."""
    rows: list[tuple[Cell, ...]] = []
    for name, tokens in analysis.tokens.items():
        weights = weights_by_rank(tokens, analysis.alpha)
        share = 100 * tokens.frequency()
        for rank in range(min(FREQUENT, len(tokens.ids))):
            number = int(tokens.ids[rank])
            text = str(number) if tokenizer is None else json.dumps(tokenizer.decode([number]), ensure_ascii=False)
            rows.append((name, rank + 1, text, int(tokens.counts[rank]), float(share[rank]), float(weights[rank])))
    caption = f"The {FREQUENT} most frequent tokens of each dataset, with the weight that re-weighting gives them."
    header = ("dataset", "rank", "token id" if tokenizer is None else "token", "times", "% of tokens", "weight")
    return table_part("frequent-tokens", "Frequent tokens", caption, header, rows)


def layers(report: CompileReport, analysis: Analysis) -> Part:
    """Every MoE block in one line."""
    rows: list[tuple[Cell, ...]] = []
    for path, layer in analysis.layers.items():
        entries = report.of_block(path)
        routed = put_together([entry for entry in entries if entry.kind == "experts"])
        size = sum(entry.size_bytes for entry in entries) / 1e6
        rare = len({expert for experts in report.blended.get(path, {}).values() for expert in experts})
        rows.append(
            (
                path,
                routed.code_bits,
                routed.effective_bits,
                size,
                float(layer.dynamics.mean()),
                _similarity(layer),
                rare,
            )
        )
    caption = (
        "Bits per weight of the routed experts, megabytes of the whole block, mean dynamics D of the experts, median "
        "cosine similarity of pairs of experts, and how many experts saw too few tokens for a Hessian of their own."
    )
    header = ("MoE block", "code bits", "effective bits", "MB", "mean D", "similarity", "rare experts")
    return table_part("layers", "Layers", caption, header, rows)


def coverage(report: CompileReport) -> Part:
    """What was done to each kind of linear."""
    rows = [
        (
            group.pattern,
            group.linears,
            group.outcome,
            group.weights,
            group.size_bytes / 1e6,
            group.code_bits,
            group.effective_bits,
        )
        for group in report.groups()
    ]
    header = ("linear", "number", "outcome", "weights", "MB", "code bits", "effective bits")
    caption = "Every linear of the MoE blocks; * stands for the layer."
    return table_part("coverage-table", "Coverage in numbers", caption, header, rows)


def profiles(known: Mapping[str, Profile], adaptations: Sequence[AdaptReport]) -> Part:
    """The profiles, and what adapting to their data did where that is known."""
    reports = {report.name: report for report in adaptations}
    distance = divergence_matrix(known)[1][0]
    rows: list[tuple[Cell, ...]] = []
    for i, (name, profile) in enumerate(known.items()):
        pools = profile.pools.values()
        slots = f"{sum(pool.used for pool in pools):,} of {sum(pool.capacity for pool in pools):,}"
        found = reports.get(name)
        rows.append(
            (
                name,
                profile.rule,
                profile.tokens,
                slots,
                profile.size_bytes / 1e6,
                float(distance[i]),
                "–" if found is None else f"{100 * _error_left(found):.1f}",
                "–" if found is None else f"{sum(found.seconds.values()):.2f}",
            )
        )
    caption = (
        "The contents of the pools by name; tokens are those that adapting observed (0: not known). Divergence: mean "
        f"Jensen-Shannon divergence in bits of the routing from that of {next(iter(known))!r}. Error left: expected "
        "squared error on the new data, all linears together, in per cent of that before adapting."
    )
    header = ("profile", "rule", "tokens", "slots", "MB", "divergence", "error left, %", "seconds")
    return table_part("profiles", "Profiles", caption, header, rows)


def _error_left(report: AdaptReport) -> float:
    changes = [change for layer in report.layers for change in layer.linears]
    before = sum(change.error_before for change in changes)
    return sum(change.error_after for change in changes) / before if before else 1.0


def _similarity(layer: LayerAnalysis) -> Cell:
    if layer.similarity is None or layer.num_experts < 2:
        return "–"
    pairs = layer.similarity.double()
    return median(float(pairs[i, j]) for i in range(layer.num_experts) for j in range(i + 1, layer.num_experts))
