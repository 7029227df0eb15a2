"""Tokens per second of `generate`: a model of random weights at OLMoE-1B-7B's sizes, bfloat16 against packed experts.

Both run the same code of transformers; the packed model is the original with its experts replaced by the real lowering,
from random packed weights, so that nothing has to be quantized. On a GPU: all 16 layers, static cache, compiled by
`generate` itself. On a CPU: a few layers, eager, with the vocabulary cut in the same proportion, so that the output
layer keeps its share of the work.

Run: python benches/bench_generate.py --layers 2
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
from harness import CsvWriter, Failure, markdown_table
from models import FULL_LAYERS, build_original, build_packed, expert_bytes, model_config
from torch import Tensor, nn
from transformers import (
    StaticCache,
    StoppingCriteria,
    StoppingCriteriaList,
)

ORIGINAL, PACKED = "bf16", "packed"


@dataclass(frozen=True)
class GenerateRow:
    """One model at one batch size. Times that were not measured are `None`.

    Attributes:
        model: what the sizes are those of.
        layers: layers, of 16 in the real model.
        vocabulary: tokens.
        batch: sequences.
        prompt: tokens of each prompt.
        new_tokens: tokens generated for each.
        bits: width of the packed codes; 3 is half 2 and half 4 bits.
        pool: share of the input channels that the pool holds, all slots in use.
        cache: key-value cache, `"static"` (compiled by `generate` on a GPU) or `"dynamic"`.
        candidate: `"bf16"` or `"packed"`.
        status: `"ok"`, or why there is no time.
        rounds: how many times were taken, the candidates in turn.
        tokens_per_s: all new tokens over the time of `generate`, prompt included; median over rounds.
        decode_tokens_per_s: the new tokens after the first over the time they took.
        prompt_ms: time to the first token.
        spread: longest time of `generate` over the shortest, less 1.
        warmup_s: seconds of the first `generate`, compilation included.
        speedup: tokens per second over those of `"bf16"`, the median over rounds.
        decode_speedup: the same of decoding alone.
        expert_bytes: bytes of all experts.
    """

    model: str
    layers: int
    vocabulary: int
    batch: int
    prompt: int
    new_tokens: int
    bits: int
    pool: float
    cache: str
    candidate: str
    status: str
    rounds: int
    tokens_per_s: float | None
    decode_tokens_per_s: float | None
    prompt_ms: float | None
    spread: float | None
    warmup_s: float | None
    speedup: float | None
    decode_speedup: float | None
    expert_bytes: int


@dataclass(frozen=True)
class Times:
    """Seconds of `generate` in each round, of its first token alone, and of the very first call."""

    whole: list[float]
    first: list[float]
    warmup_s: float

    @property
    def decode(self) -> list[float]:
        """Seconds of all tokens after the first."""
        return [whole - first for whole, first in zip(self.whole, self.first, strict=True)]


class FirstToken(StoppingCriteria):  # type: ignore[misc]  # transformers is untyped here
    """Notes when the first token is there; never stops."""

    def __init__(self) -> None:
        self.at: float | None = None

    def __call__(self, input_ids: Tensor, scores: Tensor, **_: Any) -> Tensor:
        """Called after every token."""
        if self.at is None:
            synchronize(input_ids.device)
            self.at = time.perf_counter()
        return torch.zeros(input_ids.shape[0], dtype=torch.bool, device=input_ids.device)


def synchronize(device: torch.device) -> None:
    """Waits for the device."""
    if device.type == "cuda":
        torch.cuda.synchronize()


def generate(model: Any, prompt: Tensor, new_tokens: int, cache: StaticCache | None) -> tuple[float, float]:
    """Seconds of greedy generation of exactly `new_tokens` tokens: of all of it, and to the first token."""
    first = FirstToken()
    if cache is not None:
        cache.reset()
    synchronize(prompt.device)
    start = time.perf_counter()
    model.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        max_new_tokens=new_tokens,
        min_new_tokens=new_tokens,
        do_sample=False,
        past_key_values=cache,
        stopping_criteria=StoppingCriteriaList([first]),
    )
    synchronize(prompt.device)
    end = time.perf_counter()
    assert first.at is not None
    return end - start, first.at - start


def measure(
    models: dict[str, Any], prompt: Tensor, new_tokens: int, static: bool, seconds: float, rounds: int
) -> dict[str, Times | Failure]:
    """Times the models in turn, for `seconds` and at least `rounds` rounds. Compiling comes first and on its own."""
    length = prompt.shape[1] + new_tokens
    caches = {
        name: StaticCache(model.config, max_cache_len=length) if static else None for name, model in models.items()
    }
    results: dict[str, Times | Failure] = {}
    for name, model in models.items():
        try:
            warmup_s, _ = generate(model, prompt, new_tokens, caches[name])
            generate(model, prompt, new_tokens, caches[name])
            results[name] = Times([], [], warmup_s)
        except (RuntimeError, torch.OutOfMemoryError) as error:
            results[name] = Failure.of(error)
    ready = {name: result for name, result in results.items() if isinstance(result, Times)}
    start = time.perf_counter()
    done = 0
    while ready and (done < rounds or time.perf_counter() - start < seconds):
        for name, times in ready.items():
            whole, first = generate(models[name], prompt, new_tokens, caches[name])
            times.whole.append(whole)
            times.first.append(first)
        done += 1
    return results


def make_row(setting: dict[str, Any], name: str, model: nn.Module, results: dict[str, Times | Failure]) -> GenerateRow:
    """The row of one candidate."""
    result, original = results[name], results[ORIGINAL]
    base = original if isinstance(original, Times) else None
    tokens = setting["batch"] * setting["new_tokens"]
    if isinstance(result, Failure):
        nothing = dict.fromkeys(
            ("tokens_per_s", "decode_tokens_per_s", "prompt_ms", "spread", "warmup_s", "speedup", "decode_speedup")
        )
        measured: dict[str, Any] = {"status": result.reason, "rounds": 0, **nothing}
    else:
        measured = {
            "status": "ok",
            "rounds": len(result.whole),
            "tokens_per_s": tokens / median(result.whole),
            "decode_tokens_per_s": (tokens - setting["batch"]) / median(result.decode),
            "prompt_ms": 1000 * median(result.first),
            "spread": max(result.whole) / min(result.whole) - 1,
            "warmup_s": result.warmup_s,
            "speedup": paired(base.whole, result.whole) if base else None,
            "decode_speedup": paired(base.decode, result.decode) if base else None,
        }
    return GenerateRow(**setting, candidate=name, **measured, expert_bytes=expert_bytes(model))


def paired(baseline: Sequence[float], times: Sequence[float]) -> float:
    """Median over rounds of the baseline's time over the candidate's."""
    return median(theirs / ours for theirs, ours in zip(baseline, times, strict=True))


def print_rows(rows: Sequence[GenerateRow]) -> None:
    """Prints the rows as a table."""

    def show(value: float | None, form: str = ".1f") -> str:
        return "-" if value is None else format(value, form)

    header = (
        "batch", "candidate", "tokens/s", "over bf16", "decode tokens/s", "over bf16", "prompt ms", "spread",
        "warm-up s", "experts MiB",
    )  # fmt: skip
    table = [
        (
            str(row.batch),
            row.candidate if row.status == "ok" else f"{row.candidate}: {row.status}",
            show(row.tokens_per_s),
            show(row.speedup, ".2f"),
            show(row.decode_tokens_per_s),
            show(row.decode_speedup, ".2f"),
            show(row.prompt_ms),
            show(row.spread, ".1%"),
            show(row.warmup_s),
            f"{row.expert_bytes / 2**20:.1f}",
        )
        for row in rows
    ]
    print()
    print(markdown_table(header, table), flush=True)


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, help="the default is 16 on a GPU, 2 on a CPU")
    parser.add_argument("--batch", nargs="+", type=int, default=[1, 8])
    parser.add_argument("--prompt", type=int, default=128)
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--bits", type=int, choices=(2, 3, 4, 6, 8), default=3, help="3: half 2, half 4")
    parser.add_argument("--pool", type=float, default=0.01, help="share of the input channels")
    parser.add_argument("--cache", choices=("static", "dynamic"), help="the default is static on a GPU")
    parser.add_argument("--seconds", type=float, default=10.0, help="for the rounds of one batch size")
    parser.add_argument("--rounds", type=int, default=3, help="at least so many")
    parser.add_argument("--device", help="cpu or cuda; the default is the GPU where there is one")
    parser.add_argument("--csv", help="file to write")
    parser.add_argument("--quick", action="store_true", help="tiny sizes, to see that everything runs")
    options = parser.parse_args(arguments)
    if options.quick:
        options.layers, options.batch, options.prompt, options.new_tokens = 1, [1, 2], 8, 3
        options.seconds, options.rounds = 0.0, 1
    return options


@torch.no_grad()
def main(arguments: Sequence[str] | None = None) -> int:
    """Measures and prints; returns 1 if a model failed, else 0."""
    options = parse(arguments)
    device = pick_device(options.device)
    environment = Environment.of(device)
    print(environment)
    torch.manual_seed(0)
    config = model_config(options.layers or (FULL_LAYERS if device.type == "cuda" else 2), options.quick)
    original = build_original(config, device)
    models = {ORIGINAL: original, PACKED: build_packed(original, options.bits, options.pool)}
    cache = options.cache or ("static" if device.type == "cuda" else "dynamic")
    name = "tiny" if options.quick else "OLMoE-1B-7B"
    print(
        f"\n{name} with {config.num_hidden_layers} of {FULL_LAYERS} layers "
        f"and {config.vocab_size} tokens, random weights; prompt {options.prompt}, {options.new_tokens} new tokens; "
        f"{options.bits} bits, pool {options.pool:.1%}; {cache} cache"
    )
    rows: list[GenerateRow] = []
    with CsvWriter(options.csv, GenerateRow, environment) as writer:
        for batch in options.batch:
            prompt = torch.randint(1, config.vocab_size, (batch, options.prompt), device=device)
            results = measure(models, prompt, options.new_tokens, cache == "static", options.seconds, options.rounds)
            setting = {
                "model": name,
                "layers": config.num_hidden_layers,
                "vocabulary": config.vocab_size,
                "batch": batch,
                "prompt": options.prompt,
                "new_tokens": options.new_tokens,
                "bits": options.bits,
                "pool": options.pool,
                "cache": cache,
            }
            found = [make_row(setting, candidate, model, results) for candidate, model in models.items()]
            print_rows(found)
            for row in found:
                writer.write(row)
            rows += found
    return 1 if any(row.status != "ok" for row in rows) else 0


if __name__ == "__main__":
    sys.exit(main())
