"""The tile of a Triton launch."""

from __future__ import annotations

from dataclasses import dataclass


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
