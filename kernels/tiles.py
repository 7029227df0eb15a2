"""Which kernel and which tiles run a batch of rows on a GPU: a table per device, read from `tiles.json`.

The table is data: `benches/tune_tiles.py` measures the candidates on the device it runs on and writes the entry of that
device. A device without an entry uses `"default"`, whose tiles were chosen by the instructions that they compile to and
have not been timed.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal

TABLE = Path(__file__).with_name("tiles.json")
DEFAULT = "default"
PATHS = ("decode", "prefill", "dense")


@dataclass(frozen=True)
class Tile:
    """Sizes of one program's tile and how it is run.

    Attributes:
        block_n: output features.
        block_m: rows (tokens routed to one expert), a power of two.
        num_warps: warps of the program.
        num_stages: depth of the software pipeline.
    """

    block_n: int
    block_m: int
    num_warps: int
    num_stages: int


@dataclass(frozen=True)
class Schedule:
    """How a batch of rows is computed.

    Attributes:
        path: `"decode"`: kernels bound by memory; `"prefill"`: kernels with large token tiles; `"dense"`: dequantize
            the weights to a workspace and use the library's grouped matrix product.
        direct: whether every row is a block of its own, without sorting rows by expert. `"decode"` only.
        atomic: whether the rows of a token are added up as they come, in any order.
        gate_up: tile of the first linear. Without a meaning in `"dense"`.
        down: tile of the second linear, or of a linear alone.
    """

    path: Literal["decode", "prefill", "dense"]
    direct: bool
    atomic: bool
    gate_up: Tile
    down: Tile


def choose_schedule(device: str, rows: int, num_experts: int, exclude: str | None = None) -> Schedule:
    """The schedule for `rows` rows over `num_experts` experts on a device.

    Args:
        device: the name that `torch.cuda.get_device_name` gives.
        rows: `R`, pairs of token and expert.
        num_experts: `E`.
        exclude: a path that must not be taken; the one for fewer rows is.
    """
    entry = _table().get(device) or _table()[DEFAULT]
    per_expert = rows / num_experts
    bucket = max(
        (one for one in entry["buckets"] if one["rows_per_expert"] <= per_expert and one["path"] != exclude),
        key=lambda one: one["rows_per_expert"],
    )
    direct = bucket["path"] == "decode" and rows <= entry["direct_rows"]
    return Schedule(
        path=bucket["path"],
        direct=direct,
        atomic=bucket["atomic"],
        gate_up=Tile(*bucket["gate_up"]),
        down=Tile(*bucket["down"]),
    )


def check_table(table: Mapping[str, Any]) -> None:
    """Checks a table of tiles.

    Raises:
        ValueError: an entry is not one that `choose_schedule` can use; names the device and the rule.
    """
    if DEFAULT not in table:
        raise ValueError(f"the table of tiles must have the entry {DEFAULT!r}, but has {', '.join(table) or 'none'}")
    for device, entry in table.items():
        starts = [bucket["rows_per_expert"] for bucket in entry["buckets"]]
        if starts != sorted(set(starts)) or starts[0] != 0:
            raise ValueError(f"the buckets of {device!r} must start at 0 rows per expert and ascend, but are {starts}")
        for bucket in entry["buckets"]:
            if bucket["path"] not in PATHS:
                raise ValueError(
                    f"the path of a bucket of {device!r} must be one of {', '.join(PATHS)}, but is {bucket['path']!r}"
                )
            for name in ("gate_up", "down"):
                tile = Tile(*bucket[name])
                if any(size < 1 or size & (size - 1) for size in (tile.block_n, tile.block_m, tile.num_warps)):
                    raise ValueError(
                        f"`{name}` of {device!r} must have powers of two for block_n, block_m and num_warps, "
                        f"but is {tile}"
                    )
        if any(bucket["gate_up"][1] != bucket["down"][1] for bucket in entry["buckets"]):
            raise ValueError(
                f"`gate_up` and `down` of {device!r} must have the same block_m: they share the rows' order"
            )


@cache
def _table() -> Mapping[str, Any]:
    table: dict[str, Any] = json.loads(TABLE.read_text())
    check_table(table)
    return table
