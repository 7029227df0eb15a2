"""What commands print: tables for people, JSON for programs."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from moe_compiler.replace_file import replace_file

_WIDE = 10_000


def print_table(columns: Sequence[str], rows: Sequence[Sequence[str]], *, title: str | None = None) -> None:
    """Prints a table on standard output; the first column is aligned left, the others right.

    Cells wrap where a terminal is too narrow, and never in a file or pipe.

    Args:
        columns: the headings.
        rows: the cells.
        title: what stands above.
    """
    table = Table(box=box.SIMPLE_HEAD, title=title, title_justify="left", title_style="bold")
    for number, column in enumerate(columns):
        table.add_column(column, justify="right" if number else "left", no_wrap=not number, overflow="fold")
    for row in rows:
        table.add_row(*row)
    Console(width=None if sys.stdout.isatty() else _WIDE).print(table)


def print_text(text: str) -> None:
    """Prints text as it is on standard output."""
    Console().print(text, highlight=False, markup=False, soft_wrap=True)


def print_json(value: Any) -> None:
    """Prints a value as JSON on standard output; numbers that JSON does not have become null."""
    print(json.dumps(_finite(value), indent=2))


def write_json(value: Any, path: str | Path) -> None:
    """Writes a value as JSON into a file; numbers that JSON does not have become null."""
    replace_file(Path(path), (json.dumps(_finite(value), indent=2) + "\n").encode("utf-8"))


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _finite(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(one) for one in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
