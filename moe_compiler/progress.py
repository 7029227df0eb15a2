"""Progress bars on the terminal."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    Task,
    TextColumn,
    TimeRemainingColumn,
)
from rich.text import Text

from moe_compiler.passes.base import Advance


class RichProgress:
    """Draws each step as a bar with its count, its speed and the time left; finished bars disappear.

    Args:
        console: where to draw, standard error if `None`. Where it is no terminal nothing is drawn.
    """

    def __init__(self, console: Console | None = None) -> None:
        self.console = console or Console(stderr=True)

    def __deepcopy__(self, memo: dict[int, Any]) -> RichProgress:
        return self  # a copy of a model shows its progress on the same terminal

    @contextmanager
    def task(self, description: str, total: int, unit: str = "") -> Iterator[Advance]:
        """Opens a step of `total` parts; the value of the context is called when parts are finished.

        Args:
            description: what the step does.
            total: how many parts it has.
            unit: what the parts are; how many a second are finished is shown where it is given.
        """
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            SpeedColumn(unit),
            TimeRemainingColumn(compact=True),
        )
        drawn = self.console.is_terminal
        with Progress(*columns, console=self.console, transient=True, disable=not drawn) as bar:
            yield partial(bar.advance, bar.add_task(description, total=total))


class SpeedColumn(ProgressColumn):
    """Parts finished per second.

    Args:
        unit: what the parts are; nothing is shown where it is empty.
    """

    def __init__(self, unit: str) -> None:
        super().__init__()
        self.unit = unit

    def render(self, task: Task) -> Text:
        """The speed of the last half minute, or of the whole step once it is finished."""
        speed = task.finished_speed or task.speed
        return Text("" if not self.unit or not speed else f"{speed:,.0f} {self.unit}/s")
