"""A readers-writer lock between forward passes and whoever changes what they read, taken by operators of the graph.

A hook around a forward pass would be traced into a user's compiled graph, or not run at all; an operator runs in the
calling thread every time. `begin_forward` before the first and `end_forward_` after the last packed operator of a model
make its forward pass a reader. Arguments and results of both are those of the operators in `moe_compiler.kernels.ops`.
"""

from __future__ import annotations

import itertools
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from torch import Tensor

_POLL_SECONDS = 0.2


@dataclass
class _Hold:
    """What one thread holds: `depth` calls of `ForwardLock.hold`, or if that is 0 a forward pass that it began."""

    thread: threading.Thread
    depth: int


class ForwardLock:
    """Many forward passes at a time, or one change, which goes first where both wait. A thread's holds nest.

    A forward pass that raised does not get to its `end`. A forward hook ends it, but not in a compiled graph; there its
    hold is dropped when its thread begins another, changes the state itself, leaves a `hold`, or dies. A change that
    waits for a thread which does none of these gives up after its time.

    Attributes:
        number: what the operators call the lock. Copies of a model share it.
    """

    def __init__(self, number: int) -> None:
        self.number = number
        self._condition = threading.Condition()
        self._changing = threading.RLock()
        self._holds: dict[int, _Hold] = {}
        self._writer: int | None = None
        self._waiting = 0

    def __reduce__(self) -> tuple[Callable[[int], ForwardLock], tuple[int]]:
        return _numbered, (self.number,)

    @classmethod
    def new(cls) -> ForwardLock:
        """A lock with a number of its own."""
        return _numbered(next(number for number in _NUMBERS if number not in _LOCKS))

    def begin(self) -> None:
        """A forward pass of this thread begins; whatever this thread began before is over. Waits for a change."""
        me = threading.get_ident()
        with self._condition:
            mine = self._holds.get(me)
            if self._writer == me or (mine is not None and mine.depth):
                return
            self._enter(me, 0)

    def end(self) -> None:
        """The forward pass of this thread is over."""
        me = threading.get_ident()
        with self._condition:
            mine = self._holds.get(me)
            if mine is not None and not mine.depth:
                self._drop(me)

    @contextmanager
    def hold(self) -> Iterator[None]:
        """No change happens inside, over any number of forward passes of this thread.

        Raises:
            RuntimeError: this thread is changing the state.
        """
        me = threading.get_ident()
        with self._condition:
            mine = self._holds.get(me)
            if self._writer == me:
                raise RuntimeError("the state cannot be held by the thread that is changing it")
            if mine is not None and mine.depth:
                mine.depth += 1
            else:
                self._enter(me, 1)
        try:
            yield
        finally:
            with self._condition:
                mine = self._holds[me]
                mine.depth -= 1
                if not mine.depth:
                    self._drop(me)

    @contextmanager
    def changing(self, timeout: float) -> Iterator[None]:
        """Prepares a change: one thread at a time, while forward passes go on.

        Args:
            timeout: how long to wait for another thread's change, in seconds.

        Raises:
            RuntimeError: this thread is inside `hold`, or another thread's change took too long.
        """
        with self._condition:
            mine = self._holds.get(threading.get_ident())
            if mine is not None and mine.depth:
                raise RuntimeError(
                    "the state cannot change inside `runtime.hold()` or `generate`: this thread holds it as it is"
                )
        if not self._changing.acquire(timeout=timeout):
            raise RuntimeError(f"another thread was still changing the state after {timeout:g} s; nothing was changed")
        try:
            yield
        finally:
            self._changing.release()

    @contextmanager
    def exclusive(self, timeout: float) -> Iterator[None]:
        """No forward pass is under way inside, and none begins.

        Args:
            timeout: how long to wait for forward passes to end, in seconds.

        Raises:
            RuntimeError: some did not end.
        """
        me = threading.get_ident()
        deadline = time.monotonic() + timeout
        with self._condition:
            self._holds.pop(me, None)
            self._waiting += 1
            try:
                while busy := self._running():
                    left = deadline - time.monotonic()
                    if left <= 0:
                        raise RuntimeError(
                            f"the model was still running in {busy} after {timeout:g} s; nothing was changed. If a "
                            "compiled forward pass raised there, run the model once more in that thread; call it "
                            "inside `with model.runtime.hold():`, which errors end, and this cannot happen"
                        )
                    self._condition.wait(min(left, _POLL_SECONDS))
                self._writer = me
            finally:
                self._waiting -= 1
                self._condition.notify_all()
        try:
            yield
        finally:
            with self._condition:
                self._writer = None
                self._condition.notify_all()

    def _enter(self, me: int, depth: int) -> None:
        self._drop(me)
        while self._writer is not None or self._waiting:
            self._condition.wait()
        self._holds[me] = _Hold(threading.current_thread(), depth)

    def _drop(self, me: int) -> None:
        if self._holds.pop(me, None) is not None and self._waiting:
            self._condition.notify_all()

    def _running(self) -> str:
        """The threads that hold the state, in words; forgets those that died."""
        for ident, one in list(self._holds.items()):
            if not one.thread.is_alive():
                del self._holds[ident]
        names = ", ".join(repr(one.thread.name) for one in self._holds.values())
        if self._writer is not None:
            names = "a thread that changes the state"
        return names and f"thread {names}"


# An operator takes numbers, not objects: this is where the two meet. A lock that nobody keeps any more has no writer.
_LOCKS: weakref.WeakValueDictionary[int, ForwardLock] = weakref.WeakValueDictionary()
_NUMBERS = itertools.count()


def _numbered(number: int) -> ForwardLock:
    lock = _LOCKS.get(number)
    if lock is None:
        lock = _LOCKS[number] = ForwardLock(number)
    return lock


def begin_forward(top_k_index: Tensor, lock: int) -> Tensor:
    """Begins a forward pass. The experts take the copy, so that nothing can move them before this."""
    found = _LOCKS.get(lock)
    if found is not None:
        found.begin()
    return top_k_index.clone()


def end_forward_(marker: Tensor, after: Tensor, lock: int) -> None:
    """Ends a forward pass once `after` exists. `marker` counts as written, so that the operator has an effect."""
    found = _LOCKS.get(lock)
    if found is not None:
        found.end()
