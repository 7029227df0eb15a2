"""The plane layout: exact for every width and shape, and laid out as its specification says."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_compiler.kernels.planes import PlaneLayout, pack, pack_experts, unpack, unpack_expert

SHAPES = st.tuples(st.integers(1, 9), st.integers(1, 300))
WIDTH = st.sampled_from([2, 4, 6, 8])


def random_codes(shape: tuple[int, ...], bits: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 1 << bits, shape, generator=generator, dtype=torch.uint8)


@settings(deadline=None, max_examples=60)
@given(shape=SHAPES, bits=WIDTH, seed=st.integers(0, 99))
def test_pack_then_unpack_is_exact(shape: tuple[int, int], bits: int, seed: int) -> None:
    codes = random_codes(shape, bits, seed)
    words = pack(codes, bits)
    assert words.dtype == torch.int16
    assert words.shape == (-(-shape[1] // 128), bits // 2, shape[0], 16)
    assert torch.equal(unpack(words, shape[1]), codes)


@pytest.mark.parametrize("bits", [2, 4, 6, 8])
def test_digits_lie_where_the_specification_says(bits: int) -> None:
    codes = random_codes((3, 256), bits)
    words = pack(codes, bits).to(torch.int32) & 0xFFFF
    for row, channel in ((0, 0), (1, 17), (2, 130), (0, 255)):
        tile, position, half_word = channel // 128, channel % 128 // 16, channel % 16
        digits = [(int(words[tile, p, row, half_word]) >> (2 * position)) & 3 for p in range(bits // 2)]
        assert int("".join(f"{digit:02b}" for digit in digits), 2) == int(codes[row, channel])


@pytest.mark.parametrize("bits", [4, 6, 8])
def test_leading_planes_are_the_code_at_a_lower_width(bits: int) -> None:
    codes = random_codes((4, 128), bits)
    assert torch.equal(unpack(pack(codes, bits)[:, :1], 128), codes >> (bits - 2))


@settings(deadline=None, max_examples=30)
@given(
    bits=st.lists(WIDTH, min_size=1, max_size=6),
    shape=SHAPES,
    seed=st.integers(0, 99),
)
def test_experts_of_mixed_widths_share_one_tensor(bits: list[int], shape: tuple[int, int], seed: int) -> None:
    codes = torch.stack([random_codes(shape, width, seed + e) for e, width in enumerate(bits)])
    planes, table = pack_experts(codes, bits)
    layout = PlaneLayout(tuple(bits), *shape)
    assert planes.numel() == layout.offsets[-1]
    for expert, (num_planes, start) in enumerate(table.tolist()):
        assert 2 * num_planes == bits[expert]
        assert 128 * start == layout.offsets[expert]
        assert torch.equal(unpack_expert(planes, num_planes, 128 * start, *shape), codes[expert])


@pytest.mark.parametrize("bits", [1, 3, 5, 16])
def test_other_widths_are_refused(bits: int) -> None:
    with pytest.raises(ValueError, match=rf"`bits` must be one of \(2, 4, 6, 8\), but is {bits}"):
        pack(torch.zeros(1, 1, dtype=torch.uint8), bits)
    with pytest.raises(ValueError, match=f"expert 1 has {bits}"):
        PlaneLayout((2, bits), 8, 128)


def test_codes_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match=r"`codes` must be below 2\*\*2 = 4, but the largest is 4"):
        pack(torch.tensor([[4]], dtype=torch.uint8), 2)


def test_empty_shapes_are_refused() -> None:
    with pytest.raises(ValueError, match="must be positive, but are 0 and 4"):
        PlaneLayout((2,), 0, 4)
