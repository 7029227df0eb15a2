"""Forward passes see one whole state, whatever changes it: the lock, its operators, threads that run and change."""

import copy
import gc
import inspect
import pickle
import re
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from compiled import compiled_olmoe, logits, new_data, other_data
from tiny import tokens
from torch import Tensor, nn
from torch._inductor.utils import run_and_get_code

from moe_compiler.kernels import ops
from moe_compiler.kernels.forward_lock import ForwardLock

PATIENCE = 20.0


@pytest.fixture(scope="module")
def compiled() -> Any:
    model = compiled_olmoe(quantizer="rtn", rule="restore")
    model.runtime.adapt(new_data(), name="new")
    model.runtime.revert()
    model.runtime.adapt(other_data(), name="other")
    return model


@pytest.fixture
def model(compiled: Any) -> Any:
    compiled.runtime.revert()
    return compiled


@pytest.fixture
def lock() -> ForwardLock:
    return ForwardLock.new()


def in_thread(function: Callable[[], Any]) -> tuple[threading.Thread, list[Any]]:
    """Starts a thread; its result or its error is appended to the list."""
    results: list[Any] = []

    def run() -> None:
        try:
            results.append(function())
        except Exception as error:
            results.append(error)

    thread = threading.Thread(target=run, name="the other", daemon=True)
    thread.start()
    return thread, results


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < deadline, "the other thread did not get there"
        time.sleep(0.001)


def waits(lock: ForwardLock) -> bool:
    return lock._waiting > 0


def change(lock: ForwardLock, timeout: float = PATIENCE) -> str:
    with lock.exclusive(timeout):
        return "changed"


def test_a_change_waits_for_a_forward_pass_and_the_next_pass_for_the_change(lock: ForwardLock) -> None:
    lock.begin()
    thread, results = in_thread(lambda: change(lock))
    wait_until(lambda: waits(lock))
    late, began = in_thread(lambda: (lock.begin(), list(results), lock.end())[1])
    assert not results
    assert not began  # a change that waits goes first
    lock.end()
    thread.join(PATIENCE)
    late.join(PATIENCE)
    assert results == ["changed"]
    assert began == [["changed"]] or began == [[]]  # the list is filled after the lock is free
    assert change(lock) == "changed"


def test_many_forward_passes_run_at_a_time(lock: ForwardLock) -> None:
    barrier = threading.Barrier(4)

    def run() -> int:
        lock.begin()
        number = barrier.wait(PATIENCE)  # breaks unless all four are inside
        lock.end()
        return number

    started = [in_thread(run) for _ in range(4)]
    for thread, _ in started:
        thread.join(PATIENCE)
    assert sorted(results[0] for _, results in started) == [0, 1, 2, 3]


def test_holds_nest_and_count_forward_passes_in(lock: ForwardLock) -> None:
    with lock.hold():
        with lock.hold():
            lock.begin()
            lock.end()
        thread, results = in_thread(lambda: change(lock))
        wait_until(lambda: waits(lock))
        lock.begin()  # would wait for the change for ever if the hold did not count
        lock.end()
        assert not results
    thread.join(PATIENCE)
    assert results == ["changed"]


def test_a_pass_that_raised_does_not_block_its_own_thread(lock: ForwardLock) -> None:
    lock.begin()
    assert change(lock) == "changed"
    lock.begin()
    with lock.changing(1), lock.exclusive(1):
        lock.begin()  # the one who changes may run the model
        lock.end()


def test_a_thread_that_begins_again_gives_a_change_its_turn(lock: ForwardLock) -> None:
    lock.begin()
    thread, results = in_thread(lambda: change(lock))
    wait_until(lambda: waits(lock))
    lock.begin()
    thread.join(PATIENCE)
    assert results == ["changed"]
    lock.end()


def test_threads_that_died_hold_nothing(lock: ForwardLock) -> None:
    thread, _ = in_thread(lock.begin)
    thread.join(PATIENCE)
    assert change(lock, timeout=1.0) == "changed"


def test_a_change_gives_up_after_its_time_and_lets_passes_go_on(lock: ForwardLock) -> None:
    lock.begin()
    thread, results = in_thread(lambda: change(lock, timeout=0.05))
    thread.join(PATIENCE)
    assert isinstance(results[0], RuntimeError)
    assert "the model was still running in thread 'MainThread' after 0.05 s" in str(results[0])
    lock.begin()
    lock.end()
    assert change(lock, 0) == "changed"


def test_only_one_change_is_prepared_at_a_time(lock: ForwardLock) -> None:
    with lock.changing(1), lock.changing(1):
        thread, results = in_thread(lambda: lock.changing(0.05).__enter__())
        thread.join(PATIENCE)
    assert "another thread was still changing the state after 0.05 s" in str(results[0])


def test_who_holds_the_state_cannot_change_it_and_who_changes_it_cannot_hold_it(lock: ForwardLock) -> None:
    with lock.hold(), pytest.raises(RuntimeError, match="cannot change inside"), lock.changing(1):
        pass
    with (
        lock.exclusive(1),
        pytest.raises(RuntimeError, match="cannot be held by the thread that is changing it"),
        lock.hold(),
    ):
        pass


def test_copies_share_a_lock_and_a_lock_that_is_gone_stops_nobody() -> None:
    lock = ForwardLock.new()
    assert copy.deepcopy(lock) is lock
    assert pickle.loads(pickle.dumps(lock)) is lock
    number = lock.number
    del lock
    gc.collect()
    index = torch.tensor([[1, 2]])
    assert torch.equal(ops.begin_forward(index, number), index)
    ops.end_forward_(torch.zeros(1, dtype=torch.uint8), index, number)
    assert ForwardLock.new().number != number


def test_operators_pass_opcheck(lock: ForwardLock) -> None:
    index, marker = torch.tensor([[1, 2], [0, 3]]), torch.zeros(1, dtype=torch.uint8)
    torch.library.opcheck(ops.begin_forward, (index, lock.number))
    torch.library.opcheck(ops.end_forward_, (marker, torch.randn(2, 4), lock.number))
    assert ops.begin_forward(index, lock.number).data_ptr() != index.data_ptr()
    assert change(lock, 0) == "changed"


class Residual(nn.Module):
    """Two MoE blocks, one after the other."""

    def __init__(self, first: nn.Module, second: nn.Module) -> None:
        super().__init__()
        self.first, self.second = first, second

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.first(x)
        return x + self.second(x)


@torch.no_grad()
def test_inductor_keeps_the_operators_around_the_experts(model: Any) -> None:
    torch._dynamo.reset()
    blocks = Residual(*model.moe_graphs.values())
    x = torch.randn(2, 5, 128)
    forward = torch.compile(blocks, fullgraph=True, dynamic=True)
    out, (code, *_) = run_and_get_code(forward, x)
    torch.testing.assert_close(out, blocks(x), rtol=1e-4, atol=1e-5)
    names = ("begin_forward", "packed_experts", "end_forward_")
    lines = [line for line in code.splitlines() if re.search(r"^\s*(\w+ = )?torch\.ops\.moe_compiler", line)]
    found = [name for line in lines for name in names if f"moe_compiler.{name}." in line]
    assert found == ["begin_forward", "packed_experts", "packed_experts", "end_forward_"]
    assert "clone" not in "".join(lines)
    with model.runtime._lock.exclusive(0):  # nothing is held
        pass


@pytest.fixture
def stopped(model: Any) -> Iterator[tuple[threading.Event, threading.Event]]:
    """Stops every forward pass of another thread between the two MoE blocks: (it is there, it may go on)."""
    there, go_on = threading.Event(), threading.Event()
    main = threading.current_thread()

    def pause(*_: Any) -> None:
        if threading.current_thread() is not main:
            there.set()
            assert go_on.wait(PATIENCE)

    handle = model.model.layers[1].self_attn.register_forward_pre_hook(pause)
    yield there, go_on
    go_on.set()
    handle.remove()


@pytest.mark.parametrize("act", ["switch", "adapt"])
def test_a_pass_under_way_keeps_its_state(model: Any, stopped: Any, act: str) -> None:
    there, go_on = stopped
    expected = logits(model)
    reader, results = in_thread(lambda: logits(model))
    assert there.wait(PATIENCE)
    with pytest.raises(RuntimeError, match="was still running in thread 'the other' after 0 s"):
        model.runtime.switch("new", timeout=0)
    assert model.runtime.active == "calibration"

    def do() -> str:
        model.runtime.switch("new") if act == "switch" else model.runtime.adapt(new_data(), name="new")
        return model.runtime.active

    handle = threading.Timer(0.05, go_on.set)
    handle.start()
    assert do() == "new"
    reader.join(PATIENCE)
    assert torch.equal(results[0], expected)
    assert not torch.equal(logits(model), expected)


def raise_in_the_last_block(model: Any) -> None:
    """Runs a forward pass that begins, and raises before its last operator."""

    def fail(*_: Any) -> None:
        raise MemoryError("here")

    handle = model.model.layers[1].self_attn.register_forward_pre_hook(fail)
    try:
        with pytest.raises(MemoryError, match="here"):
            logits(model)
    finally:
        handle.remove()


def test_a_pass_that_raised_in_an_idle_thread_holds_nothing(model: Any) -> None:
    raised, done = threading.Event(), threading.Event()

    def run() -> None:
        raise_in_the_last_block(model)
        raised.set()
        assert done.wait(PATIENCE)

    thread, results = in_thread(run)
    assert raised.wait(PATIENCE)
    model.runtime.switch("new", timeout=0)
    done.set()
    thread.join(PATIENCE)
    assert results == [None]


def test_a_compiled_pass_that_raised_is_ended_by_hold(model: Any) -> None:
    lock = model.runtime._lock
    raised, done = threading.Event(), threading.Event()

    def compiled_graph() -> None:
        lock.begin()  # a graph has no hooks
        raise MemoryError("here")

    def run() -> None:
        with pytest.raises(MemoryError, match="here"), model.runtime.hold():
            compiled_graph()
        raised.set()
        assert done.wait(PATIENCE)

    thread, results = in_thread(run)
    assert raised.wait(PATIENCE)
    model.runtime.switch("new", timeout=0)
    done.set()
    thread.join(PATIENCE)
    assert results == [None]


def test_a_timeout_says_what_to_do(lock: ForwardLock) -> None:
    thread, results = in_thread(lambda: (lock.begin(), time.sleep(0.2)))
    wait_until(lambda: bool(lock._holds))
    with pytest.raises(
        RuntimeError, match=r"in thread 'the other' after 0 s; nothing was changed. If a compiled .* run"
    ):
        change(lock, 0)
    thread.join(PATIENCE)
    assert change(lock, 0) == "changed"
    assert results


def test_hold_keeps_the_state_over_many_passes(model: Any) -> None:
    expected = logits(model)
    with model.runtime.hold():
        changer, changed = in_thread(lambda: model.runtime.switch("new"))
        wait_until(lambda: waits(model.runtime._lock))
        assert all(torch.equal(logits(model), expected) for _ in range(3))
        with pytest.raises(RuntimeError, match=r"the state cannot change inside `runtime.hold\(\)` or `generate`"):
            model.runtime.adapt(new_data())
    changer.join(PATIENCE)
    assert changed == [None]
    assert not torch.equal(logits(model), expected)


def test_generate_holds_by_itself_and_keeps_its_signature(model: Any) -> None:
    seen: list[Any] = []

    class Interfering:
        def __call__(self, ids: Tensor, scores: Tensor) -> Tensor:
            with pytest.raises(RuntimeError, match="cannot change inside"):
                model.runtime.switch("new")
            seen.append(model.runtime.active)
            return scores

    prompt = tokens(1, 4, 3)
    expected = type(model).generate(model, prompt, max_new_tokens=3, do_sample=False)
    generated = model.generate(prompt, max_new_tokens=3, do_sample=False, logits_processor=[Interfering()])
    assert torch.equal(generated, expected)
    assert seen == ["calibration"] * 3
    assert inspect.signature(model.generate) == inspect.signature(type(model).generate.__get__(model))
    copied = copy.deepcopy(model)
    assert copied.generate.model is copied
    assert torch.equal(copied.generate(prompt, max_new_tokens=3, do_sample=False), expected)


def test_four_threads_generate_while_another_adapts_and_switches(model: Any) -> None:
    runtime, prompt = model.runtime, tokens(1, 2, 3)
    options = {"max_new_tokens": 2, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}

    def generate() -> Tensor:
        return model.generate(prompt, **options).logits[-1]

    def run() -> Tensor:
        return logits(model, (1, 3))

    expected = {}
    for name in ("calibration", "new", "other"):
        runtime.switch(name)
        expected[name] = (run(), generate())
    assert not torch.equal(expected["new"][0], expected["other"][0])
    done, seen, wrong, passes = threading.Event(), set(), [], [0, 0, 0, 0]

    def read(number: int) -> None:
        kind = number % 2
        while not done.is_set():
            out = generate() if kind else run()
            matches = [name for name, outs in expected.items() if torch.equal(outs[kind], out)]
            seen.update(matches)
            wrong.extend([] if matches else [out])
            passes[number] += 1

    readers = [in_thread(lambda number=number: read(number)) for number in range(4)]
    try:
        for step in range(200):
            if step % 20 == 19:
                runtime.revert()
                runtime.adapt(new_data(), name="new")  # gives what it gave before
            else:
                runtime.switch(("calibration", "new", "other")[step % 3])
            before = sum(passes)
            wait_until(lambda before=before: sum(passes) > before)
    finally:
        done.set()
    for thread, _ in readers:
        thread.join(PATIENCE)
    assert [results for _, results in readers] == [[None]] * 4
    assert min(passes) > 10
    assert seen == expected.keys()
    assert not wrong
