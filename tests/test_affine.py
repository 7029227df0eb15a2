from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from moe_compiler.kernels import affine
from moe_compiler.kernels.affine import (
    WIDTHS,
    QuantizedWeight,
    choose_qparams,
    dequantize,
    quantize,
    zero_point_step,
)

few = settings(max_examples=25, deadline=None, derandomize=True)
all_bits = st.integers(2, 8)


def heavy_tailed(seed: int, *shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator) / torch.rand(shape, generator=generator).add(0.1)


def by_column(values: Tensor, group_size: int, K: int) -> Tensor:
    return values.repeat_interleave(group_size, dim=-1)[..., :K]


def square_error(weight: Tensor, bits: int, group_size: int, steps: int = 5) -> Tensor:
    """Summed square error of every row."""
    scale, zero_point = choose_qparams(weight, bits, group_size, search_steps=steps)
    codes = quantize(weight, scale, zero_point, bits, group_size)
    return (dequantize(codes, scale, zero_point, group_size) - weight).double().square().sum(-1)


weights = st.builds(
    lambda seed, rows, K, size, shift: (heavy_tailed(seed, rows, K) + shift) * size,
    seed=st.integers(0, 1000),
    rows=st.integers(1, 3),
    K=st.integers(1, 70),
    size=st.sampled_from([1e-3, 0.02, 1.0, 300.0]),
    shift=st.sampled_from([-3.0, 0.0, 0.0, 10.0]),
)


@few
@given(weight=weights, bits=all_bits, group_size=st.sampled_from([4, 32, 128]))
def test_weights_inside_the_range_move_by_at_most_half_a_step(weight: Tensor, bits: int, group_size: int) -> None:
    K = weight.shape[-1]
    scale, zero_point = choose_qparams(weight, bits, group_size)
    codes = quantize(weight, scale, zero_point, bits, group_size)
    error = (weight - dequantize(codes, scale, zero_point, group_size)).abs()
    step, zero = by_column(scale, group_size, K), by_column(zero_point, group_size, K)
    inside = (weight >= -zero * step) & (weight <= (2**bits - 1 - zero) * step)
    assert (error <= step * 0.5001)[inside].all()


@few
@given(weight=weights, bits=all_bits, group_size=st.sampled_from([4, 32, 128]))
def test_the_result_can_be_stored(weight: Tensor, bits: int, group_size: int) -> None:
    scale, zero_point = choose_qparams(weight, bits, group_size)
    codes = quantize(weight, scale, zero_point, bits, group_size)
    groups = (*weight.shape[:-1], -(-weight.shape[-1] // group_size))
    assert scale.shape == zero_point.shape == groups
    assert codes.shape == weight.shape
    assert codes.dtype == torch.uint8
    assert int(codes.max()) < 2**bits
    assert (scale > 0).all()
    assert torch.equal(scale.half().float(), scale)
    byte = zero_point * 2 ** (8 - bits)
    assert torch.equal(byte.to(torch.uint8).float(), byte)


@few
@given(weight=weights, bits=all_bits, group_size=st.sampled_from([4, 32]))
def test_quantizing_dequantized_codes_gives_them_back(weight: Tensor, bits: int, group_size: int) -> None:
    scale, zero_point = choose_qparams(weight, bits, group_size)
    codes = quantize(weight, scale, zero_point, bits, group_size)
    again = quantize(dequantize(codes, scale, zero_point, group_size), scale, zero_point, bits, group_size)
    assert torch.equal(codes, again)


@few
@given(weight=weights, bits=all_bits, group_size=st.sampled_from([4, 32]))
def test_the_search_is_never_worse_than_minimum_to_maximum(weight: Tensor, bits: int, group_size: int) -> None:
    searched, plain = square_error(weight, bits, group_size), square_error(weight, bits, group_size, steps=0)
    assert (searched <= plain * 1.0001 + 1e-12).all()


@few
@given(seed=st.integers(0, 1000), size=st.sampled_from([1e-3, 1.0, 50.0]))
def test_more_bits_never_give_more_error(seed: int, size: float) -> None:
    weight = heavy_tailed(seed, 4, 96) * size
    errors = [float(square_error(weight, bits, 32).sum()) for bits in range(2, 9)]
    assert all(more <= less for less, more in pairwise(errors))


@pytest.mark.parametrize(("bits", "distortion"), [(2, 0.1188), (3, 0.03744), (4, 0.01154)])
def test_gaussian_weights_reach_the_optimal_uniform_quantizer(bits: int, distortion: float) -> None:
    # The distortion of the best uniform quantizer of a Gaussian: Max, "Quantizing for minimum distortion", 1960.
    weight = torch.randn(64, 1024)
    assert float(square_error(weight, bits, 128).mean()) / 1024 < distortion


@pytest.mark.parametrize("bits", range(2, 9))
def test_code_minus_zero_point_is_exact_in_half_precision(bits: int) -> None:
    codes = torch.arange(2**bits).float()
    zero_points = torch.arange(256) * zero_point_step(bits)
    difference = codes[:, None] - zero_points
    for dtype in (torch.float16, torch.bfloat16):
        assert torch.equal(difference.to(dtype).float(), difference)


@few
@given(values=st.lists(st.floats(-1e5, 1e5, width=32, allow_nan=False), min_size=1, max_size=40), bits=all_bits)
def test_finite_weights_never_give_nan(values: list[float], bits: int) -> None:
    weight = torch.tensor([values])
    scale, zero_point = choose_qparams(weight, bits, 8)
    codes = quantize(weight, scale, zero_point, bits, 8)
    restored = dequantize(codes, scale, zero_point, 8)
    assert torch.isfinite(restored).all()
    assert restored.abs().max() <= 2 * weight.abs().max() + 2**-15


@pytest.mark.parametrize("bits", WIDTHS)
def test_groups_of_zeros_stay_zero(bits: int) -> None:
    weight = torch.zeros(2, 40)
    weight[:, 32:] = torch.randn(2, 8)
    scale, zero_point = choose_qparams(weight, bits, 32)
    codes = quantize(weight, scale, zero_point, bits, 32)
    assert not dequantize(codes, scale, zero_point, 32)[:, :32].any()


@pytest.mark.parametrize("bits", WIDTHS)
@pytest.mark.parametrize("value", [3e-4, -0.7, 41.0, -6e4])
def test_constant_groups_are_kept(bits: int, value: float) -> None:
    weight = torch.full((1, 32), value)
    scale, zero_point = choose_qparams(weight, bits, 32)
    restored = dequantize(quantize(weight, scale, zero_point, bits, 32), scale, zero_point, 32)
    torch.testing.assert_close(restored, weight, rtol=2e-3, atol=2**-24)


@pytest.mark.parametrize("size", [1e-38, 1e-20, 1e-8])
def test_tiny_weights_get_the_smallest_scale(size: float) -> None:
    weight = torch.randn(2, 32) * size
    scale, zero_point = choose_qparams(weight, 4, 32)
    assert (scale == 2.0**-24).all()
    restored = dequantize(quantize(weight, scale, zero_point, 4, 32), scale, zero_point, 32)
    assert (restored - weight).abs().max() <= 2.0**-25


@pytest.mark.parametrize("bits", [2, 8])
def test_a_scale_that_overflows_float16_is_an_error(bits: int) -> None:
    largest = torch.tensor([[0.0, 65504.0 * (2**bits - 1)]])
    scale, _ = choose_qparams(largest, bits, 32, search_steps=0)
    assert float(scale) == 65504.0
    for weight in (largest * 1.1, torch.tensor([[-3e38, 3e38]])):
        with pytest.raises(ValueError, match=f"`weight` must fit a float16 scale.* at {bits} bits"):
            choose_qparams(weight, bits, 32)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_weights_that_are_not_finite_are_an_error(bad: float) -> None:
    weight = torch.randn(3, 32)
    weight[1, 5] = bad
    with pytest.raises(ValueError, match="`weight` must be finite"):
        choose_qparams(weight, 4, 32)


def test_wrong_arguments_are_errors() -> None:
    weight = torch.randn(2, 3, 32)
    with pytest.raises(ValueError, match="`bits` must be from 2 to 8, got 9"):
        choose_qparams(weight, 9, 32)
    with pytest.raises(ValueError, match="`group_size` must be positive, got 0"):
        choose_qparams(weight, 4, 0)
    with pytest.raises(ValueError, match=r"`importance` must .* per input channel, \(2, 32\), got \(32,\)"):
        choose_qparams(weight, 4, 32, torch.ones(32))
    with pytest.raises(ValueError, match="`bits` must be from 2 to 8, got 1"):
        quantize(weight, torch.ones(2, 3, 1), torch.zeros(2, 3, 1), 1, 32)


def test_a_ragged_last_group_sees_its_own_columns_only() -> None:
    weight = heavy_tailed(0, 5, 80)
    scale, zero_point = choose_qparams(weight, 3, 32)
    tail_scale, tail_zero_point = choose_qparams(weight[:, 64:], 3, 16)
    assert torch.equal(scale[:, 2:], tail_scale)
    assert torch.equal(zero_point[:, 2:], tail_zero_point)


def test_leading_dimensions_and_chunks_do_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    weight, importance = heavy_tailed(1, 2, 3, 5, 72), torch.rand(2, 3, 72)
    scale, zero_point = choose_qparams(weight, 4, 32, importance)
    monkeypatch.setitem(affine._CHUNK_ELEMENTS, "cpu", 100)
    for i in range(2):
        for j in range(3):
            one_scale, one_zero_point = choose_qparams(weight[i, j], 4, 32, importance[i, j])
            assert torch.equal(one_scale, scale[i, j])
            assert torch.equal(one_zero_point, zero_point[i, j])


def test_importance_decides_where_the_error_goes() -> None:
    weight = heavy_tailed(2, 16, 64)
    importance = torch.ones(64)
    importance[::4] = 100.0

    def error(chosen: Tensor | None) -> float:
        scale, zero_point = choose_qparams(weight, 2, 32, chosen)
        restored = dequantize(quantize(weight, scale, zero_point, 2, 32), scale, zero_point, 32)
        return float(((restored - weight).square() * importance).sum())

    assert error(importance) < 0.9 * error(None)


def test_importances_of_zero_count_as_uniform() -> None:
    weight = heavy_tailed(3, 4, 64)
    expected = choose_qparams(weight, 4, 32)
    for left, right in zip(expected, choose_qparams(weight, 4, 32, torch.zeros(64)), strict=True):
        assert torch.equal(left, right)


def test_low_precision_and_strided_weights_are_taken() -> None:
    weight = heavy_tailed(4, 64, 6).bfloat16()
    expected = choose_qparams(weight.mT.float().contiguous(), 4, 32)
    for left, right in zip(expected, choose_qparams(weight.mT, 4, 32), strict=True):
        assert torch.equal(left, right)


def test_quantized_weight_dequantizes_to_the_dtype_asked_for() -> None:
    weight = heavy_tailed(5, 2, 3, 40)
    scale, zero_point = choose_qparams(weight, 4, 32)
    quantized = QuantizedWeight(quantize(weight, scale, zero_point, 4, 32), scale, zero_point, (4, 4), 32)
    value = quantized.dequantize()
    assert value.dtype == torch.float32
    assert torch.equal(value, dequantize(quantized.codes, scale, zero_point, 32))
    assert torch.equal(quantized.dequantize(torch.bfloat16), value.bfloat16())
