"""Measures which kernel and which tiles are fastest on the GPU at hand and writes its entry of `kernels/tiles.json`.

    python benches/tune_tiles.py                     about 10 minutes; prints what it finds and writes the entry
    python benches/tune_tiles.py --dry-run           writes nothing

For each number of tokens, the tiles of the two linears are chosen one after the other, then the paths are compared as
whole layers, all at OLMoE-1B-7B's sizes and 3 bits, as replays of CUDA graphs. Exit code 2 without a GPU.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import astuple, dataclass, replace
from functools import partial
from itertools import product
from typing import Any

import torch
from environment import Environment
from harness import Failure, Timing, cache_bytes, time_rounds
from torch import Tensor
from workloads import SHAPES, copy_of, random_packed, random_tensor, rotations, route, widths

from moe_compiler.kernels import cuda
from moe_compiler.kernels.packed import PackedTensors
from moe_compiler.kernels.tiles import DEFAULT, TABLE, Schedule, Tile, check_table, choose_schedule

TOKENS = (1, 16, 64, 128, 512, 2048, 8192)
DECODE = tuple(Tile(*sizes) for sizes in product((32, 64, 128), (8, 16), (1, 2), (2, 3)))
PREFILL = tuple(Tile(*sizes) for sizes in product((64, 128), (32, 64, 128), (4, 8), (2, 3)))
SHAPE = SHAPES["OLMoE-1B-7B"]
GROUP_SIZE = 128
Call = Callable[[], Any]
Layer = tuple[PackedTensors, ...]
"""`gate_up` and `down`."""


def fastest(calls: Mapping[Any, Sequence[Call]], device: torch.device, seconds: float) -> tuple[Any, float] | None:
    """The candidate with the shortest median time, and the time in milliseconds; `None` if all failed."""
    times = time_rounds(calls, device, seconds)
    good = {key: one.median for key, one in times.items() if isinstance(one, Timing)}
    for key, one in times.items():
        if isinstance(one, Failure):
            print(f"    {key}: {one.reason}")
    return min(good.items(), key=lambda item: item[1]) if good else None


def families(rows_per_expert: float) -> list[tuple[str, int, list[Tile]]]:
    """Path, rows of a block, and tiles that are worth trying for so many rows per expert."""
    ranges = (("decode", DECODE, 0, 64), ("prefill", PREFILL, 8, float("inf")))
    return [
        (path, block_m, [tile for tile in tiles if tile.block_m == block_m])
        for path, tiles, least, most in ranges
        if least <= rows_per_expert <= most
        for block_m in sorted({tile.block_m for tile in tiles})
    ]


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

    def gate_up(self, schedule: Schedule, block_m: int, tile: Tile) -> list[Call]:
        """The first linear alone."""
        kernels = cuda.kernels_of(schedule)
        return [
            partial(kernels.gate_up, self.x, ids, blocks, gate_up, None, "silu", GROUP_SIZE, tile)
            for ids, blocks in self._blocks(schedule, block_m)
            for gate_up, _ in self.layers
        ]

    def down(self, schedule: Schedule, block_m: int, tile: Tile) -> list[Call]:
        """The second linear alone, with the sum over a token's experts."""
        kernels = cuda.kernels_of(schedule)
        return [
            partial(
                kernels.down, self.hidden, ids, blocks, self.weights, down, None, GROUP_SIZE, tile, deterministic=True
            )
            for ids, blocks in self._blocks(schedule, block_m)
            for _, down in self.layers
        ]

    def _blocks(self, schedule: Schedule, block_m: int) -> list[tuple[Tensor, cuda.Blocks | None]]:
        rows = [ids.reshape(-1) for ids in self.turns]
        return [(ids, None if schedule.direct else cuda.route(ids, SHAPE.num_experts, block_m)) for ids in rows]


def tune(tokens: int, layers: Sequence[Layer], device: torch.device, seconds: float) -> tuple[Schedule, float]:
    """The fastest schedule for `tokens` tokens, and its time in milliseconds."""
    batch = Batch.random(layers, tokens, device)
    rows = tokens * SHAPE.top_k
    per_expert = rows / SHAPE.num_experts
    base = choose_schedule(DEFAULT, rows, SHAPE.num_experts)
    calls: dict[Schedule, list[Call]] = {}
    for path, block_m, tiles in families(per_expert):
        for direct in (True, False) if path == "decode" and rows <= 64 and block_m == 8 else (False,):
            start = replace(base, path=path, direct=direct)
            gate_up, down = (
                fastest({tile: linear(start, block_m, tile) for tile in tiles}, device, seconds)
                for linear in (batch.gate_up, batch.down)
            )
            if gate_up and down:
                for atomic in (False, True):
                    schedule = replace(start, atomic=atomic, gate_up=gate_up[0], down=down[0])
                    calls[schedule] = batch.whole(schedule)
    if per_expert >= 64:
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
    sizes = ((2 * SHAPE.intermediate_size, SHAPE.hidden_size), (SHAPE.hidden_size, SHAPE.intermediate_size))
    bits = widths(3, SHAPE.num_experts)
    linears = [random_packed(bits, *size, device, pool_fraction=0.01) for size in sizes]
    copies = -(-4 * cache_bytes(device) // sum(linear.size_bytes for linear in linears))
    layers = [tuple(copy_of(linear).tensors for linear in linears) for _ in range(copies)]
    schedules = {tokens: tune(tokens, layers, device, options.seconds)[0] for tokens in TOKENS}
    about = Environment.of(device)
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
