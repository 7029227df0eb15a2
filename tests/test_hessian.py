from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from moe_compiler.passes.hessian import blend_hessians, compensation, output_error
from moe_compiler.passes.quantize import quantize_rtn


def layer(counts: list[int], K: int = 8) -> tuple[Tensor, Tensor]:
    """Hessians of experts that saw so many random tokens each, of different sizes and shapes."""
    hessians = []
    for e, count in enumerate(counts):
        x = torch.randn(count, K) @ torch.randn(K, K) * (e + 1)
        hessians.append(x.mT @ x)
    return torch.stack(hessians), torch.tensor(counts)


def trace(hessian: Tensor) -> Tensor:
    return hessian.diagonal(dim1=-2, dim2=-1).sum(-1)


def test_an_expert_without_tokens_gets_the_pooled_hessian_of_one_token() -> None:
    hessian, count = layer([5, 0, 30])
    blend = blend_hessians(hessian, count)
    torch.testing.assert_close(blend.hessian[1], hessian.sum(0) / 35)
    assert blend.blended == (0, 1)


def test_without_any_tokens_all_get_the_identity() -> None:
    blend = blend_hessians(torch.zeros(3, 4, 4), torch.zeros(3, dtype=torch.long))
    assert torch.equal(blend.hessian, torch.eye(4).expand(3, 4, 4))
    assert blend.blended == (0, 1, 2)


def test_a_blend_keeps_the_trace_and_has_full_rank() -> None:
    hessian, count = layer([1, 3, 40, 400])
    blend = blend_hessians(hessian, count).hessian
    torch.testing.assert_close(trace(blend), trace(hessian))
    assert (torch.linalg.eigvalsh(blend.double())[:, 0] > 0).all()


def test_the_own_share_grows_smoothly_with_the_tokens() -> None:
    hessian, _ = layer([50, 50])
    shares = []
    for tokens in (1, 2, 4, 8, 16, 1000):
        blend = blend_hessians(hessian, torch.tensor([tokens, 50]), minimum=8)
        assert blend.blended == ((0,) if tokens < 8 else ())
        pooled = hessian.sum(0) / (tokens + 50)
        pooled *= trace(hessian[0]) / trace(pooled)
        distance = torch.linalg.norm(blend.hessian[0] - pooled) / torch.linalg.norm(hessian[0] - pooled)
        assert float(distance) == pytest.approx(tokens / (tokens + 8), rel=1e-4)
        shares.append(float(distance))
    assert all(less < more for less, more in pairwise(shares))


def test_blending_leaves_its_input_alone_and_follows_the_experts() -> None:
    hessian, count = layer([5, 0, 30, 9])
    before = hessian.clone()
    order = torch.tensor([2, 0, 3, 1])
    blend = blend_hessians(hessian, count).hessian
    assert torch.equal(hessian, before)
    torch.testing.assert_close(blend_hessians(hessian[order], count[order]).hessian, blend[order])


def test_output_error_is_the_error_of_the_outputs() -> None:
    x, weight = torch.randn(2, 20, 40), torch.randn(2, 6, 40)
    quantized = quantize_rtn(weight, [2, 4], 32)
    restored = quantized.dequantize()
    expected = (x @ weight.mT - x @ restored.mT).square().sum((-2, -1)).double()
    for given_as in (quantized, restored):
        torch.testing.assert_close(output_error(weight, given_as, x.mT @ x), expected, rtol=1e-4, atol=0.0)
    assert not output_error(weight, weight, x.mT @ x).any()


@settings(max_examples=15, deadline=None, derandomize=True)
@given(seed=st.integers(0, 1000), K=st.integers(1, 12), damping=st.sampled_from([0.01, 0.1, 1.0]))
def test_compensation_factors_the_damped_hessian(seed: int, K: int, damping: float) -> None:
    x = torch.randn(3, 4, K, generator=torch.Generator().manual_seed(seed)).double()
    hessian = x.mT @ x
    factor, pivot = (part.double() for part in compensation(hessian, damping))
    mean = hessian.diagonal(dim1=-2, dim2=-1).mean(-1)[:, None, None]
    damped = hessian / mean + damping * torch.eye(K)
    assert torch.equal(factor.diagonal(dim1=-2, dim2=-1), torch.ones(3, K).double())
    assert not factor.tril(-1).any()
    torch.testing.assert_close(factor * pivot.unsqueeze(-2) @ factor.mT, damped, rtol=1e-4, atol=1e-4)
    inverse_factor = torch.linalg.cholesky(torch.linalg.inv(damped), upper=True)
    cost = inverse_factor.diagonal(dim1=-2, dim2=-1).square().reciprocal()
    torch.testing.assert_close(pivot, cost, rtol=1e-4, atol=0.0)


def test_only_a_hessian_that_is_not_positive_definite_is_damped_more() -> None:
    good, _ = layer([30])
    bad = good.clone()
    bad[0, 0, 1] = bad[0, 1, 0] = 3 * float(trace(good))
    factor, pivot = compensation(torch.cat([good, bad]), 0.01)
    expected_factor, expected_pivot = compensation(good, 0.01)
    assert torch.equal(factor[:1], expected_factor)
    assert torch.equal(pivot[:1], expected_pivot)
    assert torch.isfinite(factor).all()
    assert (pivot > 0).all()


def test_a_singular_hessian_without_damping_is_factored() -> None:
    x = torch.randn(1, 2, 6)
    factor, pivot = compensation(x.mT @ x, 0.0)
    assert torch.isfinite(factor).all()
    assert (pivot > 0).all()


def test_wrong_arguments_are_errors() -> None:
    hessian, count = layer([5, 9])
    weight = torch.randn(2, 3, 8)
    with pytest.raises(ValueError, match=r"`hessian` must have the shape \(2, 8, 8\), .* got \(2, 8\)"):
        blend_hessians(hessian[:, 0], count)
    with pytest.raises(ValueError, match=r"`count` must have one number per expert, \(2,\), got \(3,\)"):
        blend_hessians(hessian, torch.zeros(3))
    with pytest.raises(ValueError, match="`minimum` must be positive, got 0"):
        blend_hessians(hessian, count, minimum=0)
    with pytest.raises(ValueError, match=r"`quantized` must have the shape \(2, 3, 8\) of `weight`, got \(2, 8\)"):
        output_error(weight, weight[:, 0], hessian)
    with pytest.raises(ValueError, match=r"`hessian` must have the shape \(2, 8, 8\)"):
        output_error(weight, weight, hessian[:1])
    hessian[1, 3, 3] = -1
    with pytest.raises(ValueError, match="`hessian` must be a sum of x·xᵀ, that of expert 1 is negative"):
        blend_hessians(hessian, count)
    hessian[1, 3, 3] = float("nan")
    with pytest.raises(ValueError, match="`hessian` must be finite, that of expert 1 holds NaN"):
        blend_hessians(hessian, count)
