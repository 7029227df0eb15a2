"""Correctness of the packed operators on a GPU, before anything is timed: exit code 1 and a list if anything is wrong.

Through the public operators, against float64: sizes, widths, routings, pools, dtypes (`gpu_cases.py`); the schedules of
the device's table of tiles; the same result twice where PyTorch is told to be deterministic; replays of graphs after
changes in place (`gpu_replay.py`). Several processes share the work, so that kernels compile in parallel.

Run: python benches/gpu_check.py
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, replace
from functools import partial
from multiprocessing import get_context
from unittest.mock import patch

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when CUDA starts: deterministic matrix products

import torch
from environment import Environment, pick_device
from gpu_cases import TOLERANCE, Case, build, cases, distance, expected_layer, expected_linear, layer
from gpu_replay import check_compiled, check_graph

from moe_compiler.kernels import ops
from moe_compiler.kernels.tiles import Schedule, choose_schedule

POISON = 1 << 26


@dataclass(frozen=True)
class Check:
    """One thing to check: `run` returns how far off the result is, or raises."""

    name: str
    run: Callable[[], float]
    tolerance: float


@dataclass(frozen=True)
class Outcome:
    """What a check gave.

    Attributes:
        name: the check's.
        error: how far off, or `None` where it raised.
        problem: what is wrong, empty if nothing is.
        seconds: how long it took, compilation of its kernels included.
    """

    name: str
    error: float | None
    problem: str
    seconds: float


def poison(device: torch.device) -> None:
    """Leaves NaN in freed memory, so that an output that is not written shows."""
    torch.full((POISON if device.type == "cuda" else 1024,), torch.nan, device=device)


def check_layer(case: Case, device: torch.device) -> float:
    """`packed_experts` on one case."""
    inputs = build(case, device)
    poison(device)
    return distance(layer(inputs, case.activation), expected_layer(inputs, case.activation))


def check_schedule(case: Case, schedule: Schedule, device: torch.device) -> float:
    """`packed_experts` on one case by a certain schedule, whatever the table says."""
    with patch("moe_compiler.kernels.cuda.choose_schedule", lambda *_, **__: schedule):
        return check_layer(case, device)


def check_linear(case: Case, per_row: bool, device: torch.device) -> float:
    """`packed_expert_linear` on one case, each row of the result reading a row of its own or its token's."""
    inputs = build(case, device)
    ids = inputs.ids.reshape(-1)
    x = inputs.x.repeat_interleave(case.top_k, dim=0) if per_row else inputs.x
    poison(device)
    packed, bias = inputs.gate_up, inputs.gate_up_bias
    actual = ops.packed_expert_linear(x, ids, list(packed.tensors), bias, packed.group_size)
    return distance(actual, expected_linear(x, ids, packed, bias))


def check_deterministic(case: Case, device: torch.device) -> float:
    """Runs twice with `torch.use_deterministic_algorithms`; returns 0 if the results are equal bit for bit."""
    inputs = build(case, device)
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        first = layer(inputs)
        same = all(torch.equal(first, layer(inputs)) for _ in range(5))
    finally:
        torch.use_deterministic_algorithms(False)
    return 0.0 if same else 1.0


def checks(quick: bool, device: torch.device) -> Iterator[Check]:
    """Everything to check."""
    dtypes = (torch.bfloat16,) if quick else (torch.bfloat16, torch.float16)
    sizes = (256, 128) if quick else (2048, 1024)
    sized = partial(Case, hidden_size=sizes[0], intermediate_size=sizes[1])
    batches = (2, 24) if quick else (1, 16, 300, 2048)
    for case in cases(quick):
        yield Check(str(case), partial(check_layer, case, device), TOLERANCE[case.dtype])
    for dtype in dtypes:
        for tokens in batches:
            case = sized("linear", tokens, dtype=dtype, bias=True)
            for per_row in (False, True):
                name = f"{case}, {'a row each' if per_row else 'tokens shared'}"
                yield Check(name, partial(check_linear, case, per_row, device), TOLERANCE[dtype])
            case = sized("deterministic", tokens, dtype=dtype)
            yield Check(str(case), partial(check_deterministic, case, device), 0.0)
    for tokens in batches:
        if device.type == "cuda":
            case = sized("CUDA graph", tokens, directions=8)
            yield Check(str(case), partial(check_graph, case, device), TOLERANCE[case.dtype])
        case = sized("torch.compile", tokens, directions=8)
        yield Check(str(case), partial(check_compiled, case, device), TOLERANCE[case.dtype])
    for schedule in schedules(device):
        for tokens in (3,) if schedule.direct else (3, 100):
            case = sized(f"{schedule}", tokens, directions=8)
            yield Check(str(case), partial(check_schedule, case, schedule, device), TOLERANCE[case.dtype])


def schedules(device: torch.device) -> list[Schedule]:
    """Every schedule of the device's table of tiles, with rows added up in order and as they come."""
    if device.type != "cuda":
        return []
    name = torch.cuda.get_device_name(device)
    found = dict.fromkeys(choose_schedule(name, 1 << power, 8) for power in range(18))
    return [
        *(replace(one, atomic=False) for one in found),
        *(replace(one, atomic=True) for one in found if one.path != "dense"),
    ]


def run(check: Check) -> Outcome:
    """Runs one check; any failure is an outcome."""
    start = time.perf_counter()
    error = None
    try:
        error = check.run()
        problem = "" if error <= check.tolerance else f"off by {error:.2e}, allowed {check.tolerance:.0e}"
    except Exception as caught:  # one check's failure is a result, not the end of the run
        problem = f"{type(caught).__name__}: {(str(caught).strip().splitlines() or [''])[0][:300]}"
    return Outcome(check.name, error, problem, time.perf_counter() - start)


def run_number(number: int, quick: bool, device: str) -> Outcome:
    """Runs one of the checks by its number, in a process of its own kind: kernels compile in parallel."""
    return run(list(checks(quick, torch.device(device)))[number])


def run_all(quick: bool, device: torch.device, jobs: int) -> Iterable[Outcome]:
    """Runs every check, in order or, with several processes, as they come."""
    if jobs <= 1:
        yield from map(run, checks(quick, device))
        return
    with ProcessPoolExecutor(jobs, mp_context=get_context("spawn")) as pool:
        count = sum(1 for _ in checks(quick, device))
        pending = [pool.submit(run_number, number, quick, str(device)) for number in range(count)]
        try:
            yield from (future.result() for future in as_completed(pending))
        except BrokenProcessPool as error:
            yield Outcome("the processes", None, f"one of them died, and the other checks with it: {error}", 0.0)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs every check; returns 1 if one failed, else 0."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", help="cpu or cuda; the default is the GPU where there is one")
    parser.add_argument("--quick", action="store_true", help="small sizes, one dtype")
    parser.add_argument("--jobs", type=int, help="processes; the default is one on a CPU, up to 16 for a GPU")
    options = parser.parse_args(arguments)
    device = pick_device(options.device)
    environment = Environment.of(device)
    print(environment)
    jobs = options.jobs or (min(16, environment.cores) if device.type == "cuda" else 1)
    count, failures = 0, []
    for outcome in run_all(options.quick, device, jobs):
        count += 1
        shown = "-" if outcome.error is None else f"{outcome.error:.1e}"
        print(
            f"{'FAILED' if outcome.problem else 'ok':7}{shown:>8} {outcome.seconds:6.1f} s  {outcome.name}", flush=True
        )
        if outcome.problem:
            failures.append(f"{outcome.name}: {outcome.problem}")
            print(f"       {outcome.problem}", flush=True)
    if failures:
        print(f"\n{len(failures)} of {count} checks FAILED:")
        print("\n".join(f"- {failure}" for failure in failures))
        return 1
    print(f"\nall {count} checks passed")
    return 0


if __name__ == "__main__":
    sys.exit(main())
