"""The table of tiles: what it may say, and which entry a batch takes."""

import copy
import json
from typing import Any

import pytest

from moe_compiler.kernels import tiles
from moe_compiler.kernels.tiles import DEFAULT, TABLE, Tile, check_table, choose_schedule


def table() -> dict[str, Any]:
    return json.loads(TABLE.read_text())


def test_the_table_of_the_package_is_valid() -> None:
    check_table(table())


@pytest.mark.parametrize("rows", [0, 1, 8, 32, 33, 512, 4096, 1 << 20])
@pytest.mark.parametrize("experts", [1, 8, 64, 256])
def test_every_batch_has_a_schedule(rows: int, experts: int) -> None:
    schedule = choose_schedule("no such device", rows, experts)
    assert schedule.path in tiles.PATHS
    assert schedule.gate_up.block_m == schedule.down.block_m
    if schedule.direct:
        assert schedule.path == "decode"
        assert rows <= table()[DEFAULT]["direct_rows"]


def test_more_rows_per_expert_never_mean_smaller_tiles() -> None:
    sizes = [choose_schedule(DEFAULT, rows, 64).down.block_m for rows in (1, 64, 512, 4096, 32768)]
    assert sizes == sorted(sizes)


def test_an_excluded_path_leaves_the_one_for_fewer_rows() -> None:
    assert choose_schedule(DEFAULT, 1 << 20, 8).path == "dense"
    assert choose_schedule(DEFAULT, 1 << 20, 8, exclude="dense").path == "prefill"


def test_a_device_has_its_own_entry(monkeypatch: pytest.MonkeyPatch) -> None:
    entry = copy.deepcopy(table()[DEFAULT])
    entry["buckets"] = [entry["buckets"][0] | {"gate_up": [128, 8, 4, 2], "atomic": True}]
    monkeypatch.setattr(tiles, "_table", lambda: {DEFAULT: table()[DEFAULT], "Some GPU": entry})
    schedule = choose_schedule("Some GPU", 1 << 20, 8)
    assert schedule.gate_up == Tile(128, 8, 4, 2)
    assert schedule.atomic
    assert not choose_schedule("Other GPU", 1 << 20, 8).atomic


BAD: list[tuple[dict[str, Any], str]] = [
    ({"rows_per_expert": 1}, r"the buckets of 'default' must start at 0 rows per expert and ascend, but are \[1\]"),
    ({"path": "fast"}, "the path of a bucket of 'default' must be one of decode, prefill, dense, but is 'fast'"),
    ({"down": [48, 8, 2, 3]}, r"`down` of 'default' must have powers of two .* but is Tile\(block_n=48"),
    ({"down": [64, 16, 2, 3]}, "`gate_up` and `down` of 'default' must have the same block_m"),
]


@pytest.mark.parametrize(("change", "message"), BAD)
def test_a_wrong_table_is_refused(change: dict[str, Any], message: str) -> None:
    wrong = table()
    wrong[DEFAULT]["buckets"] = [wrong[DEFAULT]["buckets"][0] | change]
    with pytest.raises(ValueError, match=message):
        check_table(wrong)


def test_a_table_without_a_default_is_refused() -> None:
    with pytest.raises(ValueError, match="the table of tiles must have the entry 'default', but has Some GPU"):
        check_table({"Some GPU": table()[DEFAULT]})
