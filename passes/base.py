"""What every pass is: one rewrite of one graph, with what it needs and what it promises, and a count of its matches."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Protocol

from torch.fx import GraphModule
from torch.fx.passes.infra.pass_base import PassBase, PassResult


class MoEPass(PassBase):
    """A rewrite of a captured graph, in place.

    A subclass shows the graph before and after in its docstring and implements `rewrite`. `requires` and `ensures`
    raise where the graph before or after breaks what the pass relies on.
    """

    @abstractmethod
    def rewrite(self, graph_module: GraphModule) -> int:
        """Rewrites `graph_module.graph` in place and returns how many places it matched."""

    def call(self, graph_module: GraphModule) -> PassResult:
        """Runs `rewrite` and recompiles. A pass that matches nothing is an error: nothing is skipped silently.

        Raises:
            RuntimeError: the pass matched no node.
        """
        matches = self.rewrite(graph_module)
        if not matches:
            raise RuntimeError(
                f"pass {type(self).__name__} matched no node in the graph of {graph_module._get_name()}:\n"
                f"{graph_module.graph}"
            )
        graph_module.graph.lint()
        graph_module.recompile()
        return PassResult(graph_module, modified=True)


def run_passes(
    graph_module: GraphModule,
    passes: Sequence[MoEPass],
    dump: Callable[[str, GraphModule], None] | None = None,
) -> GraphModule:
    """Runs `passes` in order on one graph.

    Args:
        graph_module: the graph, rewritten in place.
        passes: what to run.
        dump: called with a name and the graph before the first pass ("captured") and after each pass (its name).

    Returns:
        The same graph module.
    """
    if dump:
        dump("captured", graph_module)
    for one in passes:
        one(graph_module)
        if dump:
            dump(type(one).__name__, graph_module)
    return graph_module


class Advance(Protocol):
    """Says that parts of a step are finished."""

    def __call__(self, count: int = 1, /) -> None:
        """`count` more parts are finished."""


class Progress(Protocol):
    """Shows how far a long step is. The passes only call it; what it draws is the caller's business."""

    def task(self, description: str, total: int, unit: str = "") -> AbstractContextManager[Advance]:
        """Opens a step of `total` parts; the value of the context is called when parts are finished.

        Args:
            description: what the step does.
            total: how many parts it has.
            unit: what the parts are, such as `"tokens"`, where their number per second says something.
        """


class NoProgress:
    """Shows nothing."""

    def task(self, description: str, total: int, unit: str = "") -> AbstractContextManager[Advance]:
        """A step that nobody watches."""
        return nullcontext(_ignore)


def _ignore(count: int = 1, /) -> None:
    """Takes note of nothing."""
