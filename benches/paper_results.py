"""What an experiment of the papers gives: figures, one per line of the CSV file, and tables to print."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

Source = Literal["measured", "published"]


@dataclass(frozen=True)
class PaperRow:
    """One figure.

    Attributes:
        experiment: such as `"d-table1"`.
        source: who says it: this run, or the paper.
        model: what it is measured on.
        method: how the model was quantized, or what else the figure belongs to.
        quantity: what the figure is.
        item: what of it: a domain, a task, an expert.
        layer: path of the MoE block, where it belongs to one.
        value: the figure; infinite where accuracy collapsed.
        unit: its unit; empty for plain numbers.
    """

    experiment: str
    source: Source
    model: str
    method: str
    quantity: str
    item: str
    value: float
    unit: str = ""
    layer: str = ""


@dataclass(frozen=True)
class Finding:
    """What one experiment found.

    Attributes:
        experiment: its name on the command line.
        title: what it repeats.
        conditions: models, tokens and sizes it was measured with.
        tables: Markdown, to print.
        readings: what was decided where the paper leaves it open, a sentence each.
        rows: every figure, the published ones too.
    """

    experiment: str
    title: str
    conditions: str
    tables: Sequence[str]
    readings: Sequence[str]
    rows: Sequence[PaperRow]

    def __str__(self) -> str:
        readings = [f"reading: {one}" for one in self.readings]
        return "\n\n".join([f"## {self.experiment}: {self.title}", self.conditions, *self.tables, "\n".join(readings)])


def write_json(path: str | Path, findings: Sequence[Finding]) -> None:
    """Writes all findings into one file; an infinite value becomes `null`."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    records = [asdict(one) for one in findings]
    for record in records:
        for row in record["rows"]:
            row["value"] = row["value"] if math.isfinite(row["value"]) else None
    Path(path).write_text(json.dumps(records, indent=1))


def show(value: float | None, form: str = ".2f") -> str:
    """A cell of a table: AC where accuracy collapsed, a dash where there is no figure."""
    if value is None:
        return "–"
    return format(value, form) if math.isfinite(value) else "AC"


def span(values: Sequence[float], form: str = ".2f") -> str:
    """The least and the most of several figures."""
    low, high = min(values), max(values)
    return show(low, form) if low == high else f"{show(low, form)} to {show(high, form)}"
