"""How long `model.runtime.adapt` takes, step by step, against generating 1,024 tokens with the same model.

`--model` is the embedded model, or any folder that transformers can load; widths and pool come from a real compilation
with rounding to nearest, which adapting does not depend on. `--shape` is a model of random weights at OLMoE-1B-7B's
sizes in bfloat16 with 2 of 16 layers, and a vocabulary cut in the same proportion. New data are text, or random tokens
for `--shape`. Adaptations, taken back each time, plain forward passes over the same data, and generations take turns.

Run: python benches/bench_adapt.py
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch
from adapt_models import EMBEDDED, WINDOW, compile_quickly, load, read_text, real_shape, windows
from environment import Environment, pick_device
from harness import CsvWriter, markdown_table
from models import FULL_LAYERS

from moe_compiler.config import MASTERS
from moe_compiler.passes.calibrate import batches
from moe_compiler.runtime.adaptation import RULES

CALIBRATION = ("docs", "code")
SHAPE = "OLMoE-1B-7B"
STEPS = ("observe", "choose", "swap")
PROMPT = 16


@dataclass(frozen=True)
class AdaptRow:
    """One rule on one model; seconds are medians over rounds.

    Attributes:
        model: the model.
        experts: experts of all layers together.
        rule: how the slots were filled.
        master: which original columns are kept.
        pool: share of the input channels that the pool holds.
        tokens: tokens of new data.
        forward_s: running them through the model, observing nothing.
        observe_s: running them through the model with observers.
        choose_s: computing the new contents.
        swap_s: copying them in: all that serving has to wait for.
        adapt_s: all steps.
        spread: longest adaptation over the shortest, less 1.
        generate_tokens: tokens generated, batch 1.
        generate_s: how long that took.
        share: `adapt_s` over `generate_s`.
        swap_share: `swap_s` over `generate_s`.
        rounds: how many times each was taken.
    """

    model: str
    experts: int
    rule: str
    master: str
    pool: float
    tokens: int
    forward_s: float
    observe_s: float
    choose_s: float
    swap_s: float
    adapt_s: float
    spread: float
    generate_tokens: int
    generate_s: float
    share: float
    swap_share: float
    rounds: int


def generate(model: Any, new_tokens: int) -> float:
    """Seconds of greedy generation of `new_tokens` tokens, in pieces that fit the model's context."""
    device = next(model.parameters()).device
    longest = model.config.max_position_embeddings - PROMPT
    prompt = torch.arange(2, 2 + PROMPT, device=device)[None]
    start = time.perf_counter()
    while new_tokens > 0:
        piece = min(longest, new_tokens)
        model.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            max_new_tokens=piece,
            min_new_tokens=piece,
            do_sample=False,
            pad_token_id=0,
        )
        new_tokens -= piece
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


@torch.no_grad()
def forward(model: Any, samples: Any) -> float:
    """Seconds of running the new data through the model, observing nothing: what no observation can be faster than."""
    device = next(model.parameters()).device
    start = time.perf_counter()
    for batch in batches(samples, model.runtime.tokens_per_batch):
        model.base_model(input_ids=batch.to(device), use_cache=False)
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def measure(model: Any, name: str, samples: Any, options: argparse.Namespace) -> list[AdaptRow]:
    """Each round adapts by every rule, takes it back, runs the samples through the model and generates."""
    runtime = model.runtime
    seconds: dict[str, dict[str, list[float]]] = {rule: {step: [] for step in STEPS} for rule in options.rules}
    generating, passing = [], []
    generate(model, min(8, options.new_tokens))
    tokens = 0
    for number in range(options.rounds + 1):  # the first one is to warm up
        for rule, steps in seconds.items():
            report = runtime.adapt(samples, rule=rule)
            runtime.revert()
            tokens = report.tokens
            for step in STEPS if number else ():
                steps[step].append(report.seconds[step])
        if number:
            passing.append(forward(model, samples))
            generating.append(generate(model, options.new_tokens))
    rows = []
    for rule, steps in seconds.items():
        totals = [sum(times) for times in zip(*steps.values(), strict=True)]
        middle = {step: median(times) for step, times in steps.items()}
        rows.append(
            AdaptRow(
                model=name,
                experts=sum(layer.experts.num_experts for layer in runtime.layers.values()),
                rule=rule,
                master=options.master,
                pool=options.pool,
                tokens=tokens,
                forward_s=median(passing),
                observe_s=middle["observe"],
                choose_s=middle["choose"],
                swap_s=middle["swap"],
                adapt_s=median(totals),
                spread=max(totals) / min(totals) - 1,
                generate_tokens=options.new_tokens,
                generate_s=median(generating),
                share=median(totals) / median(generating),
                swap_share=middle["swap"] / median(generating),
                rounds=options.rounds,
            )
        )
    return rows


def compiled(options: argparse.Namespace, device: torch.device) -> tuple[Any, Any, str]:
    """The compiled model, samples of new data, and the model's name."""
    if options.shape is not None:
        model = real_shape(options.layers, options.quick, options.pool, device)
        generator = torch.Generator().manual_seed(0)
        samples = torch.randint(2, model.config.vocab_size, (-(-options.tokens // WINDOW), WINDOW), generator=generator)
        return model, samples, f"{options.shape}, {options.layers} of {FULL_LAYERS} layers"
    model, tokenizer = load(options.model, device)
    calibration = {}
    for source in options.calibration:
        text = read_text(source, "train", options.calibration_tokens)
        calibration[source] = windows(text, options.calibration_tokens, tokenizer, model, name=source)
    text = read_text(options.text, "train", options.tokens)
    samples = windows(text, options.tokens, tokenizer, model, name=options.text)
    compile_quickly(model, calibration, options.pool, options.master)
    return model, samples, options.model


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--model", default=EMBEDDED, help="folder of a model; the embedded one by default")
    which.add_argument("--shape", type=_shape, help=f"random weights at the sizes of {SHAPE}, the only one")
    parser.add_argument("--layers", type=int, default=2, help="of the 16, for --shape")
    parser.add_argument("--calibration", nargs="+", default=CALIBRATION, help="text files or embedded domains")
    parser.add_argument("--text", default="records", help="the new data: a text file, or an embedded domain")
    parser.add_argument("--rules", nargs="+", choices=RULES, default=list(RULES))
    parser.add_argument("--master", choices=MASTERS, default="memory")
    parser.add_argument("--pool", type=float, default=0.01, help="share of the input channels")
    parser.add_argument("--tokens", type=int, default=4096, help="of new data")
    parser.add_argument("--calibration-tokens", type=int, default=8192, help="of each calibration text")
    parser.add_argument("--new-tokens", type=int, default=1024, help="to generate, batch 1")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--device", help="cpu or cuda; the default is the GPU where there is one")
    parser.add_argument("--csv", help="file to write")
    parser.add_argument("--quick", action="store_true", help="few tokens, to see that everything runs")
    options = parser.parse_args(arguments)
    if options.shape is not None and options.master != "memory":
        parser.error("--shape has no files, so its --master is memory")
    if options.quick:
        options.tokens, options.calibration_tokens, options.new_tokens, options.rounds = 256, 512, 8, 1
    return options


def _shape(name: str) -> str:
    """The name of the shape as it is written elsewhere.

    Raises:
        argparse.ArgumentTypeError: there is no such shape.
    """
    if name.lower() != SHAPE.lower():
        raise argparse.ArgumentTypeError(f"must be {SHAPE}, but is {name}")
    return SHAPE


def main(arguments: Sequence[str] | None = None) -> int:
    """Measures and prints; returns 0."""
    options = parse(arguments)
    device = pick_device(options.device)
    environment = Environment.of(device)
    print(environment)
    model, samples, name = compiled(options, device)
    rows = measure(model, name, samples, options)
    with CsvWriter(options.csv, AdaptRow, environment) as writer:
        for row in rows:
            writer.write(row)
    one = rows[0]
    print(
        f"\n{one.model}, {one.experts} experts, pool {one.pool:.1%}, master {one.master}; {one.tokens:,} new "
        f"tokens; median of {one.rounds} rounds\n"
    )
    header = (
        "rule", "forward s", "observe s", "choose s", "swap s", "adapt s", "spread",
        f"generate {one.generate_tokens:,} s", "adapt share", "swap share",
    )  # fmt: skip
    table = [
        (
            row.rule,
            f"{row.forward_s:.3f}",
            f"{row.observe_s:.3f}",
            f"{row.choose_s:.3f}",
            f"{row.swap_s:.4f}",
            f"{row.adapt_s:.3f}",
            f"{row.spread:.1%}",
            f"{row.generate_s:.2f}",
            f"{row.share:.1%}",
            f"{row.swap_share:.2%}",
        )
        for row in rows
    ]
    print(markdown_table(header, table))
    return 0


if __name__ == "__main__":
    sys.exit(main())
