"""One line of an accuracy table, and the CSV file it is appended to as soon as it is known.

Needs PyTorch alone, see `accuracy_windows`. The columns are the fields of `Row`, the losses against the file's original
model, for each domain the perplexity and the negative log-likelihood of every window, and who measured.
"""

from __future__ import annotations

import csv
import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from accuracy_statistics import Interval, loss

ORIGINAL = "original"
LOSS_COLUMNS = tuple(f"loss_{kind}{part}" for kind in ("seen", "new") for part in ("", "_low", "_high"))
PERPLEXITY, LOSSES = "perplexity ", "nll "  # beginnings of the columns of a domain


@dataclass(frozen=True)
class Row:
    """One model, measured on every domain.

    Attributes:
        suite: the group of rows it belongs to, such as `"quantizers"`.
        name: what was measured; unique in its suite. The original model is `"original"`.
        model: name or path of the original model.
        tool: who quantized, with the version.
        status: `"ok"`, or why there are no figures.
        bits_source: `"buffers"` if bits and bytes are those of what is kept in memory, `"files"` if of a checkpoint,
            `"formula"` if they are computed for a packing that the evaluated model does not have.
        code_bits: mean width of the experts' codes.
        effective_bits: bits per expert weight, with scales, zero points, tables and pools.
        size_bytes: bytes of the experts.
        compile_s: seconds to quantize.
        adapt_s: seconds to adapt to one new domain, the mean over new domains.
        adapted: whether every new domain was measured after adapting, or quantizing anew, to that domain.
        calibration_tokens: tokens of each seen domain that it was calibrated on.
        adapt_tokens: tokens of each new domain that it was adapted to; 0 if it was not.
        window: tokens per window.
        seed: of everything that draws.
        seen: the domains it was calibrated on.
        new: the others.
        recovered: share of the loss on new domains that adapting wins back, of what quantizing anew for them would.
        settings: options, by name.
        note: anything a reader must know.
        nll: by domain, the negative log-likelihood of each window, see `accuracy_windows.window_losses`.
    """

    suite: str
    name: str
    model: str
    tool: str
    status: str = "ok"
    bits_source: str = "buffers"
    code_bits: float | None = None
    effective_bits: float | None = None
    size_bytes: int | None = None
    compile_s: float | None = None
    adapt_s: float | None = None
    adapted: bool = False
    calibration_tokens: int = 0
    adapt_tokens: int = 0
    window: int = 256
    seed: int = 0
    seen: tuple[str, ...] = ()
    new: tuple[str, ...] = ()
    recovered: float | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)
    note: str = ""
    nll: Mapping[str, Sequence[float]] = field(default_factory=dict)

    @property
    def key(self) -> tuple[str, str]:
        """What names the row in a file."""
        return self.suite, self.name

    def perplexity(self, domain: str) -> float:
        """`exp` of the mean negative log-likelihood of a scored token of `domain`; infinite where it overflows."""
        losses = self.nll[domain]
        mean = sum(losses) / (len(losses) * (self.window - 1))
        return math.exp(mean) if mean < 700 else math.inf

    def loss(self, reference: Row, kind: str) -> Interval | None:
        """The loss over the domains of a kind, `"seen"` or `"new"`, against another row on the same windows.

        Returns:
            `None` where there is none: there are no such domains, or one of the rows has no figures.

        Raises:
            ValueError: the rows have other windows or other domains.
        """
        domains = self.seen if kind == "seen" else self.new
        return self.loss_on(reference, domains) if domains and self.nll and reference.nll else None

    def loss_on(self, reference: Row, domains: Sequence[str]) -> Interval:
        """The loss over some domains against another row on the same windows.

        Raises:
            ValueError: the rows have other windows, or one has no figures on a domain.
        """
        if self.window != reference.window:
            raise ValueError(
                f"rows must have one `window`, but {self.name!r} has {self.window} tokens, "
                f"{reference.name!r} {reference.window}"
            )
        return loss(self.nll, reference.nll, domains, self.window, self.seed)

    def conditions(self) -> dict[str, Any]:
        """What must be equal for two rows to be compared."""
        counts = {domain: len(losses) for domain, losses in self.nll.items()}
        return {"model": self.model, "window": self.window, "seen": self.seen, "new": self.new, "windows": counts}


class RowFile:
    """The rows of one model on one set of windows. Each row is appended at once; a cut last line is dropped on reading.

    Attributes:
        path: the file, or `None` to keep the rows in memory only.
        rows: what it holds, in order.
    """

    def __init__(
        self,
        path: str | os.PathLike[str] | None,
        domains: Sequence[str],
        *,
        resume: bool = False,
        environment: Mapping[str, str] | None = None,
    ) -> None:
        """Opens the file.

        Args:
            path: the CSV file; its folder is made.
            domains: seen and new; each has its columns.
            resume: keep the rows the file has; else it is begun anew.
            environment: columns for who measured, the same in every row.

        Raises:
            ValueError: the rows to keep are of other domains.
        """
        self.path = None if path is None else Path(path)
        self.domains = tuple(domains)
        self.environment = dict(environment or {})
        self.rows: list[Row] = []
        if self.path is None:
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        kept: list[dict[str, str]] = []
        if resume and self.path.exists():
            header, kept = _records(self.path)
            if header and header != self.columns:
                raise ValueError(
                    f"`{self.path}` cannot be resumed, its columns are others: {_differing(header, self.columns)}"
                )
            self.rows = list({row.key: row for row in map(_parse, kept)}.values())
        temporary = self.path.with_name(self.path.name + ".tmp")
        with open(temporary, "w", newline="") as file:
            writer = csv.DictWriter(file, self.columns, lineterminator="\n")
            writer.writeheader()
            writer.writerows(kept)
        temporary.replace(self.path)

    @property
    def columns(self) -> list[str]:
        """The names of the columns."""
        plain = [one.name for one in fields(Row) if one.name != "nll"]
        by_domain = [start + domain for start in (PERPLEXITY, LOSSES) for domain in self.domains]
        return [*plain, *LOSS_COLUMNS, *by_domain, *self.environment]

    @property
    def original(self) -> Row | None:
        """The row of the original model."""
        return next((row for row in self.rows if row.name == ORIGINAL and row.nll), None)

    def has(self, suite: str, name: str) -> bool:
        """Whether there is such a row with figures."""
        return any(row.key == (suite, name) and row.status == "ok" for row in self.rows)

    def append(self, row: Row) -> None:
        """Adds a row; a failed one of the same name stays in the file, the last one counts.

        Raises:
            ValueError: it cannot be compared with the original model's row: other windows, domains or model.
        """
        original = self.original
        if original is not None and row.nll and row.conditions() != original.conditions():
            raise ValueError(
                f"row {row.name!r} must be measured as the original model was, but has {row.conditions()} "
                f"where that has {original.conditions()}"
            )
        self.rows = [*(one for one in self.rows if one.key != row.key), row]
        if self.path is not None:
            with open(self.path, "a", newline="") as file:
                csv.DictWriter(file, self.columns, lineterminator="\n").writerow(self._record(row))

    def _record(self, row: Row) -> dict[str, Any]:
        record: dict[str, Any] = {one.name: getattr(row, one.name) for one in fields(Row) if one.name != "nll"}
        record |= {"seen": " ".join(row.seen), "new": " ".join(row.new), "settings": json.dumps(dict(row.settings))}
        original = row if row.name == ORIGINAL else self.original
        for kind in ("seen", "new"):
            found = None if original is None else row.loss(original, kind)
            if found is not None:
                record |= {
                    f"loss_{kind}": f"{found.mean:.4f}",
                    f"loss_{kind}_low": f"{found.low:.4f}",
                    f"loss_{kind}_high": f"{found.high:.4f}",
                }
        for domain, losses in row.nll.items():
            record[PERPLEXITY + domain] = f"{row.perplexity(domain):.6g}"
            record[LOSSES + domain] = " ".join(f"{value:.4f}" for value in losses)
        return record | self.environment


def read_rows(path: str | os.PathLike[str]) -> list[Row]:
    """The rows of a file that `RowFile` wrote, the last one of each name.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is not such a file.
    """
    header, records = _records(Path(path))
    missing = [one.name for one in fields(Row) if one.name not in (*header, "nll")]
    if missing:
        raise ValueError(f"`{path}` must be a file of accuracy rows, but lacks the columns {', '.join(missing)}")
    return list({row.key: row for row in map(_parse, records)}.values())


def _records(path: Path) -> tuple[list[str], list[dict[str, str]]]:
    """The header and the complete lines of a file."""
    text = path.read_text()
    lines = text[: text.rfind("\n") + 1].splitlines(keepends=True)
    reader = csv.DictReader(lines)
    records = [record for record in reader if None not in record and None not in record.values()]
    return list(reader.fieldnames or []), records


def _parse(record: Mapping[str, str]) -> Row:
    def number(name: str) -> float | None:
        return float(record[name]) if record[name] else None

    size = number("size_bytes")
    return Row(
        suite=record["suite"],
        name=record["name"],
        model=record["model"],
        tool=record["tool"],
        status=record["status"],
        bits_source=record["bits_source"],
        code_bits=number("code_bits"),
        effective_bits=number("effective_bits"),
        compile_s=number("compile_s"),
        adapt_s=number("adapt_s"),
        recovered=number("recovered"),
        calibration_tokens=int(record["calibration_tokens"]),
        adapt_tokens=int(record["adapt_tokens"]),
        window=int(record["window"]),
        seed=int(record["seed"]),
        note=record["note"],
        size_bytes=None if size is None else int(size),
        adapted=record["adapted"] == "True",
        seen=tuple(record["seen"].split()),
        new=tuple(record["new"].split()),
        settings=json.loads(record["settings"]),
        nll={
            name.removeprefix(LOSSES): tuple(map(float, values.split()))
            for name, values in record.items()
            if name.startswith(LOSSES) and values
        },
    )


def _differing(found: Sequence[str], wanted: Sequence[str]) -> str:
    extra = [name for name in found if name not in wanted]
    missing = [name for name in wanted if name not in found]
    return f"it has {', '.join(extra) or 'no'} besides and lacks {', '.join(missing) or 'none'}"
