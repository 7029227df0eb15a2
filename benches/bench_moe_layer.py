"""One MoE layer and one expert linear over packed weights, against the same in bfloat16.

Mode `layer` is an MoE layer without its router at a real model's sizes: `torch.ops.moe_compiler.packed_experts`
against transformers' experts interface, `F.linear` per expert and, on the CPU, ATen's 4-bit matrix product. Mode
`operator` is one expert linear at a few tokens per expert. On a GPU everything runs in CUDA graphs. Every call reads
other weights than the one before, more in all than the caches hold.

Run: python benches/bench_moe_layer.py --shapes OLMoE-1B-7B --tokens 1 16 128
"""

from __future__ import annotations

import argparse
import sys
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from itertools import chain, groupby, product

import baselines
import torch
from candidates import LINEAR, Candidate, layer_candidates, operator_candidates
from environment import Environment, pick_device
from harness import (
    CsvWriter,
    Failure,
    Timing,
    cache_bytes,
    copy_bandwidth,
    free_memory,
    markdown_table,
    time_rounds,
)
from int4 import available
from targets import PACKED, PACKED_WITHOUT_POOL, LayerRow, summary
from workloads import (
    ROUTINGS,
    SHAPES,
    LayerShape,
    copy_of,
    packed_bytes,
    random_packed,
    random_tensor,
    route,
    widths,
)

BEST = "best bf16"
MODES = ("layer", "operator")
GROUP_SIZE = 128
OPERATOR_EXPERTS = 8
CACHES_OVER = 4  # a cycle reads this many times what the last-level cache holds
MAX_COPIES = 64


@dataclass(frozen=True)
class Setting:
    """Where a row stands: the fields of `LayerRow` that do not depend on the candidate."""

    mode: str
    shape: str
    tokens: int
    routing: str
    experts_hit: int
    bits: int
    pool: float
    dtype: str


@dataclass(frozen=True)
class Bench:
    """How to measure.

    Attributes:
        device: where.
        dtype: of the packed operators' activations; baselines are bfloat16.
        seconds: for the rounds of one setting.
        compiled: whether baselines also run compiled by `torch.compile`.
        patterns: of the names of the candidates to measure.
        baseline: the candidate that speedups are over; `BEST` is the fastest of transformers' own.
        roof: the measured copy bandwidth, bytes per second.
        cache: bytes of the last-level cache.
    """

    device: torch.device
    dtype: torch.dtype
    seconds: float
    compiled: bool
    patterns: tuple[str, ...]
    baseline: str
    roof: float
    cache: int

    @property
    def dtype_name(self) -> str:
        """Name of `dtype`."""
        return str(self.dtype).removeprefix("torch.")

    def copies(self, size_bytes: int) -> int:
        """How many copies of weights of this size a cycle needs."""
        return min(MAX_COPIES, max(1, -(-CACHES_OVER * self.cache // size_bytes)))

    def measure(self, setting: Setting, candidates: Mapping[str, Candidate]) -> list[LayerRow]:
        """Times the candidates side by side.

        Raises:
            ValueError: none of them matches the patterns.
        """
        chosen = [name for name in candidates if any(fnmatch(name, pattern) for pattern in self.patterns)]
        if not chosen:
            raise ValueError(f"`candidates` must match some of {', '.join(candidates)}, but is {self.patterns}")
        candidates = {name: candidates[name] for name in chosen}
        torch._dynamo.reset()  # every setting compiles its own, none is lost to the limit of recompilations
        results = time_rounds({name: one.calls for name, one in candidates.items()}, self.device, self.seconds)
        times = {name: result for name, result in results.items() if isinstance(result, Timing)}
        over = self.baseline
        if over == BEST:
            layers = {name: timing.median for name, timing in times.items() if "_mm" in name} or {LINEAR: 0.0}
            over = min(layers, key=lambda name: layers[name])
        return [
            self._row(setting, name, candidates[name].bytes_read, results[name], times, over) for name in candidates
        ]

    def _row(
        self,
        setting: Setting,
        name: str,
        bytes_read: int,
        result: Timing | Failure,
        times: Mapping[str, Timing],
        over: str,
    ) -> LayerRow:
        timing = result if isinstance(result, Timing) else None
        rate = bytes_read / (timing.median / 1000) if timing else None
        bare = times.get(PACKED_WITHOUT_POOL) if name == PACKED else None
        return LayerRow(
            **vars(setting),
            candidate=name,
            status=result.reason if isinstance(result, Failure) else "ok",
            rounds=len(timing.samples) if timing else 0,
            best_ms=timing.best if timing else None,
            median_ms=timing.median if timing else None,
            spread=timing.spread if timing else None,
            warmup_s=timing.warmup_s if timing else None,
            baseline=over,
            speedup=timing.speedup_over(times[over]) if timing and over in times else None,
            pool_cost=1 / timing.speedup_over(bare) - 1 if timing and bare else None,
            bytes_read=bytes_read,
            gb_per_s=rate / 1e9 if rate else None,
            roof_share=rate / self.roof if rate else None,
            roof_gb_per_s=self.roof / 1e9,
        )


def layer_rows(bench: Bench, shape: LayerShape, options: argparse.Namespace) -> Iterator[LayerRow]:
    """Mode `layer` for one model: every width, pool, token count and routing."""
    device = bench.device
    layer = baselines.Layer(shape, shared_copies=4, device=device)
    E, H = shape.all_experts, shape.hidden_size
    for bits, pool in product(options.bits, options.pool):
        gate_up = random_packed(
            widths(bits, E), 2 * shape.intermediate_size, H, device, group_size=GROUP_SIZE, pool_fraction=pool
        )
        down = random_packed(
            widths(bits, E), H, shape.intermediate_size, device, group_size=GROUP_SIZE, pool_fraction=pool
        )
        copies = bench.copies(packed_bytes(gate_up, range(E)) + packed_bytes(down, range(E)))
        linears = [(gate_up, down), *((copy_of(gate_up), copy_of(down)) for _ in range(copies - 1))]
        for tokens, routing in product(options.tokens, options.routing):
            ids = route(shape, tokens, routing)
            candidates = layer_candidates(shape, layer, linears, ids, bench.dtype, bench.compiled)
            hit = ids.unique().numel() + shape.shared_experts
            setting = Setting("layer", shape.name, tokens, routing, hit, bits, pool, bench.dtype_name)
            yield from bench.measure(setting, candidates)
            del candidates
        del gate_up, down, linears
        free_memory(device)


def operator_rows(bench: Bench, out_features: int, in_features: int, options: argparse.Namespace) -> Iterator[LayerRow]:
    """Mode `operator` for one expert linear: a few tokens for each of 8 experts."""
    device, experts = bench.device, OPERATOR_EXPERTS
    size = (experts, out_features, in_features)
    dense_bytes = 2 * experts * out_features * in_features
    dense = [random_tensor(size, torch.bfloat16, device, in_features**-0.5) for _ in range(bench.copies(dense_bytes))]
    int4 = [available(*size, device) for _ in range(bench.copies(dense_bytes // 4))]
    for bits, pool in product(options.bits, options.pool):
        first = random_packed(widths(bits, experts), *size[1:], device, group_size=GROUP_SIZE, pool_fraction=pool)
        copies = bench.copies(packed_bytes(first, range(experts)))
        packed = [first, *(copy_of(first) for _ in range(copies - 1))]
        for tokens in options.tokens_per_expert:
            candidates = operator_candidates(packed, dense, int4, tokens, bench.dtype)
            shape = f"{out_features}x{in_features}"
            setting = Setting("operator", shape, tokens, "even", experts, bits, pool, bench.dtype_name)
            yield from bench.measure(setting, candidates)
        del first, packed
        free_memory(device)


def print_rows(rows: Sequence[LayerRow]) -> None:
    """Prints the rows of one setting as a table."""

    def show(value: float | None, form: str) -> str:
        return "-" if value is None else format(value, form)

    one = rows[0]
    unit = "tokens per expert" if one.mode == "operator" else "tokens"
    print(
        f"\n{one.mode} {one.shape}, {one.tokens} {unit}, {one.routing} routing, {one.experts_hit} experts hit, "
        f"{one.bits} bits, pool {one.pool:.1%}, {one.dtype}\n"
    )
    header = ("candidate", "best ms", "median ms", "spread", f"over {one.baseline}", "GB/s", "of copy", "warm-up s")
    table = [
        (
            row.candidate if row.status == "ok" else f"{row.candidate}: {row.status}",
            show(row.best_ms, ".4f"),
            show(row.median_ms, ".4f"),
            show(row.spread, ".1%"),
            show(row.speedup, ".2f"),
            show(row.gb_per_s, ".1f"),
            show(row.roof_share, ".1%"),
            show(row.warmup_s, ".1f"),
        )
        for row in rows
    ]
    print(markdown_table(header, table), flush=True)
    for row in rows:
        if row.pool_cost is not None:
            print(f"\nthe pool costs {row.pool_cost:+.1%}")


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--modes", nargs="+", choices=MODES, default=MODES)
    parser.add_argument("--shapes", nargs="+", choices=[*SHAPES, "all"], default=["OLMoE-1B-7B"])
    parser.add_argument("--tokens", nargs="+", type=int, default=[1, 4, 16, 128, 2048])
    parser.add_argument("--tokens-per-expert", nargs="+", type=int, default=[1, 2, 4])
    parser.add_argument("--routing", nargs="+", choices=ROUTINGS, default=["uniform"])
    parser.add_argument("--bits", nargs="+", type=int, choices=(2, 3, 4, 6, 8), default=[3], help="3: half 2, half 4")
    parser.add_argument("--pool", nargs="+", type=float, default=[0.01], help="shares of the input channels")
    parser.add_argument("--dtype", choices=("bfloat16", "float16", "float32"), default="bfloat16")
    parser.add_argument("--candidates", nargs="+", default=["*"], metavar="PATTERN",
        help=f"only those whose names match, such as '{PACKED}*'")  # fmt: skip
    parser.add_argument("--baseline", help=f"a candidate, or '{BEST}'; the default is that on a GPU, else '{LINEAR}'")
    parser.add_argument("--seconds", type=float, default=3.0, help="for the rounds of one setting")
    parser.add_argument("--no-compile", action="store_true", help="leave compiled baselines out")
    parser.add_argument("--device", help="cpu or cuda; the default is the GPU where there is one")
    parser.add_argument("--csv", help="file to write")
    parser.add_argument("--quick", action="store_true", help="tiny sizes, to see that everything runs")
    options = parser.parse_args(arguments)
    if options.quick:
        options.shapes, options.tokens, options.tokens_per_expert, options.seconds = ["tiny"], [1, 16], [1], 0.05
    if "all" in options.shapes:
        options.shapes = [name for name in SHAPES if name != "tiny"]
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    """Measures and prints; returns 1 if the packed operator failed anywhere, else 0."""
    options = parse(arguments)
    warnings.filterwarnings("ignore", message="Dynamo detected a call to a `functools.lru_cache`")  # in transformers
    device = pick_device(options.device)
    environment = Environment.of(device)
    print(environment)
    roof = copy_bandwidth(device, 1 << 24 if options.quick else None, min(1.0, options.seconds))
    print(f"{'copy':13}{roof / 1e9:.1f} GB/s read and written")
    bench = Bench(
        device=device,
        dtype=getattr(torch, options.dtype),
        seconds=options.seconds,
        compiled=not options.no_compile,
        patterns=tuple(options.candidates),
        baseline=options.baseline or (BEST if device.type == "cuda" else LINEAR),
        roof=roof,
        cache=1 << 20 if options.quick else cache_bytes(device),
    )
    shapes = [SHAPES[name] for name in options.shapes]
    sizes = dict.fromkeys(
        size
        for shape in shapes
        for size in (
            (2 * shape.intermediate_size, shape.hidden_size),
            (shape.hidden_size, shape.intermediate_size),
        )
    )
    sources: list[Iterator[LayerRow]] = []
    if "layer" in options.modes:
        sources += [layer_rows(bench, shape, options) for shape in shapes]
    if "operator" in options.modes:
        sources += [operator_rows(bench, *size, options) for size in sizes]
    rows: list[LayerRow] = []
    with CsvWriter(options.csv, LayerRow, environment) as writer:
        for _, group in groupby(chain.from_iterable(sources), key=LayerRow.setting):
            found = list(group)
            print_rows(found)
            for row in found:
                writer.write(row)
            rows += found
    print("\n" + summary(rows, environment))
    return 1 if any(row.status != "ok" for row in rows if row.candidate == PACKED) else 0


if __name__ == "__main__":
    sys.exit(main())
