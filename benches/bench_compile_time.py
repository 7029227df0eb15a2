"""How long `dynamo_compile` takes, step by step; at a real model's sizes measured on one layer and estimated for all.

`--model` is the embedded model or any folder that transformers can load, calibrated on text. `--shape` is one layer of
random weights at OLMoE-1B-7B's sizes in bfloat16, calibrated on random tokens. The estimate for all layers multiplies
what every layer costs, and with `--experts` fewer than the model's what every expert costs (a token takes as many as
ever). It counts the forward passes: for each window of layers whose Hessians fit `hessian_memory_bytes`, all layers run
once to collect them, once more where widths are measured as well, and once to compare the inputs of the second linears
with and without a quantized first one.

Run: python benches/bench_compile_time.py
"""

from __future__ import annotations

import argparse
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from adapt_models import EMBEDDED, WINDOW, load, read_text, windows
from environment import Environment, pick_device
from harness import CsvWriter, markdown_table
from models import FULL_LAYERS, build_original, model_config

from moe_compiler import CompileConfig, dynamo_compile
from moe_compiler.passes.base import Advance

SHAPE = "OLMoE-1B-7B"
TEXTS = ("docs", "code")
OBSERVING, HESSIANS, COMPARING = "observing", "collecting Hessians", "comparing"
REST, TOTAL = "everything else", "in all"
PER_EXPERT = ("measuring widths", "quantizing")  # steps whose time grows with the experts, not with tokens


@dataclass(frozen=True)
class CompileTimeRow:
    """One step of a compilation.

    Attributes:
        model: the model.
        layers: MoE layers that were compiled.
        weights: weights of their experts.
        tokens: tokens of calibration data.
        step: the step.
        seconds: measured.
        all_layers: layers of the whole model.
        all_seconds: estimated for the whole model; what was measured where that was the whole model.
    """

    model: str
    layers: int
    weights: int
    tokens: int
    step: str
    seconds: float
    all_layers: int
    all_seconds: float


class Stopwatch:
    """Shows no progress, but takes the time of each step; passes that collect Hessians apart from the first ones."""

    def __init__(self) -> None:
        self.seconds: Counter[str] = Counter()
        self.calls: Counter[str] = Counter()

    @contextmanager
    def task(self, description: str, total: int, unit: str = "") -> Iterator[Advance]:
        """Opens a step, see `moe_compiler.passes.base.Progress`."""
        step = description
        if description.startswith(OBSERVING):
            step = HESSIANS if self.calls[description] else OBSERVING
        if description.startswith(COMPARING):
            step = COMPARING
        self.calls[description] += 1
        start = time.perf_counter()
        try:
            yield lambda count=1: None
        finally:
            self.seconds[step] += time.perf_counter() - start
            self.calls[step] += step != description


def estimate(one: dict[str, float], layers: int, per_window: int, passes: int) -> dict[str, float]:
    """The seconds of a model of many layers from those of a model of one of them.

    Args:
        one: by step, the seconds of one layer; its Hessians were collected once. Steps that are not in it take none.
        layers: of the whole model.
        per_window: layers whose Hessians fit in memory together.
        passes: how often each window's Hessians are collected, if there are several windows.
    """
    count = -(-layers // per_window)
    rounds = passes if count > 1 else 1
    every = {step: layers * seconds for step, seconds in one.items()}
    for step, times in ((HESSIANS, rounds), (COMPARING, 1)):
        if step in one:
            adding = max(0.0, one[step] - one[OBSERVING])
            every[step] = times * layers * (adding + count * one[OBSERVING])
    return every


def layers_per_window(hidden_size: int, intermediate_size: int, experts: int, memory_bytes: int) -> int:
    """How many layers' Hessians, twice, fit in so much memory; at least one."""
    return max(1, memory_bytes // (8 * experts * (hidden_size**2 + intermediate_size**2)))


def measure(model: Any, calibration: dict[str, Any]) -> dict[str, float]:
    """Compiles a model by default settings; seconds by step, all of them together last."""
    watch = Stopwatch()
    start = time.perf_counter()
    dynamo_compile(model, calibration, progress=watch)
    total = time.perf_counter() - start
    return {**watch.seconds, REST: total - watch.seconds.total(), TOTAL: total}


def rows_of_shape(options: argparse.Namespace, device: torch.device) -> list[CompileTimeRow]:
    """One layer measured, all of them estimated.

    Raises:
        ValueError: `experts` are fewer than a token takes, or more than there are.
    """
    config = model_config(1, options.quick)
    full, config.num_experts = config.num_experts, options.experts or config.num_experts
    if not config.num_experts_per_tok <= config.num_experts <= full:
        raise ValueError(
            f"`experts` must lie between the {config.num_experts_per_tok} of a token and the {full} of {SHAPE}, "
            f"but is {config.num_experts}"
        )
    model = build_original(config, device)
    generator = torch.Generator().manual_seed(0)
    samples = torch.randint(2, config.vocab_size, (-(-options.tokens // WINDOW), WINDOW), generator=generator)
    one = measure(model, {"random": samples})
    del one[TOTAL]
    default = CompileConfig()
    experts, hidden, inner = config.num_experts, config.hidden_size, config.intermediate_size
    per_window = layers_per_window(hidden, inner, full, default.hessian_memory_bytes)
    passes = 2 if default.strategy == "budget" else 1
    layer = {step: seconds * (full / experts if step in PER_EXPERT else 1) for step, seconds in one.items()}
    every = estimate(layer, FULL_LAYERS, per_window, passes)
    one[TOTAL], every[TOTAL] = sum(one.values()), sum(every.values())
    weights = experts * 3 * hidden * inner
    name = f"{SHAPE}, one layer" + (f" with {experts} of {full} experts" if experts < full else "")
    return [
        CompileTimeRow(name, 1, weights, samples.numel(), step, seconds, FULL_LAYERS, every[step])
        for step, seconds in one.items()
    ]


def rows_of_model(options: argparse.Namespace, device: torch.device) -> list[CompileTimeRow]:
    """A whole model, measured."""
    model, tokenizer = load(options.model, device)
    calibration = {}
    for source in options.calibration:
        text = read_text(source, "train", options.tokens)
        calibration[source] = windows(text, options.tokens, tokenizer, model, name=source)
    seconds = measure(model, calibration)
    layers = model.runtime.layers.values()
    weights = sum(p.out_features * p.in_features for one in layers for p in one.block.spec.projections)
    weights *= next(iter(layers)).block.spec.num_experts
    tokens = options.tokens * len(calibration)
    return [
        CompileTimeRow(options.model, len(layers), weights, tokens, step, one, len(layers), one)
        for step, one in seconds.items()
    ]


def main(arguments: Sequence[str] | None = None) -> int:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--model", default=EMBEDDED, help="folder of a model; the embedded one by default")
    which.add_argument("--shape", choices=(SHAPE,), help="random weights at its sizes")
    parser.add_argument("--calibration", nargs="+", default=TEXTS, help="text files or embedded domains")
    parser.add_argument("--tokens", type=int, default=16384, help="of each text, or random ones for --shape")
    parser.add_argument("--experts", type=int, help="of the layer for --shape; all by default, which takes longer")
    parser.add_argument("--device", help="cpu or cuda; the default is the GPU where there is one")
    parser.add_argument("--csv", help="file to write")
    parser.add_argument("--quick", action="store_true", help="tiny sizes, to see that everything runs")
    options = parser.parse_args(arguments)
    if options.quick:
        options.tokens = 2 * WINDOW
    device = pick_device(options.device)
    environment = Environment.of(device)
    print(environment, flush=True)
    rows = (rows_of_model if options.shape is None else rows_of_shape)(options, device)
    with CsvWriter(options.csv, CompileTimeRow, environment) as file:
        for row in rows:
            file.write(row)
    first = rows[0]
    print(f"\n{first.model}: {first.weights:,} expert weights, {first.tokens:,} tokens of calibration, defaults\n")
    header = ["step", "measured, s"]
    if first.all_layers != first.layers:
        header.append(f"{first.all_layers} layers, estimated, s")
    cells = ([row.step, f"{row.seconds:.1f}", f"{row.all_seconds:.0f}"][: len(header)] for row in rows)
    print(markdown_table(header, cells))
    return 0


if __name__ == "__main__":
    sys.exit(main())
