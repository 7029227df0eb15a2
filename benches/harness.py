"""What all benches share: interleaved timing, the measured memory roof, CSV and Markdown output."""

from __future__ import annotations

import csv
import gc
import os
import random
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from itertools import cycle, islice
from pathlib import Path
from statistics import median, quantiles
from typing import Any, TextIO

import torch
from environment import Environment

MAX_CALLS_IN_GRAPH = 64
MAX_ROUNDS = 2000
_SHORTEST_SAMPLE = 0.005  # seconds; a CPU sample repeats its call until it takes this long

Call = Callable[[], Any]


@dataclass(frozen=True)
class Timing:
    """Times of one call in milliseconds, one per round; round `i` of all candidates ran side by side.

    Attributes:
        samples: the time of one call in each round.
        warmup_s: seconds of the first call: compilation, and the capture of a CUDA graph.
    """

    samples: tuple[float, ...]
    warmup_s: float

    @property
    def best(self) -> float:
        """The shortest time, in milliseconds."""
        return min(self.samples)

    @property
    def median(self) -> float:
        """The median time, in milliseconds."""
        return median(self.samples)

    @property
    def spread(self) -> float:
        """The interquartile range over the median."""
        if len(self.samples) < 2:
            return 0.0
        low, _, high = quantiles(self.samples, n=4, method="inclusive")
        return (high - low) / self.median

    def speedup_over(self, baseline: Timing) -> float:
        """How many times faster than `baseline`: the median over rounds, so that drift of the machine cancels."""
        return median(theirs / ours for theirs, ours in zip(baseline.samples, self.samples, strict=True))


@dataclass(frozen=True)
class Failure:
    """Why a candidate gave no time."""

    reason: str

    @classmethod
    def of(cls, error: Exception) -> Failure:
        """The first line of an error; `OOM` where memory ran out."""
        if isinstance(error, torch.OutOfMemoryError):
            return cls("OOM")
        return cls((str(error).strip().splitlines() or [""])[0][:160] or type(error).__name__)


class _CpuRunner:
    """Times calls by the host's clock. Successive calls go through the whole cycle: weights leave the caches."""

    def __init__(self, calls: Sequence[Call]) -> None:
        self.calls = cycle(calls)
        start = time.perf_counter()
        next(self.calls)()
        self.warmup_s = time.perf_counter() - start
        start = time.perf_counter()
        next(self.calls)()
        self.repeat = max(1, round(_SHORTEST_SAMPLE / (time.perf_counter() - start)))

    def sample(self) -> float:
        calls = list(islice(self.calls, self.repeat))
        start = time.perf_counter()
        for call in calls:
            call()
        return 1000 * (time.perf_counter() - start) / self.repeat


class _GraphRunner:
    """Times the replay of one CUDA graph that holds every call of the cycle, one after the other."""

    def __init__(self, calls: Sequence[Call]) -> None:
        self.calls = calls[:MAX_CALLS_IN_GRAPH]
        start = time.perf_counter()
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for call in self.calls:
                call()
        torch.cuda.current_stream().wait_stream(side)
        torch.cuda.synchronize()
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            for call in self.calls:
                call()
        self.graph.replay()
        torch.cuda.synchronize()
        self.warmup_s = time.perf_counter() - start

    def sample(self) -> float:
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        self.graph.replay()  # while it runs, the host launches the one that is timed
        start.record()
        self.graph.replay()
        end.record()
        end.synchronize()
        return float(start.elapsed_time(end)) / len(self.calls)


@torch.no_grad()
def time_rounds(
    candidates: Mapping[str, Sequence[Call]], device: torch.device, seconds: float, min_rounds: int = 5
) -> dict[str, Timing | Failure]:
    """Times candidates side by side: one sample of each per round, until `seconds` are over.

    Args:
        candidates: by name, the calls to cycle through, in an order drawn anew for each round, since what ran before
            leaves its traces in caches and threads; each call must allocate nothing that outlives it. A cycle that
            reads more memory than the caches hold measures memory, as in a model with many layers.
        device: a CUDA device measures replays of one CUDA graph per candidate, the CPU calls from Python.
        seconds: for the rounds of all candidates together; warming up, compiling and capturing come on top.
        min_rounds: at least so many rounds, whatever they take.

    Returns:
        By name, the times, or why there are none. Candidates that fail do not stop the others.
    """
    runners: dict[str, _CpuRunner | _GraphRunner] = {}
    results: dict[str, Timing | Failure] = {}
    for name, calls in candidates.items():
        try:
            runners[name] = (_GraphRunner if device.type == "cuda" else _CpuRunner)(calls)
        except Exception as error:  # a candidate that fails, in whatever way, is a line of the table
            results[name] = Failure.of(error)
    results |= _rounds(runners, seconds, min_rounds)
    runners.clear()
    free_memory(device)
    return {name: results[name] for name in candidates}


def _rounds(runners: Mapping[str, _CpuRunner | _GraphRunner], seconds: float, min_rounds: int) -> dict[str, Timing]:
    samples: dict[str, list[float]] = {name: [] for name in runners}
    start, rounds, draw = time.perf_counter(), 0, random.Random(0)
    while runners and rounds < MAX_ROUNDS and (rounds < min_rounds or time.perf_counter() - start < seconds):
        for name in draw.sample(list(runners), len(runners)):
            samples[name].append(runners[name].sample())
        rounds += 1
    return {name: Timing(tuple(samples[name]), runner.warmup_s) for name, runner in runners.items()}


def free_memory(device: torch.device) -> None:
    """Gives a GPU's memory that nothing refers to back, so that one setting does not run another out of it."""
    if device.type == "cuda":
        gc.collect()
        torch.cuda.empty_cache()


def cache_bytes(device: torch.device) -> int:
    """Size of the last-level cache in front of `device`'s memory."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).L2_cache_size)
    sizes = [path.read_text().strip() for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")]
    return max((int(size[:-1]) << {"K": 10, "M": 20}[size[-1]] for size in sizes), default=32 << 20)


def copy_bandwidth(device: torch.device, size_bytes: int | None = None, seconds: float = 1.0) -> float:
    """The measured memory roof: bytes read and written per second by the best of several large copies.

    Args:
        device: whose memory.
        size_bytes: of the buffer; by default eight times the last-level cache, at least 256 MiB.
        seconds: how long to measure.
    """
    size_bytes = size_bytes or max(256 << 20, 8 * cache_bytes(device))
    source = torch.zeros(size_bytes, dtype=torch.uint8, device=device)
    target = torch.ones_like(source)
    timing = time_rounds({"copy": [lambda: target.copy_(source)]}, device, seconds)["copy"]
    if isinstance(timing, Failure):
        raise RuntimeError(f"the copy bandwidth of {device} could not be measured: {timing.reason}")
    return 2 * size_bytes / (timing.best / 1000)


class CsvWriter:
    """Writes rows as they come, each with the environment, so that a run that is cut short leaves what it measured."""

    def __init__(self, path: str | os.PathLike[str] | None, row_type: type, environment: Environment) -> None:
        self.environment = asdict(environment)
        self._file: TextIO | None = None
        if path is not None:
            Path(path).parent.mkdir(parents=True, exist_ok=True)
            self._file = open(path, "w", newline="")  # noqa: SIM115 closed in __exit__
            names = [field.name for field in fields(row_type)] + list(self.environment)
            self._writer = csv.DictWriter(self._file, names)
            self._writer.writeheader()

    def write(self, row: Any) -> None:
        """Writes one dataclass of the row's type."""
        if self._file is not None:
            self._writer.writerow(asdict(row) | self.environment)
            self._file.flush()

    def __enter__(self) -> CsvWriter:
        return self

    def __exit__(self, *_: object) -> None:
        if self._file is not None:
            self._file.close()


def markdown_table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table with aligned columns, the first to the left, the others to the right."""
    lines = [list(header), *(list(row) for row in rows)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(header))]

    def line(cells: Sequence[str]) -> str:
        first, *rest = (
            cell.ljust(width) if not i else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(cells, widths, strict=True))
        )
        return "| " + " | ".join([first, *rest]) + " |"

    rule = "|" + "|".join("-" * (width + 1) + ("-" if not i else ":") for i, width in enumerate(widths)) + "|"
    return "\n".join([line(lines[0]), rule, *map(line, lines[1:])])
