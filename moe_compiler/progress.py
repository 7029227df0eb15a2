"""Progress bars on the terminal."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn


class RichProgress:
    """Draws each step as a bar with its count and the time left; finished bars disappear."""

    def __init__(self, console: Console | None = None) -> None:
        self.console = console or Console(stderr=True)

    def __deepcopy__(self, memo: dict[int, Any]) -> RichProgress:
        return self  # a copy of a model shows its progress on the same terminal

    @contextmanager
    def task(self, description: str, total: int) -> Iterator[Callable[[], None]]:
        """Opens a step of `total` parts; the value of the context is called once per finished part."""
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(compact=True),
        )
        with Progress(*columns, console=self.console, transient=True) as bar:
            yield partial(bar.advance, bar.add_task(description, total=total), 1)
