"""Routing against `torch.sort(stable=True)`: order, offsets, and what each block holds."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from moe_compiler.kernels import triton_routing
from moe_compiler.kernels.triton_routing import Blocks, max_blocks, route


def check(ids: Tensor, num_experts: int, block_m: int) -> Blocks:
    blocks = route(ids, num_experts, block_m)
    clean = torch.where((ids >= 0) & (ids < num_experts), ids, num_experts).long()
    counts = torch.bincount(clean, minlength=num_experts + 1)
    offsets = torch.cat([torch.zeros(1, dtype=torch.long), counts.cumsum(0)])[: num_experts + 1]
    expected = []
    for expert in range(num_experts):
        first, count = int(offsets[expert]), int(counts[expert])
        expected += [[expert, first + at, min(block_m, count - at), 0] for at in range(0, count, block_m)]
    capacity = max_blocks(ids.shape[0], num_experts, block_m)
    assert len(expected) <= capacity
    expected += [[-1, 0, 0, 0]] * (capacity - len(expected))
    assert blocks.order.tolist() == torch.sort(clean, stable=True).indices.tolist()
    assert blocks.offsets.tolist() == offsets.tolist()
    assert blocks.record.tolist() == expected
    assert {t.dtype for t in (blocks.record, blocks.order, blocks.offsets)} == {torch.int32}
    assert blocks.block_m == block_m
    return blocks


@given(st.data())
@settings(deadline=None, max_examples=30)
def test_routes_like_a_stable_sort(data: st.DataObject) -> None:
    num_experts = data.draw(st.integers(1, 20), "experts")
    rows = data.draw(st.integers(0, 150), "rows")
    block_m = data.draw(st.sampled_from([1, 3, 8, 16, 64]), "block_m")
    ids = data.draw(st.lists(st.integers(-1, num_experts + 3), min_size=rows, max_size=rows), "ids")
    check(torch.tensor(ids, dtype=data.draw(st.sampled_from([torch.int32, torch.int64]))), num_experts, block_m)


@pytest.mark.parametrize(("rows", "num_experts"), [(512, 256), (513, 64), (2000, 300)])
@pytest.mark.parametrize("skewed", [False, True])
def test_routes_many_rows(rows: int, num_experts: int, skewed: bool) -> None:
    draw = torch.rand(rows) ** (4 if skewed else 1)
    check((draw * (num_experts + 2)).long(), num_experts, 16)


def test_long_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton_routing, "_LONG_ROWS", 1000)
    check(torch.randint(0, 9, (2500,)), 8, 64)


@pytest.mark.parametrize("rows", [1, 40, 700])
def test_all_rows_on_one_expert(rows: int) -> None:
    check(torch.full((rows,), 2), 5, 16)


def test_all_rows_foreign() -> None:
    blocks = check(torch.full((30,), 1 << 32), 4, 8)
    assert blocks.offsets.tolist() == [0] * 5


def test_no_rows() -> None:
    blocks = check(torch.empty(0, dtype=torch.int64), 4, 8)
    assert blocks.record.shape == (0, 4)


def test_reads_a_strided_view() -> None:
    check(torch.randint(0, 6, (33, 2))[:, 1], 6, 8)


@given(st.integers(0, 60), st.integers(1, 12), st.integers(1, 9))
@settings(deadline=None, max_examples=60)
def test_bound_is_reached_and_never_passed(rows: int, num_experts: int, block_m: int) -> None:
    """The bound is tight: one row for every expert but one, and the rest on that one, comes within one block of it."""
    spread = min(rows, num_experts)
    counts = [1] * spread
    if spread:
        counts[0] += rows - spread
    needed = sum(-(-count // block_m) for count in counts)
    assert needed <= max_blocks(rows, num_experts, block_m) <= needed + num_experts // block_m + 1


@pytest.mark.parametrize(
    ("ids", "error", "match"),
    [
        (torch.zeros(3), TypeError, r"`expert_ids` must be int32 or int64 to be routed, but is torch.float32"),
        (torch.zeros(3, 2, dtype=torch.long), ValueError, r"`expert_ids` must have one dimension .* \(3, 2\)"),
    ],
)
def test_refuses_other_ids(ids: Tensor, error: type[Exception], match: str) -> None:
    with pytest.raises(error, match=match):
        route(ids, 4, 8)


@pytest.mark.parametrize(("num_experts", "block_m"), [(0, 8), (4, 0)])
def test_refuses_empty_sizes(num_experts: int, block_m: int) -> None:
    with pytest.raises(ValueError, match=f"must be positive to route rows, but are {num_experts} and {block_m}"):
        route(torch.zeros(3, dtype=torch.long), num_experts, block_m)
