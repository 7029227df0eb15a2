"""What runs beside a serving model: `generate` that holds its state, the end of passes that raised, the drift guard."""

from __future__ import annotations

import inspect
import logging
import threading
import weakref
from collections.abc import Iterable
from contextlib import AbstractContextManager
from itertools import takewhile
from typing import Any, Protocol

import torch
from torch import nn

from moe_compiler.kernels.forward_lock import ForwardLock
from moe_compiler.runtime.guard import DriftReport

logger = logging.getLogger("moe_compiler.runtime")


class Guarded(Protocol):
    """The part of a runtime that this file needs."""

    def hold(self) -> AbstractContextManager[None]:
        """A context in which the state does not change."""

    def check(self) -> DriftReport:
        """Looks for drift and acts on it."""


class HeldGenerate:
    """`generate` of a model's class, inside `runtime.hold()`: all of its tokens come from one state.

    Afterwards the drift guard has its look. Copying or pickling a model takes this along, bound to the copy.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Generates as the model's class does."""
        runtime: Guarded | None = getattr(self.model, "runtime", None)
        if runtime is None:
            return self._generate(*args, **kwargs)
        with runtime.hold():
            generated = self._generate(*args, **kwargs)
        check_quietly(runtime)
        return generated

    @property
    def __signature__(self) -> inspect.Signature:
        return inspect.signature(self._generate)

    @property
    def _generate(self) -> Any:
        return type(self.model).generate.__get__(self.model)  # type: ignore[attr-defined]


class EndsForward:
    """A forward hook that ends this thread's forward pass, which matters where it raised before its last operator.

    A graph that `torch.compile` made of the module has no hooks: there `runtime.hold()` around the call does it.

    Args:
        lock: what the forward pass holds.
    """

    def __init__(self, lock: ForwardLock) -> None:
        self.lock = lock

    def __call__(self, module: nn.Module, args: Any, output: Any) -> None:
        """Ends the forward pass."""
        if not torch.compiler.is_compiling():
            self.lock.end()

    def register(self, model: nn.Module, paths: Iterable[str]) -> None:
        """Hooks the innermost module whose forward pass calls all of the modules at `paths`."""
        parents = zip(*(path.split(".")[:-1] for path in paths), strict=False)
        common = [names[0] for names in takewhile(lambda names: len(set(names)) == 1, parents)]
        while isinstance(model.get_submodule(".".join(common)), nn.ModuleList | nn.ModuleDict):
            common = common[:-1]
        model.get_submodule(".".join(common)).register_forward_hook(self, always_call=True)


class DriftWatch:
    """A daemon thread that checks a runtime for drift, until it is stopped or the runtime is gone.

    Args:
        runtime: what to check; not kept alive.
        every: seconds between two checks.
    """

    def __init__(self, runtime: Guarded, every: float) -> None:
        self._stopped = threading.Event()
        arguments = (weakref.ref(runtime), every, self._stopped)
        self._thread = threading.Thread(target=_watch, args=arguments, name="drift guard", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Ends the thread; a check under way goes on to its end."""
        self._stopped.set()
        if self._thread is not threading.current_thread():
            self._thread.join()


def check_quietly(runtime: Guarded) -> None:
    """Checks for drift; an error is logged, since nobody asked for the check."""
    try:
        runtime.check()
    except Exception:
        logger.exception("the check for drift failed")


def _watch(runtime: weakref.ref[Guarded], every: float, stopped: threading.Event) -> None:
    while not stopped.wait(every):
        found = runtime()
        if found is None:
            return
        check_quietly(found)
        del found
