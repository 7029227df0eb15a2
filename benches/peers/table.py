"""The rows of the peers as a Markdown table."""

from __future__ import annotations

from collections.abc import Sequence

from accuracy_rows import ORIGINAL, Row

HEADER = (
    "| peer | package | code bits | effective bits | MB | seconds | loss, seen | loss, new |",
    "|---|---|---:|---:|---:|---:|---:|---:|",
)


def markdown_table(rows: Sequence[Row]) -> str:
    """A table with a line per row, then what must be known about each, as notes; losses with 95 % intervals."""
    original = next((row for row in rows if row.name == ORIGINAL), None)
    notes = [note for note in dict.fromkeys(map(_note, rows)) if note]
    lines = [_line(row, original, notes) for row in rows]
    listed = [f"{number}. {note}" for number, note in enumerate(notes, 1)]
    return "\n".join([*HEADER, *lines, *([""] if listed else []), *listed, ""])


def _note(row: Row) -> str:
    return row.note if row.status == "ok" else row.status


def _line(row: Row, original: Row | None, notes: Sequence[str]) -> str:
    note = _note(row)
    mark = f" ({notes.index(note) + 1})" if note else ""
    losses = [None if original is None or row is original else row.loss(original, kind) for kind in ("seen", "new")]
    cells = [
        row.name + mark,
        row.tool,
        _number(row.code_bits, 2),
        _number(row.effective_bits, 2),
        _number(None if row.size_bytes is None else row.size_bytes / 1e6, 2),
        _number(row.compile_s, 0),
        *("–" if loss is None else str(loss) for loss in losses),
    ]
    return f"| {' | '.join(cells)} |"


def _number(value: float | None, digits: int) -> str:
    return "–" if value is None else f"{value:.{digits}f}"
