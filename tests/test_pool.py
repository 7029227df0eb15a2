"""The channel pool: rounding, order, capacity, copying in place."""

import pytest
import torch

from moe_compiler.kernels.pool import ChannelPool

EXPERTS = torch.tensor([2, 0, 2, 1])
CHANNELS = torch.tensor([5, 3, 1, 0])


def idle(capacity: int = 6, directions: int = 0) -> ChannelPool:
    return ChannelPool.empty(4, capacity, 16, 8, directions)


def pool(capacity: int = 6) -> ChannelPool:
    columns = torch.randn(4, 16, generator=torch.Generator().manual_seed(1))
    return ChannelPool.from_columns(EXPERTS, CHANNELS, columns, idle(capacity))


def test_slots_are_sorted_by_expert_and_channel() -> None:
    contents = pool()
    assert contents.offset.tolist() == [0, 1, 2, 4, 4]
    assert contents.index.tolist() == [3, 0, 1, 5, 0, 0]
    assert contents.experts().tolist() == [0, 1, 2, 2]
    assert (contents.used, contents.capacity) == (4, 6)


def test_columns_are_kept_to_int8_precision() -> None:
    columns = torch.randn(4, 16, generator=torch.Generator().manual_seed(1))
    contents = pool()
    back = torch.zeros(4, 16)
    for slot, (expert, channel) in enumerate(zip(contents.experts(), contents.index, strict=False)):
        row = ((EXPERTS == expert) & (CHANNELS == channel)).nonzero()[0, 0]
        back[row] = contents.columns()[slot]
    assert torch.all((back - columns).abs() <= columns.abs().amax(1, keepdim=True) / 254 + 1e-7)


def test_dense_places_every_column() -> None:
    dense = pool().dense()
    assert dense.shape == (4, 16, 8)
    assert torch.equal(dense[2, :, 5], pool().columns()[3])
    assert int((dense.abs().sum(1) > 0).sum()) == 4


def test_zero_columns_and_no_columns_are_fine() -> None:
    contents = ChannelPool.from_columns(EXPERTS, CHANNELS, torch.zeros(4, 16), idle(4))
    assert float(contents.columns().abs().sum()) == 0
    none = torch.zeros(0, dtype=torch.int64)
    assert ChannelPool.from_columns(none, none, torch.zeros(0, 16), idle(4)).used == 0


def test_copy_keeps_the_storage() -> None:
    target = idle()
    addresses = [t.data_ptr() for t in target.tensors().values()]
    target.copy_(pool())
    assert addresses == [t.data_ptr() for t in target.tensors().values()]
    assert all(torch.equal(t, pool().tensors()[name]) for name, t in target.tensors().items())


def test_copy_of_another_shape_changes_nothing() -> None:
    target = idle()
    with pytest.raises(ValueError, match=r"pool buffer `index` is \(6,\) torch.int32 in the model but \(5,\)"):
        target.copy_(pool(capacity=5))
    assert target.used == 0


def test_too_many_repeated_or_infinite_columns_are_refused() -> None:
    columns = torch.ones(4, 16)
    with pytest.raises(ValueError, match="`like` has 3 slots, but 4 corrections were given"):
        ChannelPool.from_columns(EXPERTS, CHANNELS, columns, idle(3))
    with pytest.raises(ValueError, match="`like` has 3 directions, but 4 corrections were given"):
        ChannelPool.from_directions(EXPERTS, torch.ones(4, 8), columns, idle(4, 3))
    with pytest.raises(ValueError, match="expert 2 has channel 1 twice"):
        ChannelPool.from_columns(EXPERTS, torch.tensor([1, 3, 1, 0]), columns, idle(4))
    with pytest.raises(FloatingPointError, match="`columns` must be finite"):
        ChannelPool.from_columns(EXPERTS, CHANNELS, columns * torch.inf, idle(4))
    with pytest.raises(FloatingPointError, match="`directions` must be finite"):
        ChannelPool.from_directions(EXPERTS, torch.full((4, 8), torch.nan), columns, idle(4, 4))


def test_low_rank_slots_are_outer_products() -> None:
    generator = torch.Generator().manual_seed(1)
    directions, columns = torch.randn(4, 8, generator=generator), torch.randn(4, 16, generator=generator)
    contents = ChannelPool.from_directions(EXPERTS, directions, columns, idle(6, 5))
    assert contents.index.tolist() == [8, 9, 10, 11, 0, 0]
    assert contents.experts().tolist() == [0, 1, 2, 2]
    expected = torch.zeros(4, 16, 8)
    for expert, direction, column in zip(EXPERTS.tolist(), directions, columns, strict=True):
        expected[expert] += torch.outer(column, direction)
    assert float((contents.dense() - expected).abs().max() / expected.abs().max()) < 0.02


def test_a_pool_may_hold_channels_where_directions_are_possible() -> None:
    columns = torch.randn(4, 16, generator=torch.Generator().manual_seed(1))
    contents = ChannelPool.from_columns(EXPERTS, CHANNELS, columns, idle(6, 5))
    assert torch.equal(contents.dense(), pool().dense())
