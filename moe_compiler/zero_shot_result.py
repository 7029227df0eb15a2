"""What a zero-shot evaluation found."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class Metric:
    """A metric's value.

    Args:
        value: for accuracies and F1 a fraction, not per cent.
        stderr: its standard error, or `None` where lm-eval gives none.
    """

    value: float
    stderr: float | None = None

    def __str__(self) -> str:
        return f"{self.value:.4f}" if self.stderr is None else f"{self.value:.4f} ± {self.stderr:.4f}"


@dataclass(frozen=True)
class TaskScore:
    """A task's result.

    Args:
        metrics: by name, such as `"acc"`; `"acc_norm"` compares log-likelihoods per byte of the choice.
        documents: how many were scored.
        available: how many the task has.
        version: of lm-eval's definition of the task.
        source: the hub data set, or the files.
    """

    metrics: Mapping[str, Metric]
    documents: int
    available: int
    version: str
    source: str


@dataclass(frozen=True)
class ZeroShotResult:
    """Scores by task, and what they depend on.

    Args:
        tasks: the scores.
        num_fewshot: worked examples in the prompts.
        limit: at most so many documents of each task.
        seed: of the choice of documents and examples.
        lm_eval: version of the library.
    """

    tasks: Mapping[str, TaskScore]
    num_fewshot: int
    limit: int | None
    seed: int
    lm_eval: str

    @property
    def mean_accuracy(self) -> float:
        """The mean of `acc` over the tasks that have it, as papers report it; NaN where none has."""
        values = [score.metrics["acc"].value for score in self.tasks.values() if "acc" in score.metrics]
        return sum(values) / len(values) if values else float("nan")

    def to_dict(self) -> dict[str, Any]:
        """The result in dicts, strings and numbers, for JSON."""
        return asdict(self) | {"mean_accuracy": self.mean_accuracy}

    def __str__(self) -> str:
        names = list(dict.fromkeys(name for score in self.tasks.values() for name in score.metrics))
        rows = [["task", "documents", *names]]
        for task, score in self.tasks.items():
            cells = [str(score.metrics[name]) if name in score.metrics else "" for name in names]
            part = f"{score.documents}" + ("" if score.documents == score.available else f" of {score.available}")
            rows.append([task, part, *cells])
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
        sources = [f"{task}: {score.source}" for task, score in self.tasks.items()]
        shots = "zero-shot" if self.num_fewshot == 0 else f"{self.num_fewshot} examples"
        summary = f"mean acc {self.mean_accuracy:.4f}; {shots}, seed {self.seed}, lm-eval {self.lm_eval}"
        return "\n".join([lines[0], "─" * (sum(widths) + 2 * len(widths) - 2), *lines[1:], "", summary, *sources])
