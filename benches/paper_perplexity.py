"""Tables of perplexities: DynaMo's tables I and III, MoQa's table 2."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from math import exp, log

import paper_published as published
from accuracy_rows import Row
from accuracy_suites import ORIGINAL, Case
from harness import markdown_table
from paper_results import Finding, PaperRow, show, span
from paper_study import (
    BITS_READING,
    GPTQ_READING,
    RANDOM_READING,
    RULE,
    SWITCH_READING,
    Study,
    dynamo,
    gptq,
    moqa,
    random_half,
)

SWITCHED = f"DynaMo, {RULE}"
ONLY_BASELINE = dynamo("paper", pool=False).name
COMPARED = {SWITCHED: "DynaMo", "DynaMo": ""}
"""By a row's name, the paper's method where it has another name; it has no DynaMo that was not switched."""


def d_table1(study: Study) -> Finding:
    """DynaMo, table I."""
    cases = [gptq(3), random_half(), dynamo(study.options.bits)]
    readings = (SWITCH_READING, "the paper's DynaMo is compared with ours after switching: its ablation has the same "
        "figure in the column with switching.", RANDOM_READING, GPTQ_READING)  # fmt: skip
    return _language_modeling(study, "d-table1", published.DYNAMO, "table I", cases, COMPARED, readings)


def m_table2(study: Study) -> Finding:
    """MoQa, table 2."""
    cases = [gptq(3), random_half(), gptq(2), moqa(study.options.bits)]
    readings = (
        "the paper analyses one data set at a time; here the seen domains are pooled. A bound on the bits moves its "
        "threshold, the mean significance. Its INT8 channels lie in a pool of 1 % of the channels. Nothing is "
        "switched.",
        RANDOM_READING,
        GPTQ_READING,
    )
    return _language_modeling(study, "m-table2", published.MOQA, "table 2", cases, {}, readings)


def d_table3(study: Study) -> Finding:
    """DynaMo, table III, language modeling; `d-table2` has accuracies before and after switching."""
    if not study.texts.new:
        raise ValueError("`new` must name at least one domain for d-table3, which switches to it, but there is none")
    bits = study.options.bits
    cases = [gptq(3), dynamo(bits, pool=False), dynamo(bits)]
    rows = study.measure(cases)
    columns = {"GPTQ": "GPTQ-3", "Only BQ": ONLY_BASELINE, "+ DQS": SWITCHED}
    lines = [["original", *_bits(rows["original"]), *(show(rows["original"].perplexity(d)) for d in study.texts.new)]]
    for label, name in columns.items():
        cells = [show(rows[name].perplexity(domain)) for domain in study.texts.new]
        lines.append([label, *_bits(rows[name]), *cells])
    header = ["", "code bits", "effective bits", *(f"{domain} (new)" for domain in study.texts.new)]
    theirs = [
        [model, task, *(show(value) for value in values), _steps(values)]
        for model, by_task in published.ABLATION.items()
        for task, values in by_task.items()
    ]
    measured = {name: rows[name] for name in ("original", *columns.values())}
    figures = [
        *_measured("d-table3", study, measured, study.texts.new),
        *(
            PaperRow("d-table3", "published", model, label, *_quantity(task), value, "%" if task == "CB" else "")
            for model, by_task in published.ABLATION.items()
            for task, values in by_task.items()
            for label, value in zip(columns, values, strict=True)
        ),
    ]
    return Finding(
        "d-table3",
        f"ablation ({published.DYNAMO}, table III)",
        study.conditions,
        (
            markdown_table(header, lines) + "\n\nPerplexity.",
            markdown_table(("the paper", "on", *columns, "gap to GPTQ, then to only BQ"), theirs)
            + "\n\nPerplexity on WikiText-2 (Wiki); accuracy in per cent on CB. The paper prints 1.23 where the last "
            "column has -1.14.",
        ),
        (
            "only baseline quantization (BQ) is compiled on the seen domains, without a pool, and measured on the new "
            "ones, as the paper does it on C4 and RTE for WikiText-2 and CB. Dynamic quantization switching (DQS) "
            "then adapts to each new domain. Accuracies before and after switching are in d-table2.",
            SWITCH_READING,
            BITS_READING.format(bits=bits),
            GPTQ_READING,
        ),
        figures,
    )


def _language_modeling(
    study: Study,
    experiment: str,
    paper: str,
    table: str,
    cases: Sequence[Case],
    compared: Mapping[str, str],
    readings: Sequence[str],
) -> Finding:
    """Perplexities of all methods on every domain, and how often the original's, beside the paper's."""
    rows = study.measure(cases)
    original = rows[ORIGINAL.name]
    texts, theirs = study.texts, published.PERPLEXITY[paper]
    header = [
        "",
        "code bits",
        "effective bits",
        *texts.seen,
        *(f"{one} (new)" for one in texts.new),
        "× original, seen",
    ]
    header += ["× original, new", "paper: × original, Wiki", "paper: C4"]
    lines = []
    for name, row in rows.items():
        cells = [show(row.perplexity(domain), ".3f") for domain in texts.domains]
        times = [show(_times(row, original, domains), ".3f") for domains in (texts.seen, texts.new)]
        lines.append([name, *_bits(row), *cells, *times, *_published_times(theirs, compared.get(name, name))])
    return Finding(
        experiment,
        f"language modeling ({paper}, {table})",
        study.conditions,
        (markdown_table(header, lines) + "\n\nPerplexity.", _published_table(theirs, paper)),
        (*readings, BITS_READING.format(bits=study.options.bits)),
        [*_measured(experiment, study, rows, texts.domains), *_published(experiment, theirs)],
    )


def _times(row: Row, original: Row, domains: Sequence[str]) -> float | None:
    """Geometric mean over domains of the perplexity as a multiple of the original's."""
    if not domains:
        return None
    return exp(sum(log(row.perplexity(one) / original.perplexity(one)) for one in domains) / len(domains))


def _published_times(table: Mapping[str, Mapping[str, published.Perplexities]], method: str) -> tuple[str, str]:
    if any(method not in methods for methods in table.values()):
        return "–", "–"
    pairs = [(methods[method], methods[published.ORIGINAL]) for methods in table.values()]
    return span([ours.wiki / original.wiki for ours, original in pairs]), span(
        [ours.c4 / original.c4 for ours, original in pairs]
    )


def _published_table(table: Mapping[str, Mapping[str, published.Perplexities]], paper: str) -> str:
    lines = [
        [model, method, f"{one.bits:g}", show(one.wiki), show(one.c4)]
        for model, methods in table.items()
        for method, one in methods.items()
    ]
    return markdown_table(("the paper", "method", "#Bits", "WikiText-2", "C4"), lines) + f"\n\nPerplexity; {paper}."


def _bits(row: Row) -> tuple[str, str]:
    mark = "*" if row.bits_source == "formula" else ""
    return show(row.code_bits), show(row.effective_bits) + mark


def _measured(experiment: str, study: Study, rows: Mapping[str, Row], domains: Sequence[str]) -> Iterator[PaperRow]:
    for name, row in rows.items():
        for quantity, value in (("code bits", row.code_bits), ("effective bits", row.effective_bits)):
            if value is not None:
                yield PaperRow(experiment, "measured", study.name, name, quantity, "", value, "bits")
        for domain in domains:
            yield PaperRow(experiment, "measured", study.name, name, "perplexity", domain, row.perplexity(domain))


def _published(experiment: str, table: Mapping[str, Mapping[str, published.Perplexities]]) -> Iterator[PaperRow]:
    for model, methods in table.items():
        for method, one in methods.items():
            yield PaperRow(experiment, "published", model, method, "#Bits", "", one.bits, "bits")
            yield PaperRow(experiment, "published", model, method, "perplexity", "WikiText-2", one.wiki)
            yield PaperRow(experiment, "published", model, method, "perplexity", "C4", one.c4)


def _quantity(task: str) -> tuple[str, str]:
    return ("perplexity", "WikiText-2") if task == "Wiki" else ("accuracy", "cb")


def _steps(values: Sequence[float]) -> str:
    return ", ".join(f"{after - before:+.2f}" for before, after in pairwise(values))
