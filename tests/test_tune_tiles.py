"""The tuner of tiles, with a clock that knows the answer."""

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import triton
from triton.runtime.errors import OutOfResources

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "benches"))

import tune_tiles
from harness import Failure, Timing
from workloads import SHAPES, random_packed, widths

from moe_compiler.kernels.tiles import DEFAULT, TABLE, Tile, check_table, choose_schedule

CPU = torch.device("cpu")
BEST = Tile(32, 8, 1, 2)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> None:
    """`BEST` and the atomic sum are fast, wide tiles fail."""

    def time_rounds(candidates: dict[Any, Any], device: torch.device, seconds: float) -> dict[Any, Any]:
        times: dict[Any, Any] = {}
        for key in candidates:
            tile = key if isinstance(key, Tile) else key.gate_up
            if tile.block_n > 32:
                times[key] = Failure("out of shared memory")
                continue
            slow = (tile != BEST) + (not isinstance(key, Tile) and not key.atomic) + 1.0
            times[key] = Timing((slow,), 0.0)
        return times

    monkeypatch.setattr(tune_tiles, "time_rounds", time_rounds)
    monkeypatch.setattr(tune_tiles, "SHAPE", SHAPES["tiny"])
    monkeypatch.setattr(tune_tiles, "DECODE", (Tile(64, 8, 1, 2), BEST))


@pytest.mark.usefixtures("clock")
def test_a_tile_that_does_not_fit_is_left_out(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def too_large() -> None:
        raise OutOfResources(240_000, 232_448, "shared memory")

    calls = {Tile(64, 8, 1, 2): [too_large], BEST: [lambda: None]}
    assert tune_tiles.fastest(calls, CPU, 0.1) == (BEST, 1.0)
    assert "Tile(block_n=64, block_m=8, num_warps=1, num_stages=2): out of resource" in capsys.readouterr().out


def test_families_cover_every_number_of_tokens() -> None:
    for tokens in tune_tiles.TOKENS:
        found = list(tune_tiles.families(tokens))
        assert found
        assert all(family.tiles and {tile.block_m for tile in family.tiles} == {family.block_m} for family in found)
        assert any(family.direct for family in found) == (tokens * tune_tiles.SHAPE.top_k <= 64)


def test_a_tile_is_compiled_without_memory_and_not_launched(monkeypatch: pytest.MonkeyPatch) -> None:
    compiled = []

    def launcher(name: str) -> Any:
        def launch(*args: Any, **_: Any) -> None:
            tensors = [one for one in args if isinstance(one, torch.Tensor)]
            assert all(tensor.is_meta for tensor in tensors)
            run("a kernel", grid=(1,), warmup=False)
            compiled.append(name)

        return launch

    def run(kernel: str, grid: tuple[int, ...], warmup: bool) -> None:
        triton.JITFunction.run(kernel, grid=grid, warmup=warmup)

    warmups = []
    monkeypatch.setattr(triton.JITFunction, "run", lambda *_, grid, warmup, **__: warmups.append(warmup))
    monkeypatch.setattr(tune_tiles.triton_experts, "gate_up", launcher("gate_up"))
    monkeypatch.setattr(tune_tiles.triton_experts, "down", launcher("down"))
    tune_tiles.compile_tile(1, tune_tiles.Family("decode", True, 8, (BEST,)), BEST)
    assert compiled == ["gate_up", "down"]
    assert warmups == [True, True]


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
