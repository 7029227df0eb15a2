"""What the columns of a task's published files mean: they become those that lm-eval's task reads."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from moe_compiler.tasks.rows import Row

CLASSES = {"0": 0, "1": 1}
"""Labels of two classes, where they are numbers."""


@dataclass(frozen=True)
class TaskFormat:
    """A task's files.

    Args:
        folders: names that the folder with its files goes by, in lower case and without punctuation.
        split: the split that lm-eval's task evaluates.
        to_document: a row of a file as lm-eval's task reads it; raises `KeyError` where a column is missing and
            `ValueError` where a label is none.
    """

    folders: Sequence[str]
    split: str
    to_document: Callable[[Row], Row]


def _arc(row: Row) -> Row:
    """AI2's files nest the choices in the question, and name each by its label; the hub's do not."""
    question, choices = row["question"], row.get("choices")
    if choices is None:
        question, given = question["stem"], question["choices"]
        choices = {key: [choice[key] for choice in given] for key in ("text", "label")}
    if row["answerKey"] not in choices["label"]:
        raise ValueError(f"{row['answerKey']!r} is none of {', '.join(choices['label'])}")
    return {"question": question, "choices": choices, "answerKey": row["answerKey"]}


def _piqa(row: Row) -> Row:
    return {name: row[name] for name in ("goal", "sol1", "sol2")} | {"label": _label(row["label"], CLASSES)}


def _rte(row: Row) -> Row:
    """PASCAL's XML has the attribute `value` (first challenge) or `entailment`; SuperGLUE says premise, hypothesis."""
    names = {"yes": 0, "true": 0, "entailment": 0, "no": 1, "false": 1, "not_entailment": 1}
    return {
        "sentence1": _first(row, "sentence1", "premise", "t"),
        "sentence2": _first(row, "sentence2", "hypothesis", "h"),
        "label": _label(_first(row, "label", "entailment", "value"), CLASSES | names),
    }


def _copa(row: Row) -> Row:
    """The XML counts the alternatives from 1."""
    from_one = "most-plausible-alternative" in row
    return {
        "premise": _first(row, "premise", "p"),
        "choice1": _first(row, "choice1", "a1"),
        "choice2": _first(row, "choice2", "a2"),
        "question": _first(row, "question", "asks-for"),
        "label": _label(_first(row, "label", "most-plausible-alternative"), {"1": 0, "2": 1} if from_one else CLASSES),
    }


def _cb(row: Row) -> Row:
    names = {"entailment": 0, "contradiction": 1, "neutral": 2}
    label = _label(row["label"], CLASSES | {"2": 2} | names)
    return {"premise": row["premise"], "hypothesis": row["hypothesis"], "label": label}


def _first(row: Row, *names: str) -> Any:
    """The column that the row has of those that mean the same."""
    return row[next((name for name in names if name in row), names[0])]


def _label(value: Any, names: Mapping[str, int]) -> int:
    if str(value).lower() not in names:
        raise ValueError(f"{value!r} is none of {', '.join(names)}")
    return names[str(value).lower()]


FORMATS = MappingProxyType(
    {
        "arc_challenge": TaskFormat(("arcchallenge",), "test", _arc),
        "arc_easy": TaskFormat(("arceasy",), "test", _arc),
        "cb": TaskFormat(("cb",), "validation", _cb),
        "copa": TaskFormat(("copa",), "validation", _copa),
        "piqa": TaskFormat(("piqa",), "validation", _piqa),
        "rte": TaskFormat(("rte",), "validation", _rte),
    }
)
"""By the name of lm-eval's task. Published as: ARC, AI2's jsonl; RTE, PASCAL's XML of the challenges 1 to 3, GLUE's tsv
or SuperGLUE's jsonl; PIQA, jsonl with labels beside it; COPA, the authors' XML or SuperGLUE's jsonl; CB, SuperGLUE's
jsonl. Or any of them as the hub's parquet files."""
