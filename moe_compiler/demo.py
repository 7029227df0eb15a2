"""`moe-compiler demo`: the whole method on the embedded model, measured, in a few minutes on a laptop."""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from rich import box
from rich.console import Console
from rich.table import Table
from torch._dynamo.utils import counters

from moe_compiler.api import dynamo_compile
from moe_compiler.baseline import uniform_baseline
from moe_compiler.data import load_samples
from moe_compiler.embedded import DOMAINS, load_model, load_text
from moe_compiler.evaluate import perplexity
from moe_compiler.inspection import explain
from moe_compiler.passes.calibrate import Dataset
from moe_compiler.progress import RichProgress

BASELINE_BITS = 3
POOL_FRACTION = 0.02
Split = Literal["train", "evaluation"]


@dataclass(frozen=True)
class DemoRow:
    """One line of the demo's table.

    Attributes:
        name: what was measured.
        code_bits: mean width of the experts' codes.
        effective_bits: bits per expert weight, everything counted.
        size_bytes: bytes of the experts.
        perplexity: by domain.
    """

    name: str
    code_bits: float
    effective_bits: float
    size_bytes: int
    perplexity: Mapping[str, float]

    def loss(self, original: DemoRow, domains: Sequence[str]) -> float:
        """Mean of `100 · ln(perplexity / original perplexity)` over `domains`."""
        return 100 * sum(math.log(self.perplexity[d] / original.perplexity[d]) for d in domains) / len(domains)


@dataclass(frozen=True)
class DemoResult:
    """What the demo measured.

    Attributes:
        rows: original, uniform GPTQ, random 4/2, compiled, compiled and adapted to each new domain.
        seen: the domains it calibrated on.
        unseen: the others.
        recompilations: graphs compiled after the first pass, over all adaptations.
        graphs: graphs compiled in the first pass.
        seconds: wall-clock time of the whole demo.
    """

    rows: tuple[DemoRow, ...]
    seen: tuple[str, ...]
    unseen: tuple[str, ...]
    recompilations: int
    graphs: int
    seconds: float


def run_demo(
    *,
    seen: Sequence[str] = ("docs", "code"),
    calibration_tokens: int = 16_384,
    adapt_tokens: int = 8_192,
    evaluation_tokens: int = 16_384,
    console: Console | None = None,
) -> DemoResult:
    """Compiles the embedded model on two domains, adapts it to the others, and prints what that gave.

    Args:
        seen: domains to calibrate on.
        calibration_tokens: tokens of each of them.
        adapt_tokens: tokens of each new domain that `adapt` sees.
        evaluation_tokens: held-out tokens per domain that perplexity is measured on.
        console: where to print; standard output if `None`.

    Raises:
        ValueError: `seen` names an unknown domain, or leaves no domain unseen.
    """
    start = time.perf_counter()
    console = console or Console()
    unseen = tuple(domain for domain in DOMAINS if domain not in seen)
    if any(domain not in DOMAINS for domain in seen) or not seen or not unseen:
        raise ValueError(f"`seen` must be some, not all, of {', '.join(DOMAINS)}, but is {', '.join(seen)}")
    progress = RichProgress(Console(stderr=True))
    model, tokenizer = load_model()

    def windows(domain: str, split: Split, tokens: int) -> Dataset:
        text = load_text(domain, split, max_characters=8 * tokens)
        return load_samples(text, name=domain, tokenizer=tokenizer, sequence_length=256, max_tokens=tokens)

    calibration, evaluation = {}, {}
    with progress.task("reading and generating text", len(seen) + len(DOMAINS)) as advance:
        for domain in seen:
            calibration[domain] = windows(domain, "train", calibration_tokens)
            advance()
        for domain in DOMAINS:
            evaluation[domain] = windows(domain, "evaluation", evaluation_tokens)
            advance()

    def measure(candidate: Any, domains: Sequence[str] = DOMAINS) -> dict[str, float]:
        return {d: perplexity(candidate, evaluation[d], name=f"{d} text", progress=progress) for d in domains}

    uniform = uniform_baseline(model, calibration, BASELINE_BITS, progress=progress)
    target = uniform.effective_bits
    original_bytes = 2 * sum(p.numel() for name, p in model.named_parameters() if ".experts." in name)
    rows = [
        DemoRow("original", 16, 16, original_bytes, measure(model)),
        DemoRow(
            f"GPTQ-{BASELINE_BITS}*",
            uniform.code_bits,
            target,
            uniform.size_bytes,
            measure(uniform.model),
        ),
    ]
    random = dynamo_compile(
        copy.deepcopy(model),
        calibration,
        strategy="random",
        target_bits=target,
        pool_fraction=0.0,
        progress=progress,
    )
    rows.append(_row("random 4/2", random, measure(random)))
    dynamo_compile(
        model,
        calibration,
        target_bits=target,
        pool_fraction=POOL_FRACTION,
        master="memory",
        tokenizer=tokenizer,
        progress=progress,
    )
    static = measure(model)
    rows.append(_row("compiled", model, static))

    forward = torch.compile(model, fullgraph=True, dynamic=True)
    shapes = [(2, 48), (3, 31), (4, 64)]
    samples = torch.cat(list(evaluation[seen[0]]))
    counters.clear()
    with progress.task("compiling the serving graph", len(shapes)) as advance:
        for shape in shapes:
            _forward(forward, samples, shape)
            advance()
    graphs = counters["stats"]["unique_graphs"]
    adapted = dict(static)
    report = None
    with torch.compiler.set_stance("fail_on_recompile"):
        for domain in unseen:
            report = model.runtime.adapt(windows(domain, "train", adapt_tokens), name=domain)
            for shape in shapes:
                _forward(forward, samples, shape)
            adapted |= measure(model, [domain])
            model.runtime.revert()
    recompilations = counters["stats"]["unique_graphs"] - graphs
    rows.append(_row("adapted**", model, adapted))

    explain(model, layers=[next(iter(model.moe_graphs))], console=console)
    if report is not None:
        console.rule(f"[bold]what adapting to {report.name!r} moved")
        console.print(str(report), highlight=False, soft_wrap=True)
    result = DemoResult(tuple(rows), tuple(seen), unseen, recompilations, graphs, time.perf_counter() - start)
    _print(result, calibration_tokens, adapt_tokens, console)
    return result


@torch.no_grad()
def _forward(forward: Any, samples: torch.Tensor, shape: tuple[int, int]) -> None:
    forward(input_ids=samples[: shape[0] * shape[1]].view(shape), use_cache=False)


def _row(name: str, model: Any, measured: Mapping[str, float]) -> DemoRow:
    report = model.moe_report
    size = sum(entry.size_bytes for entry in report.coverage if entry.kind == "experts")
    return DemoRow(name, report.code_bits, report.effective_bits, size, measured)


def _print(result: DemoResult, calibration_tokens: int, adapt_tokens: int, console: Console) -> None:
    original = result.rows[0]
    table = Table(box=box.SIMPLE_HEAD)
    table.add_column("", no_wrap=True)
    for row in result.rows:
        table.add_column(row.name, justify="right", no_wrap=True)

    def line(name: str, cell: Callable[[DemoRow], str]) -> None:
        table.add_row(name, *map(cell, result.rows))

    line("code bits", lambda row: f"{row.code_bits:.2f}")
    line("effective bits", lambda row: f"{row.effective_bits:.2f}")
    line("experts, MB", lambda row: f"{row.size_bytes / 1e6:.2f}")
    table.add_section()
    for domain in (*result.seen, *result.unseen):
        kind = "seen" if domain in result.seen else "new"
        line(f"{domain} ({kind})", lambda row, domain=domain: f"{row.perplexity[domain]:.3f}")  # type: ignore[misc]
    table.add_section()
    line("loss, seen", lambda row: f"{row.loss(original, result.seen):.2f}")
    line("loss, new", lambda row: f"{row.loss(original, result.unseen):.2f}")
    console.rule("[bold]result")
    console.print(table)
    for note in (
        "Perplexity on held-out text by domain; loss: mean of 100 ln(perplexity / original).",
        f"Calibrated on {calibration_tokens:,} tokens of each seen domain.",
        "*  evaluated with dequantized weights; bits and bytes are those of a 3-bit packing",
        f"** every new domain after adapting in place to {adapt_tokens:,} of its tokens, from the original columns",
        f"   in host memory; the pool of {POOL_FRACTION:.0%} of the channels counts in the bits",
        f"{result.recompilations} recompilations over {len(result.unseen)} adaptations, "
        f"after {result.graphs} graph for 3 shapes; {result.seconds:.0f} s in all",
    ):
        console.print(note, highlight=False)
