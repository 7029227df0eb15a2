"""How long `model.runtime.adapt` takes, step by step, against generating 1,024 tokens with the same model.

By default on the embedded model; `--model` takes any folder that transformers can load. The widths and the pool come
from a real compilation with rounding to nearest, which adapting does not depend on. Adaptations, taken back each time,
and generations take turns.

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
from environment import Environment, pick_device
from harness import CsvWriter, markdown_table
from transformers import AutoModelForCausalLM, AutoTokenizer

from moe_compiler import dynamo_compile
from moe_compiler.config import MASTERS
from moe_compiler.data import load_samples
from moe_compiler.embedded import load_model, load_text
from moe_compiler.runtime.adaptation import RULES

CALIBRATION = ("docs", "code")
NEW_DOMAIN = "records"
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
        observe_s: running them through the model.
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


def measure(model: Any, name: str, rule: str, samples: Any, options: argparse.Namespace) -> AdaptRow:
    """Adapts, takes it back and generates, in turn."""
    seconds: dict[str, list[float]] = {step: [] for step in STEPS}
    generating = []
    tokens = 0
    model.runtime.adapt(samples, rule=rule)
    model.runtime.revert()
    generate(model, min(8, options.new_tokens))
    for _ in range(options.rounds):
        report = model.runtime.adapt(samples, rule=rule)
        model.runtime.revert()
        tokens = report.tokens
        for step in STEPS:
            seconds[step].append(report.seconds[step])
        generating.append(generate(model, options.new_tokens))
    totals = [sum(times) for times in zip(*seconds.values(), strict=True)]
    middle = {step: median(times) for step, times in seconds.items()}
    return AdaptRow(
        model=name,
        experts=sum(layer.experts.num_experts for layer in model.runtime.layers.values()),
        rule=rule,
        master=options.master,
        pool=options.pool,
        tokens=tokens,
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


def compiled(options: argparse.Namespace, device: torch.device) -> tuple[Any, Any, str]:
    """The compiled model, samples of new data, and the model's name."""
    if options.model is None:
        model, tokenizer = load_model(torch.bfloat16 if device.type == "cuda" else torch.float32)
        name = "embedded"
    else:
        model = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.bfloat16)
        tokenizer = AutoTokenizer.from_pretrained(options.model)
        name = options.model
    model.to(device)
    vocabulary = model.get_input_embeddings().num_embeddings

    def windows(domain: str, tokens: int) -> Any:
        text = load_text(domain, "train", max_characters=8 * tokens)
        return load_samples(
            text, name=domain, tokenizer=tokenizer, sequence_length=256, max_tokens=tokens, vocab_size=vocabulary
        )

    calibration = {domain: windows(domain, options.calibration_tokens) for domain in CALIBRATION}
    dynamo_compile(
        model, calibration, quantizer="rtn", pool_fraction=options.pool, master=options.master, progress=False
    )
    return model, windows(NEW_DOMAIN, options.tokens), name


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", help="folder of a model; the embedded one by default")
    parser.add_argument("--rules", nargs="+", choices=RULES, default=list(RULES))
    parser.add_argument("--master", choices=MASTERS, default="memory")
    parser.add_argument("--pool", type=float, default=0.01, help="share of the input channels")
    parser.add_argument("--tokens", type=int, default=8192, help="of new data")
    parser.add_argument("--calibration-tokens", type=int, default=8192, help="of each calibration domain")
    parser.add_argument("--new-tokens", type=int, default=1024, help="to generate, batch 1")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--device", help="cpu or cuda; the default is the GPU where there is one")
    parser.add_argument("--csv", help="file to write")
    parser.add_argument("--quick", action="store_true", help="few tokens, to see that everything runs")
    options = parser.parse_args(arguments)
    if options.quick:
        options.tokens, options.calibration_tokens, options.new_tokens, options.rounds = 256, 512, 8, 1
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    """Measures and prints; returns 0."""
    options = parse(arguments)
    device = pick_device(options.device)
    environment = Environment.of(device)
    print(environment)
    model, samples, name = compiled(options, device)
    rows = []
    with CsvWriter(options.csv, AdaptRow, environment) as writer:
        for rule in options.rules:
            rows.append(measure(model, name, rule, samples, options))
            writer.write(rows[-1])
    one = rows[0]
    print(
        f"\n{one.model} model, {one.experts} experts, pool {one.pool:.1%}, master {one.master}; {one.tokens:,} new "
        f"tokens; median of {one.rounds} rounds\n"
    )
    header = (
        "rule", "observe s", "choose s", "swap s", "adapt s", "spread", f"generate {one.generate_tokens:,} s",
        "adapt share", "swap share",
    )  # fmt: skip
    table = [
        (
            row.rule,
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
