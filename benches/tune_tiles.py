"""Measures which kernel and which tiles are fastest on the GPU at hand and writes its entry of `kernels/tiles.json`.

    python benches/tune_tiles.py                     prints what it finds and writes the entry
    python benches/tune_tiles.py --dry-run           writes nothing

For each number of tokens, the tiles of the two linears are chosen one after the other, then the paths are compared as
whole layers, all at OLMoE-1B-7B's sizes and 3 bits, as replays of CUDA graphs. Before, all candidates are compiled at
once, by as many processes as there are cores, into Triton's cache. Exit code 2 without a GPU.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import astuple, dataclass, replace
from functools import partial
from itertools import product
from multiprocessing import get_context
from typing import Any
from unittest.mock import patch

import torch
import triton
from environment import Environment
from harness import Failure, Timing, cache_bytes, time_rounds
from torch import Tensor
from triton.errors import TritonError
from workloads import SHAPES, random_packed, random_tensor, rotations, route, widths

from moe_compiler.kernels import cuda, triton_experts
from moe_compiler.kernels.packed import PackedTensors
from moe_compiler.kernels.tiles import DEFAULT, TABLE, Schedule, Tile, check_table, choose_schedule
from moe_compiler.kernels.triton_experts import Path

TOKENS = (1, 16, 64, 128, 512, 2048, 8192)
DECODE = tuple(Tile(*sizes) for sizes in product((16, 32, 64, 128), (8, 16), (1, 2), (2, 3)))
PREFILL = tuple(Tile(*sizes) for sizes in product((64, 128), (32, 64, 128), (4, 8), (2, 3)))
SHAPE = SHAPES["OLMoE-1B-7B"]
GROUP_SIZE = 128
META = torch.device("meta")
Call = Callable[[], Any]
Layer = tuple[PackedTensors, ...]
"""`gate_up` and `down`."""


def fastest(calls: Mapping[Any, Sequence[Call]], device: torch.device, seconds: float) -> tuple[Any, float] | None:
    """The candidate with the shortest median time, and the time in milliseconds; `None` if all failed."""
    fitting = {}
    for key, cycle in calls.items():
        try:
            cycle[0]()
        except TritonError as error:  # more shared memory than the device has, say
            print(f"    {key}: {error}")
        else:
            fitting[key] = cycle
    times = time_rounds(fitting, device, seconds)
    good = {key: one.median for key, one in times.items() if isinstance(one, Timing)}
    for key, one in times.items():
        if isinstance(one, Failure):
            print(f"    {key}: {one.reason}")
    return min(good.items(), key=lambda item: item[1]) if good else None


@dataclass(frozen=True)
class Family:
    """Tiles of one path with blocks of the same size.

    Attributes:
        path: of the kernels.
        direct: whether every row is a block of its own.
        block_m: rows of a block.
        tiles: those worth trying.
    """

    path: Path
    direct: bool
    block_m: int
    tiles: tuple[Tile, ...]


def families(tokens: int) -> Iterator[Family]:
    """What is worth trying for so many tokens."""
    rows = tokens * SHAPE.top_k
    ranges: tuple[tuple[Path, tuple[Tile, ...], float, float], ...] = (
        ("decode", DECODE, 0, 64),
        ("prefill", PREFILL, 8, float("inf")),
    )
    for path, tiles, least, most in ranges:
        if least <= rows / SHAPE.num_experts <= most:
            for block_m in sorted({tile.block_m for tile in tiles}):
                same = tuple(tile for tile in tiles if tile.block_m == block_m)
                if path == "decode" and rows <= 64 and block_m == 8:
                    yield Family(path, True, block_m, same)
                yield Family(path, False, block_m, same)


@dataclass(frozen=True)
class Batch:
    """One batch, and what it passes: calls go through all copies of the layer and turns of the routing, so that weights
    come from memory.

    Attributes:
        layers: packed `gate_up` and `down`, once for each copy.
        x: `(T, H)`.
        hidden: `(R, I)`, random: the input of `down` on its own.
        turns: `(T, k)` each, the routing over other experts every time.
        weights: `(T, k)`.
    """

    layers: Sequence[Layer]
    x: Tensor
    hidden: Tensor
    turns: Sequence[Tensor]
    weights: Tensor

    @classmethod
    def random(cls, layers: Sequence[Layer], tokens: int, device: torch.device) -> Batch:
        """`tokens` tokens, routed uniformly."""
        x = random_tensor((tokens, SHAPE.hidden_size), torch.float32, device).bfloat16()
        ids = route(SHAPE, tokens, "uniform")
        hidden = random_tensor((ids.numel(), SHAPE.intermediate_size), torch.float32, device).bfloat16()
        turns = [turn.to(device) for turn in rotations(ids, SHAPE.num_experts)]
        return cls(layers, x, hidden, turns, torch.rand(ids.shape, device=device))

    def whole(self, schedule: Schedule) -> list[Call]:
        """The whole layer by a schedule."""
        return [
            partial(
                cuda.run_experts, schedule, self.x, ids, self.weights, gate_up, None, down, None, "silu", GROUP_SIZE
            )
            for ids, (gate_up, down) in product(self.turns, self.layers)
        ]

    def gate_up(self, family: Family, tile: Tile) -> list[Call]:
        """The first linear alone."""
        return [
            partial(triton_experts.gate_up, family.path, self.x, ids, blocks, gate_up, None, "silu", GROUP_SIZE, tile)
            for ids, blocks in self._blocks(family)
            for gate_up, _ in self.layers
        ]

    def down(self, family: Family, tile: Tile) -> list[Call]:
        """The second linear alone, with the sum over a token's experts."""
        return [
            partial(
                triton_experts.down,
                family.path,
                self.hidden,
                ids,
                blocks,
                self.weights,
                down,
                None,
                GROUP_SIZE,
                tile,
                deterministic=True,
            )
            for ids, blocks in self._blocks(family)
            for _, down in self.layers
        ]

    def _blocks(self, family: Family) -> list[tuple[Tensor, cuda.Blocks | None]]:
        rows = [ids.reshape(-1) for ids in self.turns]
        return [(ids, None if family.direct else cuda.route(ids, SHAPE.num_experts, family.block_m)) for ids in rows]


def random_layer(device: torch.device) -> Layer:
    """Random packed experts of the layer's sizes."""
    sizes = ((2 * SHAPE.intermediate_size, SHAPE.hidden_size), (SHAPE.hidden_size, SHAPE.intermediate_size))
    bits = widths(3, SHAPE.num_experts)
    return tuple(random_packed(bits, *size, device, pool_fraction=0.01).tensors for size in sizes)


def compile_tile(tokens: int, family: Family, tile: Tile) -> None:
    """Compiles what a tile launches into Triton's cache, on tensors without memory, and launches nothing.

    Raises:
        TritonError: it does not compile.
    """
    run = triton.JITFunction.run

    def compile_only(self: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> Any:
        return run(self, *args, grid=grid, warmup=True, **options)

    batch = Batch.random([random_layer(META)], tokens, META)
    with patch.object(triton.JITFunction, "run", compile_only):
        batch.gate_up(family, tile)[0]()
        batch.down(family, tile)[0]()


def compile_all(jobs: int) -> None:
    """Compiles every candidate, in several processes; failures are left to who launches them."""
    distinct = {(family, tile): tokens for tokens in TOKENS for family in families(tokens) for tile in family.tiles}
    with ProcessPoolExecutor(jobs, mp_context=get_context("spawn")) as pool:
        pending = [pool.submit(compile_tile, tokens, *one) for one, tokens in distinct.items()]
        errors = [error for one in pending if (error := one.exception())]
    print(f"{len(pending)} tiles compiled, {len(errors)} of them in vain", flush=True)
    for reason in sorted({f"{type(error).__name__}: {error}".splitlines()[0] for error in errors}):
        print(f"    {reason}")


def tune(tokens: int, layers: Sequence[Layer], device: torch.device, seconds: float) -> tuple[Schedule, float]:
    """The fastest schedule for `tokens` tokens, and its time in milliseconds."""
    batch = Batch.random(layers, tokens, device)
    rows = tokens * SHAPE.top_k
    base = choose_schedule(DEFAULT, rows, SHAPE.num_experts)
    calls: dict[Schedule, list[Call]] = {}
    for family in families(tokens):
        gate_up, down = (
            fastest({tile: linear(family, tile) for tile in family.tiles}, device, seconds)
            for linear in (batch.gate_up, batch.down)
        )
        if gate_up and down:
            for atomic in (False, True):
                schedule = Schedule(family.path, family.direct, atomic, gate_up[0], down[0])
                calls[schedule] = batch.whole(schedule)
    if rows >= 64 * SHAPE.num_experts:
        schedule = replace(base, path="dense", direct=False, atomic=False)
        calls[schedule] = batch.whole(schedule)
    found = fastest(calls, device, seconds)
    if found is None:
        raise SystemExit(f"no candidate ran for {tokens} tokens")
    print(f"{tokens} tokens: {found[1]:.4f} ms with {found[0]}", flush=True)
    return found


def entry_of(schedules: Mapping[int, Schedule], source: str) -> dict[str, Any]:
    """The entry of the table of tiles, from the schedule of each number of tokens."""
    direct = [tokens for tokens, schedule in schedules.items() if schedule.direct]
    buckets = [
        {
            "rows_per_expert": tokens * SHAPE.top_k / SHAPE.num_experts if number else 0,
            "path": schedule.path,
            "atomic": schedule.atomic,
            "gate_up": list(astuple(schedule.gate_up)),
            "down": list(astuple(schedule.down)),
        }
        for number, (tokens, schedule) in enumerate(schedules.items())
    ]
    return {"source": source, "direct_rows": max(direct, default=0) * SHAPE.top_k, "buckets": buckets}


def main(argv: Sequence[str] | None = None) -> int:
    """Tunes every number of tokens and writes the entry."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=0.5, help="for each set of candidates, compiling aside")
    parser.add_argument("--dry-run", action="store_true", help="print the entry only")
    options = parser.parse_args(argv)
    if not torch.cuda.is_available():
        print("tune_tiles.py: PyTorch sees no GPU here; nothing was measured")
        return 2
    device = torch.device("cuda", torch.cuda.current_device())
    about = Environment.of(device)
    compile_all(about.cores)
    first = random_layer(device)
    copies = -(-4 * cache_bytes(device) // sum(tensor.nbytes for linear in first for tensor in linear))
    layers = [tuple(PackedTensors(*(t.clone() for t in linear)) for linear in first) for _ in range(copies)]
    schedules = {tokens: tune(tokens, layers, device, options.seconds)[0] for tokens in TOKENS}
    source = f"measured by benches/tune_tiles.py, torch {about.torch}, triton {about.triton}, {about.date}"
    entry = entry_of(schedules, source)
    table = json.loads(TABLE.read_text()) | {torch.cuda.get_device_name(device): entry}
    check_table(table)
    print(json.dumps(entry, indent=2))
    if not options.dry_run:
        TABLE.write_text(json.dumps(table, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
