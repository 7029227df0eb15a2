"""What long steps show on the terminal."""

import copy
import io
from typing import Any

import torch
from rich.console import Console
from rich.progress import Progress, Task
from tiny import VOCABULARY, olmoe, tokens

from moe_compiler.evaluate import perplexity
from moe_compiler.progress import RichProgress, SpeedColumn


def task_of(seconds: float, done: int) -> Task:
    """A step of 100 parts of which `done` took `seconds`."""
    now = [0.0]
    progress = Progress(get_time=lambda: now[0], auto_refresh=False, console=Console(file=io.StringIO()))
    number = progress.add_task("step", total=100)
    progress.advance(number, 0)
    now[0] = seconds
    progress.advance(number, done)
    return progress.tasks[number]


def test_the_speed_is_that_of_the_parts() -> None:
    assert SpeedColumn("tokens").render(task_of(2.0, 100)).plain == "50 tokens/s"
    assert SpeedColumn("").render(task_of(2.0, 100)).plain == ""
    assert SpeedColumn("tokens").render(task_of(2.0, 0)).plain == ""


def test_bars_are_drawn_on_terminals_only() -> None:
    for terminal in (True, False):
        console = Console(file=io.StringIO(), force_terminal=terminal, width=100)
        progress = RichProgress(console)
        with progress.task("counting", 3, "sheep") as advance:
            advance()
            advance(2)
        drawn = console.file.getvalue()  # type: ignore[attr-defined]
        assert ("counting" in drawn and "3/3" in drawn) == terminal
        assert bool(drawn) == terminal
        assert copy.deepcopy(progress) is progress


def test_perplexity_counts_its_tokens() -> None:
    shown: list[Any] = []

    class Counted:
        def task(self, description: str, total: int, unit: str = "") -> Any:
            shown.append((description, total, unit))
            return self

        def __enter__(self) -> Any:
            return lambda count=1, /: shown.append(count)

        def __exit__(self, *_: object) -> None:
            pass

    windows = [*tokens(3, 8), torch.arange(1, 5) % VOCABULARY]
    perplexity(olmoe(num_hidden_layers=1), windows, tokens_per_batch=16, name="numbers", progress=Counted())
    assert shown == [("perplexity on numbers", 28, "tokens"), 16, 8, 4]
