"""What serving pays for profiles and the drift guard: the routing histogram of each layer and the lock of each pass.

The operators `record_routing_`, and `begin_forward` with `end_forward_`, against the experts of one layer at
OLMoE-1B-7B's sizes with random weights, half 2-bit and half 4-bit, side by side. The histogram is updated in every
layer, the lock is taken once per forward pass of a model, which has 16 layers there.

Run: python benches/bench_guard.py
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from environment import Environment, pick_device
from harness import CsvWriter, Timing, markdown_table, time_rounds
from workloads import SHAPES, LayerShape, random_packed, rotations, route, widths

from moe_compiler.kernels import ops
from moe_compiler.kernels.forward_lock import ForwardLock
from moe_compiler.runtime.guard import WINDOW_TOKENS

GROUP_SIZE = 128


@dataclass(frozen=True)
class GuardRow:
    """One number of tokens; times are medians over rounds, shares medians of each round's ratio.

    Attributes:
        shape: the layer.
        tokens: tokens in the forward pass.
        layer_us: the experts of one layer.
        histogram_us: updating its histogram.
        lock_us: beginning and ending a forward pass.
        histogram_share: `histogram_us` over `layer_us`.
        lock_share: `lock_us` over `layer_us`; a model pays it once, not in every layer.
        rounds: how many times each was taken.
    """

    shape: str
    tokens: int
    layer_us: float
    histogram_us: float
    lock_us: float
    histogram_share: float
    lock_share: float
    rounds: int


def measure(shape: LayerShape, tokens: int, device: torch.device, seconds: float) -> GuardRow:
    """Times the operators side by side.

    Raises:
        RuntimeError: one of them failed: says why.
    """
    bits = widths(3, shape.num_experts)
    linears = [
        random_packed(bits, 2 * shape.intermediate_size, shape.hidden_size, device, pool_fraction=0.01).tensors,
        random_packed(bits, shape.hidden_size, shape.intermediate_size, device, pool_fraction=0.01).tensors,
    ]
    dtype = torch.bfloat16
    x = torch.randn(tokens, shape.hidden_size, device=device).to(dtype)
    gates = torch.rand(tokens, shape.top_k, device=device).to(dtype)
    routings = [ids.to(device) for ids in rotations(route(shape, tokens, "uniform"), shape.num_experts)]
    histogram = torch.zeros(shape.num_experts + 1, device=device)
    marker = torch.zeros(1, dtype=torch.uint8, device=device)
    lock = ForwardLock.new()
    decay = 1 - 1 / WINDOW_TOKENS
    gate_up, down = (list(linear) for linear in linears)

    def layer(ids: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = ops.packed_experts(x, ids, gates, gate_up, None, down, None, "silu", GROUP_SIZE)
        return out

    def forward_pass(ids: torch.Tensor) -> None:
        ops.begin_forward(ids, lock.number)
        ops.end_forward_(marker, x, lock.number)

    times = time_rounds(
        {
            "layer": [lambda ids=ids: layer(ids) for ids in routings],
            "histogram": [lambda ids=ids: ops.record_routing_(histogram, ids, decay) for ids in routings],
            "lock": [lambda ids=ids: forward_pass(ids) for ids in routings],
        },
        device,
        seconds,
    )
    timings = {}
    for name, timing in times.items():
        if not isinstance(timing, Timing):
            raise RuntimeError(f"{name} of {shape.name} at {tokens} tokens could not be measured: {timing.reason}")
        timings[name] = timing
    experts, histogram_time, lock_time = timings["layer"], timings["histogram"], timings["lock"]
    return GuardRow(
        shape=shape.name,
        tokens=tokens,
        layer_us=1000 * experts.median,
        histogram_us=1000 * histogram_time.median,
        lock_us=1000 * lock_time.median,
        histogram_share=1 / histogram_time.speedup_over(experts),
        lock_share=1 / lock_time.speedup_over(experts),
        rounds=len(experts.samples),
    )


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", choices=list(SHAPES), default="OLMoE-1B-7B")
    parser.add_argument("--tokens", type=int, nargs="+", default=[1, 4, 16, 128])
    parser.add_argument("--seconds", type=float, default=5.0, help="for each number of tokens")
    parser.add_argument("--device", help="cpu or cuda; the default is the GPU where there is one")
    parser.add_argument("--csv", help="file to write")
    parser.add_argument("--quick", action="store_true", help="tiny sizes, to see that everything runs")
    options = parser.parse_args(arguments)
    if options.quick:
        options.shape, options.tokens, options.seconds = "tiny", [1, 4], 0.05
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    """Measures and prints; returns 0."""
    options = parse(arguments)
    device = pick_device(options.device)
    environment = Environment.of(device)
    print(environment)
    rows = []
    with CsvWriter(options.csv, GuardRow, environment) as writer:
        for tokens in options.tokens:
            rows.append(measure(SHAPES[options.shape], tokens, device, options.seconds))
            writer.write(rows[-1])
    header = ("tokens", "layer us", "histogram us", "share", "lock us", "share of one layer")
    table = [
        (
            f"{row.tokens:,}",
            f"{row.layer_us:,.0f}",
            f"{row.histogram_us:.1f}",
            f"{row.histogram_share:.2%}",
            f"{row.lock_us:.1f}",
            f"{row.lock_share:.2%}",
        )
        for row in rows
    ]
    print(f"\n{options.shape}, one layer's experts; median of {rows[0].rounds} rounds or more\n")
    print(markdown_table(header, table))
    return 0


if __name__ == "__main__":
    sys.exit(main())
