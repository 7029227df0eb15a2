"""Figures of time: DynaMo's figure 8 (tokens per second) and figure 9 (shares of analysis and of switching)."""

from __future__ import annotations

import copy
import time
from argparse import Namespace
from collections.abc import Iterator
from contextlib import contextmanager
from statistics import median
from typing import Any

import bench_adapt
import bench_generate
import paper_published as published
import torch
from accuracy_compile import Compiler
from bench_adapt import AdaptRow
from bench_generate import Times
from harness import markdown_table
from paper_results import Finding, PaperRow, show
from paper_study import CHANNELS, RULE, Study, by_rounding, dynamo, random_half

from moe_compiler.passes.base import Advance, NoProgress

ANALYSIS_ENDS_WITH = "analysing experts"  # what `dynamo_compile` calls the last step before it quantizes
FP16 = bench_generate.ORIGINAL


class Clock:
    """A progress display that draws nothing, and notes when each step last ended.

    Attributes:
        ended: by the step's description, the time of `time.perf_counter`.
    """

    def __init__(self) -> None:
        self.ended: dict[str, float] = {}

    @contextmanager
    def task(self, description: str, total: int, unit: str = "") -> Iterator[Advance]:
        """Notes the time at the end of the step."""
        with NoProgress().task(description, total, unit) as advance:
            yield advance
        self.ended[description] = time.perf_counter()


@torch.no_grad()
def d_figure8(study: Study) -> Finding:
    """DynaMo, figure 8: tokens per second of generating, over the original."""
    given = study.options
    original = copy.deepcopy(study.model).to(torch.bfloat16)
    compiler = Compiler(original, study.texts, study.compile_options, NoProgress())
    cases = [by_rounding(random_half()), by_rounding(dynamo(given.bits))]
    models: dict[str, Any] = {FP16: original} | {case.name: compiler.compile(case)[0] for case in cases}
    prompt = next(iter(study.texts.evaluation.values()))[0][None, : given.prompt].to(original.device)
    static = original.device.type == "cuda"
    results = bench_generate.measure(models, prompt, given.speed_tokens, static, given.seconds, given.rounds)
    failed = [f"{name}: {one.reason}" for name, one in results.items() if not isinstance(one, Times)]
    if failed:
        raise RuntimeError("no times for " + "; ".join(failed))
    times = {name: one for name, one in results.items() if isinstance(one, Times)}
    lines, rows = [], []
    for name, one in times.items():
        speed = given.speed_tokens / median(one.whole)
        over = bench_generate.paired(times[FP16].whole, one.whole)
        decode = bench_generate.paired(times[FP16].decode, one.decode)
        theirs = f"{published.SPEEDUP[0]} to {published.SPEEDUP[1]}" if name == "DynaMo" else "–"
        lines.append([name, f"{speed:.1f}", show(over), show(decode), theirs])
        rows += [
            PaperRow("d-figure8", "measured", study.name, name, "generate", "", speed, "tokens/s"),
            PaperRow("d-figure8", "measured", study.name, name, "speed-up", "", over),
            PaperRow("d-figure8", "measured", study.name, name, "speed-up", "decode", decode),
        ]
    rows += [
        PaperRow("d-figure8", "published", "four models, A100", "DynaMo", "speed-up", which, value)
        for which, value in zip(("least", "most"), published.SPEEDUP, strict=True)
    ]
    weights = sum(parameter.numel() for parameter in original.parameters())
    return Finding(
        "d-figure8",
        f"speed ({published.DYNAMO}, figure 8)",
        f"{study.name} in bfloat16, {weights / 1e6:.1f} million parameters, on {original.device.type}; batch 1, prompt "
        f"{prompt.shape[1]}, {given.speed_tokens} new tokens; {len(times[FP16].whole)} rounds in turn, medians of the "
        "ratios.",
        (
            markdown_table(
                ("", "tokens/s", f"over {FP16}", "decode alone", "paper: over FP16, four models on an A100"), lines
            ),
        ),
        (
            "tokens per second of `generate`, prompt included; the paper names no lengths.",
            "weights are rounded to nearest here, on which time does not depend; the widths are those that d-table1 "
            "has.",
            "a model that fits the caches cannot be read faster by being smaller; `bench_generate.py` has real sizes.",
        ),
        rows,
    )


def d_figure9(study: Study) -> Finding:
    """DynaMo, figure 9: the share of the analysis when compiling, and of switching when serving."""
    given = study.options
    clock = Clock()
    case = dynamo(given.bits)
    model, offline = Compiler(study.model, study.texts, study.compile_options, clock).compile(case)
    analysis = offline - (time.perf_counter() - clock.ended[ANALYSIS_ENDS_WITH])
    online = _online(study, model)
    switch = _switch(study, model)
    shares = {
        "analysis, of compiling": (analysis, offline, analysis / offline, published.ANALYSIS_SHARE),
        "switching to new data, of it and generating": _share(online.adapt_s, online.generate_s),
        "switching to a known profile, the same": (*_share(switch, online.generate_s)[:3], None),
    }
    lines, rows = [], []
    for name, (part, whole, share, theirs) in shares.items():
        published_share = "–" if theirs is None else f"{theirs[0]:.2%} to {theirs[1]:.2%}"
        lines.append([name, f"{part:.4f}", f"{whole:.2f}", f"{share:.2%}", published_share])
        rows += [
            PaperRow("d-figure9", "measured", study.name, "DynaMo", name, "share", share),
            PaperRow("d-figure9", "measured", study.name, "DynaMo", name, "part", part, "s"),
            PaperRow("d-figure9", "measured", study.name, "DynaMo", name, "whole", whole, "s"),
        ]
        for which, value in zip(("least", "most"), theirs or (), strict=False):
            rows.append(PaperRow("d-figure9", "published", "four models, A100", "DynaMo", name, which, value))
    return Finding(
        "d-figure9",
        f"overhead ({published.DYNAMO}, figure 9)",
        f"{study.conditions} Switching sees {online.tokens:,} tokens; {online.generate_tokens:,} tokens are generated, "
        f"batch 1; medians of {online.rounds} rounds.",
        (markdown_table(("", "part, s", "whole, s", "share", "paper"), lines),),
        (
            "offline is one `dynamo_compile`; the analysis is all of it before the first weight is quantized: capture, "
            "observation, significance, clustering.",
            f"switching to new data is `adapt` by rule `{RULE}`: running the new tokens, choosing and copying. "
            "Switching to a known profile is `switch`: copying alone. The paper does not say which it timed, nor the "
            "tokens; both are there.",
            "the online share is switching / (switching + generating).",
        ),
        rows,
    )


def _share(part: float, rest: float) -> tuple[float, float, float, tuple[float, float]]:
    return part, part + rest, part / (part + rest), published.SWITCH_SHARE


def _online(study: Study, model: Any) -> AdaptRow:
    given = study.options
    options = Namespace(rules=[RULE], rounds=given.rounds, new_tokens=given.new_tokens, master="cache", pool=CHANNELS)
    samples = next(iter(study.texts.adaptation.values()), None)
    if samples is None:
        raise ValueError("`new` must name at least one domain for d-figure9, which switches to it, but there is none")
    found: list[AdaptRow] = bench_adapt.measure(model, study.name, samples, options)
    return found[0]


def _switch(study: Study, model: Any) -> float:
    """Median seconds of `switch` between two profiles that are known."""
    runtime = model.runtime
    runtime.adapt(next(iter(study.texts.adaptation.values())), name="new", rule=RULE)
    seconds = []
    for _ in range(3 * study.options.rounds):
        runtime.revert()
        start = time.perf_counter()
        runtime.switch("new")
        seconds.append(time.perf_counter() - start)
    return median(seconds)
