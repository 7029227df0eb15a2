"""Coordinate descent after GPTQ: it never raises the error, ends where no code can be improved, and fits ranges."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from moe_compiler.kernels.affine import QuantizedWeight, choose_qparams, quantize, zero_point_step
from moe_compiler.passes.descent import Rounded, descend
from moe_compiler.passes.gptq import quantize_gptq

SHAPES = st.tuples(st.integers(1, 3), st.integers(1, 5), st.sampled_from([7, 32, 40, 64, 100]))


def random_problem(shape: tuple[int, int, int], seed: int, correlation: float = 0.7) -> tuple[Tensor, Tensor]:
    """Weights `(E, N, K)` and Hessians `(E, K, K)` whose channels correlate."""
    generator = torch.Generator().manual_seed(seed)
    E, N, K = shape
    weight = torch.randn(E, N, K, generator=generator)
    common = torch.randn(E, 3 * K, 1, generator=generator)
    rows = correlation * common + torch.randn(E, 3 * K, K, generator=generator)
    return weight, rows.mT @ rows


def damped(hessian: Tensor, damping: float = 0.05) -> Tensor:
    diagonal = hessian.diagonal(dim1=-2, dim2=-1)
    return hessian + torch.diag_embed(damping * diagonal.mean(-1, keepdim=True).expand_as(diagonal))


def to_nearest(weight: Tensor, bits: int, group_size: int) -> Rounded:
    scale, zero_point = choose_qparams(weight, bits, group_size, search_steps=0)
    codes = quantize(weight, scale, zero_point, bits, group_size)
    return Rounded(codes.mT.float().contiguous(), scale.mT.contiguous(), zero_point.mT.contiguous(), bits, group_size)


def error(weight: Tensor, rounded: Rounded, hessian: Tensor) -> Tensor:
    """The squared output error of each row, `(E, N)`, in float64."""
    quantized = QuantizedWeight(
        rounded.codes.mT.to(torch.uint8),
        rounded.scale.mT,
        rounded.zero_point.mT,
        (rounded.bits,) * weight.shape[0],
        rounded.group_size,
    )
    missed = weight.double() - quantized.dequantize().double()
    return ((missed @ hessian.double()) * missed).sum(-1)


@given(shape=SHAPES, bits=st.sampled_from([2, 3, 4, 6, 8]), seed=st.integers(0, 2**16), sweeps=st.integers(0, 3))
@settings(max_examples=25, deadline=None)
def test_no_row_gets_worse_and_ranges_can_be_stored(
    shape: tuple[int, int, int], bits: int, seed: int, sweeps: int
) -> None:
    weight, hessian = random_problem(shape, seed)
    hessian = damped(hessian)
    start = to_nearest(weight, bits, 32)
    result = descend(weight.mT.contiguous(), hessian, start, sweeps)
    before, after = error(weight, start, hessian), error(weight, result, hessian)
    assert bool((after <= before * (1 + 1e-4) + 1e-6).all())
    assert torch.equal(result.scale, result.scale.half().float())
    assert torch.equal(result.zero_point.remainder(zero_point_step(bits)), torch.zeros_like(result.zero_point))
    assert float(result.codes.min()) >= 0
    assert float(result.codes.max()) <= 2**bits - 1


def test_the_end_is_a_place_where_no_single_code_can_be_improved() -> None:
    weight, hessian = random_problem((2, 3, 32), seed=1)
    hessian = damped(hessian)
    result = descend(weight.mT.contiguous(), hessian, to_nearest(weight, 2, 32), sweeps=30)
    best = error(weight, result, hessian)
    for channel in range(32):
        for code in range(4):
            codes = result.codes.clone()
            codes[:, channel] = code
            changed = Rounded(codes, result.scale, result.zero_point, 2, 32)
            assert bool((error(weight, changed, hessian) >= best * (1 - 1e-4)).all())


def test_a_wrong_range_is_fitted_to_the_codes() -> None:
    codes = torch.randint(0, 16, (1, 64, 5), generator=torch.Generator().manual_seed(0)).float()
    scale, zero_point = torch.full((1, 2, 5), 0.25), torch.full((1, 2, 5), 7.5)
    weight = (codes - 7.5) * 0.25
    _, hessian = random_problem((1, 5, 64), seed=2)
    hessian = damped(hessian)
    start = Rounded(codes, scale * 1.09375, zero_point - 0.25, 4, 32)
    result = descend(weight, hessian, start, sweeps=4)
    before, after = (error(weight.mT, one, hessian).sum() for one in (start, result))
    assert after < 0.05 * before


@pytest.mark.parametrize("bits", [2, 4])
def test_gptq_with_sweeps_beats_gptq(bits: int) -> None:
    weight, hessian = random_problem((3, 16, 128), seed=3)
    plain, improved = (quantize_gptq(weight, hessian, [bits] * 3, 32, sweeps=sweeps) for sweeps in (0, 3))
    objective = damped(hessian)

    def total(quantized: QuantizedWeight) -> float:
        missed = weight - quantized.dequantize()
        return float(((missed @ objective) * missed).sum())

    assert total(improved) < 0.99 * total(plain)


def test_what_it_begins_with_is_not_modified() -> None:
    weight, hessian = random_problem((1, 4, 32), seed=4)
    start = to_nearest(weight, 2, 32)
    kept = start.codes.clone(), start.scale.clone(), start.zero_point.clone()
    descend(weight.mT.contiguous(), damped(hessian), start, sweeps=2)
    assert all(torch.equal(a, b) for a, b in zip(kept, (start.codes, start.scale, start.zero_point), strict=True))
    assert descend(weight.mT.contiguous(), damped(hessian), start, sweeps=0) is start


def test_negative_sweeps_are_refused() -> None:
    weight, hessian = random_problem((1, 2, 32), seed=5)
    with pytest.raises(ValueError, match=r"`sweeps` must not be negative, got -1"):
        quantize_gptq(weight, hessian, [4], 32, sweeps=-1)
