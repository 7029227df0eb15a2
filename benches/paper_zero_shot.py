"""Tables of zero-shot accuracies: DynaMo's table II, MoQa's table 3."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import paper_published as published
from accuracy_suites import Case
from accuracy_windows import load_windows
from harness import markdown_table
from paper_results import Finding, PaperRow, show, span
from paper_study import BITS_READING, GPTQ_READING, RANDOM_READING, RULE, Study, dynamo, gptq, moqa, random_half
from torch import Tensor

from moe_compiler import zero_shot
from moe_compiler.baseline import uniform_baseline
from moe_compiler.tasks.harness import load_tasks, read_documents

SWITCHED = f"DynaMo, {RULE}"
_PERCENT = 100.0


@dataclass(frozen=True)
class Scores:
    """One method.

    Attributes:
        bits: code bits.
        accuracy: by task, per cent.
        documents: by task, how many were scored.
    """

    bits: float
    accuracy: Mapping[str, float]
    documents: Mapping[str, int]

    @property
    def mean(self) -> float:
        """Over the tasks."""
        return sum(self.accuracy.values()) / len(self.accuracy)


def d_table2(study: Study) -> Finding:
    """DynaMo, table II."""
    cases = [gptq(3), random_half(), dynamo(study.options.bits)]
    readings = (
        f"switching is by rule `{RULE}` to each task's prompts, without their answers: those of its training set where "
        f"there is one, else of the documents that are scored; at most {study.options.adapt_tokens:,} tokens. The "
        "paper does not name the tokens; its ablation has this table's figure for CB in the column with switching.",
    )
    return _tasks(study, "d-table2", published.DYNAMO, "table II", cases, readings)


def m_table3(study: Study) -> Finding:
    """MoQa, table 3."""
    cases = [gptq(3), random_half(), gptq(2), moqa(study.options.bits)]
    return _tasks(study, "m-table3", published.MOQA, "table 3", cases, ("nothing is switched.",))


def _tasks(
    study: Study, experiment: str, paper: str, table: str, cases: Sequence[Case], readings: Sequence[str]
) -> Finding:
    tasks = study.options.tasks
    found = {"original": _scores(study, study.model, 8.0 * next(study.model.parameters()).element_size(), tasks)}
    for case in cases:
        found |= _case(study, case, tasks)
    theirs = published.ZERO_SHOT[paper]
    header = ["", "code bits", *tasks, "mean", "paper: mean"]
    lines = [
        [
            name,
            show(one.bits),
            *map(show, one.accuracy.values()),
            show(one.mean),
            _mean(theirs, name, tasks),
        ]
        for name, one in found.items()
    ]
    documents = ", ".join(f"{task} {number}" for task, number in found["original"].documents.items())
    rows = [
        PaperRow(experiment, "measured", study.name, name, "accuracy", task, value, "%")
        for name, one in found.items()
        for task, value in one.accuracy.items()
    ]
    return Finding(
        experiment,
        f"zero-shot tasks ({paper}, {table})",
        f"{study.conditions} Documents scored: {documents}.",
        (
            markdown_table(header, lines) + "\n\nAccuracy in per cent.",
            _published_table(theirs) + f"\n\nAccuracy in per cent; {paper}. The means are those of the six columns; "
            "the averages that the paper prints are not always that.",
        ),
        (
            "prompts, choices and the metric `acc` are lm-eval's; the papers name no harness.",
            *readings,
            RANDOM_READING,
            BITS_READING.format(bits=study.options.bits),
            GPTQ_READING,
        ),
        [*rows, *_published(experiment, theirs)],
    )


def _case(study: Study, case: Case, tasks: Sequence[str]) -> dict[str, Scores]:
    study.workbench.say(f"{case.suite}: {case.name}")
    if case.bits is not None:
        data, config = study.compiler.calibration(case), study.compiler.config(case, None)
        baseline = uniform_baseline(study.model, data, case.bits, config)
        return {case.name: _scores(study, baseline.model, case.bits, tasks)}
    model, _ = study.compiler.compile(case)
    bits = model.moe_report.code_bits
    found = {case.name: _scores(study, model, bits, tasks)}
    if case.rules:
        accuracy: dict[str, float] = {}
        documents: dict[str, int] = {}
        for task in tasks:
            model.runtime.adapt(_prompts(study, task), name=task, rule=RULE)
            one = _scores(study, model, bits, [task])
            accuracy |= one.accuracy
            documents |= one.documents
            model.runtime.revert()
        found[case.adapted_name(RULE)] = Scores(bits, accuracy, documents)
    return found


def _scores(study: Study, model: Any, bits: float, tasks: Sequence[str]) -> Scores:
    given = study.options
    result = zero_shot(
        model, study.tokenizer, tasks, limit=given.limit, data=given.task_data, seed=given.seed, progress=False
    )
    return Scores(
        bits,
        {name: _PERCENT * score.metrics["acc"].value for name, score in result.tasks.items()},
        {name: score.documents for name, score in result.tasks.items()},
    )


def _prompts(study: Study, task: str) -> list[Tensor]:
    """Windows of a task's prompts, to switch to."""
    data = study.options.task_data
    logger = logging.getLogger("lm_eval")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        loaded = load_tasks([task], read_documents([task], data), 0, study.options.seed)[task]
    finally:
        logger.setLevel(level)
    documents = loaded.training_docs() if loaded.has_training_docs() else loaded.eval_docs
    text = "\n\n".join(loaded.doc_to_text(document) for document in documents)
    return load_windows(study.tokenizer, text, study.options.window, study.options.adapt_tokens)


def _mean(table: Mapping[str, Mapping[str, published.Accuracies]], name: str, tasks: Sequence[str]) -> str:
    """The least and the most of the paper's models, over the same tasks."""
    method = {SWITCHED: "DynaMo"}.get(name, name)
    if (name == "DynaMo") or any(method not in methods for methods in table.values()):
        return "–"
    columns = [published.TASKS.index(task) for task in tasks if task in published.TASKS]
    if not columns:
        return "–"
    return span([sum(methods[method].accuracy[c] for c in columns) / len(columns) for methods in table.values()])


def _published_table(table: Mapping[str, Mapping[str, published.Accuracies]]) -> str:
    lines = [
        [model, method, f"{one.bits:g}", *map(show, one.accuracy), show(one.mean)]
        for model, methods in table.items()
        for method, one in methods.items()
    ]
    return markdown_table(("the paper", "method", "#Bits", *published.TASKS, "mean"), lines)


def _published(experiment: str, table: Mapping[str, Mapping[str, published.Accuracies]]) -> Iterator[PaperRow]:
    for model, methods in table.items():
        for method, one in methods.items():
            for task, value in zip(published.TASKS, one.accuracy, strict=True):
                yield PaperRow(experiment, "published", model, method, "accuracy", task, value, "%")
