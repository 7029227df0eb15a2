"""`moe-compiler compile`: quantizes a model and saves it."""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from moe_compiler.api import dynamo_compile
from moe_compiler.attachment import describe_sources
from moe_compiler.cli.config_options import read_config
from moe_compiler.cli.models import load
from moe_compiler.cli.names import has_held_out_split
from moe_compiler.cli.output import print_json, print_table, print_text
from moe_compiler.cli.parser import UsageError
from moe_compiler.cli.texts import count, read_windows
from moe_compiler.config import CompileConfig
from moe_compiler.evaluate import perplexity
from moe_compiler.passes.calibrate import Dataset
from moe_compiler.progress import RichProgress

Datasets = dict[str, Dataset]


def run(options: argparse.Namespace) -> None:
    """Compiles, measures if it was asked to, saves, and prints what came out."""
    config = read_config(options)
    _check(options)
    start = time.perf_counter()
    progress = RichProgress()
    model, tokenizer = load(options.model, options)
    calibration, evaluation = read_datasets(options, config, model, tokenizer)
    before = _measure(model, evaluation, progress)
    dynamo_compile(model, calibration, config, tokenizer=tokenizer, progress=progress)
    after = _measure(model, evaluation, progress)
    if evaluation:
        perplexities = {name: (before[name], after[name]) for name in evaluation}
        model.moe_report = replace(model.moe_report, perplexities=perplexities)
    used = replace(model.config.quantization_config, calibration=dict(options.data), max_tokens=options.tokens)
    describe_sources(model, used)
    model.save_pretrained(options.output)
    tokenizer.save_pretrained(options.output)
    _print(options, model, calibration, evaluation, before, after, time.perf_counter() - start)


def _check(options: argparse.Namespace) -> None:
    """Refuses what would fail only after the long part."""
    for name in ("data", "eval_data"):
        names = [one for one, _ in getattr(options, name) or ()]
        if len(set(names)) < len(names):
            raise UsageError(f"`--{name.replace('_', '-')}` must give every dataset a name of its own, but has {names}")
    output = Path(options.output)
    if output.exists() and not output.is_dir():
        raise UsageError(f"`--output` must be a folder, but {output} is a file")
    if output.is_dir() and any(output.iterdir()) and not options.overwrite:
        raise UsageError(f"`--output` must be a new or empty folder, but {output} is not: give --overwrite to use it")


def read_datasets(
    options: argparse.Namespace, config: CompileConfig, model: Any, tokenizer: Any
) -> tuple[Datasets, Datasets]:
    """The windows to calibrate on, and those to measure on.

    Args:
        options: what was typed.
        config: how long windows are, and the seed that draws texts.
        model: its vocabulary must have the ids.
        tokenizer: turns text into ids.

    Returns:
        Both by dataset. The second holds the `--eval-data`, or the windows that follow the first ones in the same
        source, or the evaluation split of an embedded domain; nothing without `--evaluate` and `--eval-data`.

    Raises:
        ValueError: nothing follows; or a source is bad, see `moe_compiler.cli.names.texts_of`.
    """
    window = config.sequence_length
    calibration: Datasets = {}
    evaluation: Datasets = {}
    follow = options.evaluate and not options.eval_data
    for name, source in options.data:
        common: dict[str, Any] = {"name": name, "window": window, "seed": config.seed}
        both = options.tokens + options.eval_tokens  # also without --evaluate, so that the same texts are drawn
        found = read_windows(source, tokenizer, model, options, tokens=both, **common)
        first = math.ceil(options.tokens / window)
        calibration[name], rest = found[:first], found[first:]
        if follow and options.split is None and has_held_out_split(source):
            rest = read_windows(source, tokenizer, model, options, tokens=options.eval_tokens, held_out=True, **common)
        if follow and not rest:
            raise ValueError(
                f"`--evaluate` must find text after the {options.tokens:,} tokens to calibrate on, but {name!r} has "
                f"{count(found):,} in all: give fewer `--tokens`, or `--eval-data`"
            )
        if follow:
            evaluation[name] = rest
    apart = argparse.Namespace(**vars(options) | {"split": options.eval_split or options.split})
    for name, source in options.eval_data or ():
        tokens = options.eval_tokens
        evaluation[name] = read_windows(
            source, tokenizer, model, apart, name=name, tokens=tokens, window=window, held_out=True
        )
    return calibration, evaluation


def _measure(model: Any, datasets: Mapping[str, Dataset], progress: RichProgress) -> dict[str, float]:
    return {name: perplexity(model, windows, name=name, progress=progress) for name, windows in datasets.items()}


def _print(
    options: argparse.Namespace,
    model: Any,
    calibration: Datasets,
    evaluation: Datasets,
    before: Mapping[str, float],
    after: Mapping[str, float],
    seconds: float,
) -> None:
    report = model.moe_report
    experts = report.experts
    if options.json:
        print_json(
            {
                "output": options.output,
                "config": report.config.to_dict(),
                "code_bits": report.code_bits,
                "effective_bits": report.effective_bits,
                "expert_weights": experts.weights,
                "expert_bytes": experts.size_bytes,
                "calibration_tokens": {name: count(windows) for name, windows in calibration.items()},
                "evaluation_tokens": {name: count(windows) for name, windows in evaluation.items()},
                "perplexity": {name: {"original": before[name], "compiled": after[name]} for name in evaluation},
                "seconds": seconds,
            }
        )
        return
    if evaluation:
        rows = [
            [name, f"{count(windows):,}", f"{before[name]:.3f}", f"{after[name]:.3f}", _loss(before[name], after[name])]
            for name, windows in evaluation.items()
        ]
        print_table(["perplexity", "tokens", "original", "compiled", "loss"], rows)
        print_text("loss: 100 ln(compiled / original)")
    seen = ", ".join(f"{name} ({count(windows):,} tokens)" for name, windows in calibration.items())
    print_text(
        f"calibrated on {seen}\n"
        f"experts: {experts.weights:,} weights, {experts.code_bits:.3f} code bits, "
        f"{experts.effective_bits:.3f} effective bits, {experts.size_bytes / 1e6:.2f} MB\n"
        f"saved in {options.output}; {seconds:.0f} s in all"
    )


def _loss(before: float, after: float) -> str:
    return f"{100 * math.log(after / before):.2f}"
