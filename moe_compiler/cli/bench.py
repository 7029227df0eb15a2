"""`moe-compiler bench`: speed and memory of a compiled model against the original."""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn
from transformers import StoppingCriteria, StoppingCriteriaList

from moe_compiler.cli.models import load, load_compiled, switch_profile
from moe_compiler.cli.output import print_json, print_table, print_text
from moe_compiler.cli.parser import UsageError
from moe_compiler.cli.texts import count, read_windows
from moe_compiler.progress import RichProgress

ORIGINAL, COMPILED = "original", "compiled"
SWITCHES = 20


@dataclass(frozen=True)
class Speed:
    """What was measured of one model.

    Attributes:
        prompt_s: seconds to the first token, in each round.
        decode_s: seconds of the tokens after it, in each round.
        weight_bytes: bytes of parameters and buffers.
        peak_bytes: most bytes that the GPU had in use meanwhile; 0 on a CPU.
    """

    prompt_s: tuple[float, ...]
    decode_s: tuple[float, ...]
    weight_bytes: int
    peak_bytes: int


def run(options: argparse.Namespace) -> None:
    """Loads the models, lets them take turns, and prints the medians and the ratios."""
    if options.new_tokens < 2:
        raise UsageError(f"`--new-tokens` must be at least 2, but is {options.new_tokens}")
    compiled, tokenizer = load_compiled(options.model, options)
    switch_profile(compiled, options.profile)
    models = {COMPILED: compiled}
    if options.original is not None:
        models = {ORIGINAL: load(options.original, options)[0], COMPILED: compiled}
    prompt = _prompt(options, compiled, tokenizer)
    speeds = _measure(models, prompt, options)
    _print(options, models, speeds, _switch_ms(compiled))


def _prompt(options: argparse.Namespace, model: Any, tokenizer: Any) -> Tensor:
    """`(batch, prompt_tokens)` ids of real text, whose routing is that of real text."""
    wanted = options.batch * options.prompt_tokens
    windows = read_windows(
        options.data, tokenizer, model, options, name="prompts", tokens=wanted, window=wanted, held_out=True
    )
    if count(windows) < wanted:
        raise ValueError(f"`--data` must have {wanted:,} tokens for the prompts, but has {count(windows):,}")
    return windows[0].view(options.batch, options.prompt_tokens).to(model.device)


def _measure(models: Mapping[str, Any], prompt: Tensor, options: argparse.Namespace) -> dict[str, Speed]:
    cache = {"cache_implementation": "static"} if options.static_cache else {}
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in models}
    peaks = dict.fromkeys(models, 0)
    with RichProgress().task("taking turns", (1 + options.rounds) * len(models)) as advance:
        for number in range(1 + options.rounds):
            for name, model in models.items():
                if prompt.is_cuda:
                    torch.cuda.reset_peak_memory_stats()
                taken = _generate(model, prompt, options.new_tokens, cache)
                if prompt.is_cuda:
                    peaks[name] = torch.cuda.max_memory_allocated()
                if number:  # the first round compiles and warms up
                    times[name].append(taken)
                advance()
    return {
        name: Speed(
            prompt_s=tuple(first for first, _ in found),
            decode_s=tuple(rest for _, rest in found),
            weight_bytes=weight_bytes(models[name]),
            peak_bytes=peaks[name],
        )
        for name, found in times.items()
    }


class _FirstToken(StoppingCriteria):  # type: ignore[misc]  # transformers is untyped here
    """Notes when the first token is there; never stops."""

    def __init__(self) -> None:
        self.at: float | None = None

    def __call__(self, input_ids: Tensor, scores: Tensor, **_: Any) -> Tensor:
        """Called after every token."""
        if self.at is None:
            _wait(input_ids)
            self.at = time.perf_counter()
        return torch.zeros(input_ids.shape[0], dtype=torch.bool, device=input_ids.device)


def _generate(model: Any, prompt: Tensor, new_tokens: int, cache: Mapping[str, Any]) -> tuple[float, float]:
    """Seconds to the first token, and of the tokens after it."""
    first = _FirstToken()
    _wait(prompt)
    start = time.perf_counter()
    model.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        max_new_tokens=new_tokens,
        min_new_tokens=new_tokens,
        do_sample=False,
        pad_token_id=0,
        stopping_criteria=StoppingCriteriaList([first]),
        **cache,
    )
    _wait(prompt)
    end = time.perf_counter()
    assert first.at is not None
    return first.at - start, end - first.at


def _switch_ms(model: Any) -> float:
    """Median milliseconds of putting a profile into the pools, over the profiles that the model has."""
    active, profiles = model.runtime.active, list(model.runtime.profiles)
    taken = []
    parameter = next(model.parameters())
    for number in range(SWITCHES):
        _wait(parameter)
        start = time.perf_counter()
        model.runtime.switch(profiles[number % len(profiles)])
        _wait(parameter)
        taken.append(1000 * (time.perf_counter() - start))
    model.runtime.switch(active)
    return median(taken)


def weight_bytes(model: nn.Module) -> int:
    """Bytes of a model's parameters and buffers, those that share memory counted once."""
    tensors = [*model.parameters(), *model.buffers()]
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}
    return sum(storages.values())


def _wait(tensor: Tensor) -> None:
    """Waits for the tensor's device."""
    if tensor.is_cuda:
        torch.cuda.synchronize(tensor.device)


def _print(
    options: argparse.Namespace, models: Mapping[str, Any], speeds: Mapping[str, Speed], switch_ms: float
) -> None:
    prompt, new = options.batch * options.prompt_tokens, options.batch * (options.new_tokens - 1)
    model = models[COMPILED]
    where = torch.cuda.get_device_name(model.device) if model.device.type == "cuda" else "CPU"
    conditions = (
        f"{where}, {torch.get_num_threads()} threads, {model.dtype}, torch {torch.__version__}; batch {options.batch}, "
        f"{options.prompt_tokens} prompt tokens, {options.new_tokens} new ones, medians of {options.rounds} rounds"
    )
    if options.json:
        found = {name: asdict(speed) for name, speed in speeds.items()}
        print_json({"conditions": conditions, "models": found, "switch_ms": switch_ms, "ratios": _ratios(speeds)})
        return
    rows: list[list[str]] = []

    def row(name: str, value: Callable[[Speed], float], shown: str, ratio: str | None = None) -> None:
        ratios = _ratios(speeds)
        extra = [f"{ratios[ratio]:.2f}" if ratio else ""] if ratios else []
        rows.append([name, *(format(value(speed), shown) for speed in speeds.values()), *extra])

    row("prefill, tokens/s", lambda speed: prompt / median(speed.prompt_s), ",.0f", "prefill")
    row("decode, tokens/s", lambda speed: new / median(speed.decode_s), ",.1f", "decode")
    row("first token, ms", lambda speed: 1000 * median(speed.prompt_s), ",.1f")
    row("weights, MB", lambda speed: speed.weight_bytes / 1e6, ",.2f", "weights")
    if any(speed.peak_bytes for speed in speeds.values()):
        row("GPU memory at most, MB", lambda speed: speed.peak_bytes / 1e6, ",.0f")
    print_table(["", *speeds, *(["ratio"] if len(speeds) == 2 else [])], rows)
    meaning = "ratio: compiled / original, the median over the rounds\n" if len(speeds) == 2 else ""
    print_text(f"{meaning}a profile is switched in {switch_ms:.2f} ms\n{conditions}")


def _ratios(speeds: Mapping[str, Speed]) -> dict[str, float]:
    """Compiled over original: tokens per second (medians over rounds, pairwise) and bytes; empty for one model."""
    if len(speeds) < 2:
        return {}
    original, compiled = speeds[ORIGINAL], speeds[COMPILED]
    return {
        "prefill": median(a / b for a, b in zip(original.prompt_s, compiled.prompt_s, strict=True)),
        "decode": median(a / b for a, b in zip(original.decode_s, compiled.decode_s, strict=True)),
        "weights": compiled.weight_bytes / original.weight_bytes,
    }
