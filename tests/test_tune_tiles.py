"""The tuner of tiles, with a clock that knows the answer."""

import sys
from pathlib import Path
from typing import Any

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "benches"))

import tune_tiles
from harness import Failure, Timing
from workloads import SHAPES, random_packed, widths

from moe_compiler.kernels.tiles import DEFAULT, TABLE, Tile, check_table, choose_schedule

CPU = torch.device("cpu")
BEST = Tile(32, 8, 1, 2)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs every candidate once; `BEST` and the atomic sum are fast, wide tiles fail."""

    def time_rounds(candidates: dict[Any, Any], device: torch.device, seconds: float) -> dict[Any, Any]:
        times: dict[Any, Any] = {}
        for key, calls in candidates.items():
            tile = key if isinstance(key, Tile) else key.gate_up
            if tile.block_n > 64:
                times[key] = Failure("out of shared memory")
                continue
            calls[0]()
            slow = (tile != BEST) + (not isinstance(key, Tile) and not key.atomic) + 1.0
            times[key] = Timing((slow,), 0.0)
        return times

    monkeypatch.setattr(tune_tiles, "time_rounds", time_rounds)
    monkeypatch.setattr(tune_tiles, "SHAPE", SHAPES["tiny"])
    monkeypatch.setattr(tune_tiles, "DECODE", (Tile(128, 8, 1, 2), Tile(64, 8, 2, 3), BEST))


@pytest.mark.usefixtures("clock")
def test_the_fastest_schedule_becomes_the_entry() -> None:
    shape = SHAPES["tiny"]
    bits = widths(3, shape.num_experts)
    sizes = ((2 * shape.intermediate_size, shape.hidden_size), (shape.hidden_size, shape.intermediate_size))
    gate_up, down = (random_packed(bits, *size, CPU, pool_fraction=0.01).tensors for size in sizes)
    schedule, milliseconds = tune_tiles.tune(1, [(gate_up, down)], CPU, 0.1)
    assert (schedule.gate_up, schedule.down, schedule.atomic) == (BEST, BEST, True)
    assert milliseconds == 1.0
    later = choose_schedule(DEFAULT, 1 << 16, 8)
    entry = tune_tiles.entry_of({1: schedule, 512: later}, "a test")
    assert [bucket["rows_per_expert"] for bucket in entry["buckets"]] == [0, 512 * 2 / 8]
    assert entry["direct_rows"] == (2 if schedule.direct else 0)
    check_table({DEFAULT: entry})


def test_without_a_gpu_nothing_is_written(capsys: pytest.CaptureFixture[str]) -> None:
    before = TABLE.read_bytes()
    assert tune_tiles.main([]) == 2
    assert "no GPU" in capsys.readouterr().out
    assert TABLE.read_bytes() == before
