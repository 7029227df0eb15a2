import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from moe_compiler.kernels.affine import QuantizedWeight, choose_qparams
from moe_compiler.passes.quantize import (
    QUANTIZERS,
    output_error,
    quantize_experts,
    quantize_gptq,
    quantize_hqq,
    quantize_rtn,
)

E, N, K = 3, 24, 80  # groups of 32: the last one is ragged
METHODS = sorted(QUANTIZERS)


def experts(seed: int = 0, E: int = E, N: int = N, K: int = K) -> tuple[Tensor, Tensor]:
    """Weights, and Hessians of strongly correlated inputs of uneven sizes."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(E, N, K, generator=generator) * 0.05
    mixed = torch.randn(E, 200, 12, generator=generator) @ torch.randn(E, 12, K, generator=generator)
    x = (mixed + torch.randn(E, 200, K, generator=generator)) * torch.rand(K, generator=generator).add(0.1)
    return weight, x.mT @ x


def assert_equal(one: QuantizedWeight, other: QuantizedWeight) -> None:
    assert torch.equal(one.codes, other.codes)
    assert torch.equal(one.scale, other.scale)
    assert torch.equal(one.zero_point, other.zero_point)
    assert one.bits == other.bits
    assert one.group_size == other.group_size


def take(quantized: QuantizedWeight, chosen: list[int]) -> QuantizedWeight:
    return QuantizedWeight(
        quantized.codes[chosen],
        quantized.scale[chosen],
        quantized.zero_point[chosen],
        tuple(quantized.bits[e] for e in chosen),
        quantized.group_size,
    )


def textbook_gptq(
    weight: Tensor, hessian: Tensor, bits: int, group_size: int, damping: float, order: list[list[int]]
) -> tuple[Tensor, Tensor]:
    """One expert, one column at a time, float64, by the Cholesky factor of the inverse (GPTQ, algorithm 1).

    `order` holds the columns of each group in the order of their rounding. Returns codes and weights, `(N, K)`.
    """
    K = weight.shape[-1]
    columns = torch.tensor([column for group in order for column in group])
    permuted = hessian.double()[columns][:, columns]
    permuted = permuted + damping * permuted.diagonal().mean() * torch.eye(K)
    inverse = torch.linalg.cholesky(torch.linalg.inv(permuted), upper=True)
    work = weight.double()[:, columns].clone()
    codes, restored = torch.empty_like(work), torch.empty_like(work)
    column = 0
    for group in order:
        span = slice(column, column + len(group))
        cost = inverse.diagonal()[span] ** -2
        scale, zero_point = choose_qparams(work[:, span].float(), bits, group_size, cost.float())
        for _ in group:
            code = (work[:, column] / scale[:, 0] + zero_point[:, 0]).round().clamp(0, 2**bits - 1)
            restored[:, column] = scale[:, 0] * (code - zero_point[:, 0])
            codes[:, column] = code
            error = (work[:, column] - restored[:, column]) / inverse[column, column]
            work[:, column:] -= error[:, None] * inverse[column, column:]
            column += 1
    back = columns.argsort()
    return codes[:, back], restored[:, back].float()


def importance_order(hessian: Tensor, group_size: int) -> list[list[int]]:
    diagonal = hessian.diagonal().tolist()
    groups = [
        sorted(range(start, min(start + group_size, len(diagonal))), key=lambda c: -diagonal[c])
        for start in range(0, len(diagonal), group_size)
    ]
    whole = [group for group in groups if len(group) == group_size]
    whole.sort(key=lambda group: -sum(diagonal[c] for c in group))
    return whole + groups[len(whole) :]


@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_batched_gptq_agrees_with_the_textbook(bits: int, act_order: bool) -> None:
    weight, hessian = experts()
    quantized = quantize_gptq(weight, hessian, [bits] * E, 32, act_order=act_order, refine=0, sweeps=0)
    results = []
    for e in range(E):
        order = importance_order(hessian[e] if act_order else torch.eye(K), 32)
        results.append(textbook_gptq(weight[e], hessian[e], bits, 32, 0.05, order))
    codes = torch.stack([codes for codes, _ in results])
    assert (quantized.codes == codes).float().mean() > 0.999
    expected = output_error(weight, torch.stack([restored for _, restored in results]), hessian)
    torch.testing.assert_close(output_error(weight, quantized, hessian), expected, rtol=1e-3, atol=0.0)


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_gptq_beats_rounding_to_nearest_on_correlated_inputs(bits: int) -> None:
    weight, hessian = experts(1)
    widths = [bits] * E
    gptq = output_error(weight, quantize_gptq(weight, hessian, widths, 32), hessian)
    nearest = output_error(weight, quantize_experts("rtn", weight, hessian, widths, 32), hessian)
    assert (gptq < 0.6 * nearest).all()


@pytest.mark.parametrize("option", ["act_order", "refine"])
def test_the_choices_of_gptq_pay(option: str) -> None:
    weight, hessian = experts(2, E=4, N=64, K=128)
    default = output_error(weight, quantize_gptq(weight, hessian, [2] * 4, 32), hessian)
    without = quantize_gptq(
        weight, hessian, [2] * 4, 32, act_order=option != "act_order", refine=int(option != "refine")
    )
    plain = output_error(weight, without, hessian)
    assert default.sum() < plain.sum()


def test_gptq_with_an_identity_hessian_rounds_to_nearest() -> None:
    weight, _ = experts(3)
    identity = torch.eye(K).expand(E, K, K)
    gptq = quantize_gptq(weight, identity, [2, 3, 8], 32, damping=0.0, sweeps=0)
    assert_equal(gptq, quantize_rtn(weight, [2, 3, 8], 32))


@pytest.mark.parametrize("method", METHODS)
def test_permuting_experts_permutes_the_result(method: str) -> None:
    weight, hessian = experts(4, E=4)
    order = [2, 0, 3, 1]
    quantized = quantize_experts(method, weight, hessian, [2, 4, 2, 4], 32)
    permuted = quantize_experts(method, weight[order], hessian[order], [[2, 4, 2, 4][e] for e in order], 32)
    assert_equal(permuted, take(quantized, order))


@pytest.mark.parametrize("method", METHODS)
def test_mixed_widths_equal_a_call_per_width(method: str) -> None:
    weight, hessian = experts(5, E=4)
    mixed = quantize_experts(method, weight, hessian, [2, 3, 6, 2], 32)
    for width, chosen in ((2, [0, 3]), (3, [1]), (6, [2])):
        alone = quantize_experts(method, weight[chosen], hessian[chosen], [width] * len(chosen), 32)
        assert_equal(alone, take(mixed, chosen))


def test_the_memory_bound_does_not_change_the_result() -> None:
    weight, hessian = experts(6)
    assert_equal(quantize_gptq(weight, hessian, [4] * E, 32, max_bytes=1), quantize_gptq(weight, hessian, [4] * E, 32))


@settings(max_examples=15, deadline=None, derandomize=True)
@given(
    seed=st.integers(0, 1000),
    K=st.integers(1, 70),
    bits=st.lists(st.integers(2, 8), min_size=1, max_size=3),
    method=st.sampled_from(METHODS),
    group_size=st.sampled_from([32, 64]),
)
def test_every_quantizer_gives_what_can_be_stored(
    seed: int, K: int, bits: list[int], method: str, group_size: int
) -> None:
    weight, hessian = experts(seed, len(bits), 5, K)
    quantized = quantize_experts(method, weight, hessian, bits, group_size)
    groups = (len(bits), 5, -(-K // group_size))
    assert quantized.codes.shape == weight.shape
    assert quantized.codes.dtype == torch.uint8
    assert quantized.scale.shape == quantized.zero_point.shape == groups
    assert torch.equal(quantized.scale.half().float(), quantized.scale)
    assert (quantized.scale > 0).all()
    for e, width in enumerate(bits):
        assert int(quantized.codes[e].max()) < 2**width
        byte = quantized.zero_point[e] * 2 ** (8 - width)
        assert torch.equal(byte.to(torch.uint8).float(), byte)
    assert torch.isfinite(quantized.dequantize()).all()


@pytest.mark.parametrize("method", METHODS)
def test_inputs_are_not_modified_and_results_repeat(method: str) -> None:
    weight, hessian = experts(7)
    weight.requires_grad_()
    before, hessian_before = weight.detach().clone(), hessian.clone()
    first = quantize_experts(method, weight, hessian, [2, 4, 8], 32)
    assert torch.equal(weight.detach(), before)
    assert torch.equal(hessian, hessian_before)
    assert not first.scale.requires_grad
    assert_equal(quantize_experts(method, weight, hessian, [2, 4, 8], 32), first)


@pytest.mark.parametrize("method", METHODS)
def test_bfloat16_and_strided_weights_are_taken(method: str) -> None:
    weight, hessian = experts(8)
    weight = weight.bfloat16()
    strided = weight.mT.contiguous().mT
    expected = quantize_experts(method, weight.float(), hessian, [4] * E, 32)
    assert_equal(quantize_experts(method, strided, hessian, [4] * E, 32), expected)


@pytest.mark.parametrize("scale", [2.0**-80, 2.0**60])
def test_the_size_of_a_hessian_does_not_matter_to_gptq(scale: float) -> None:
    weight, hessian = experts(9)
    assert_equal(quantize_gptq(weight, hessian * scale, [2] * E, 32), quantize_gptq(weight, hessian, [2] * E, 32))


@pytest.mark.parametrize("kind", ["zero", "rank one", "dead columns", "not positive definite", "one spike"])
def test_gptq_survives_degenerate_hessians(kind: str) -> None:
    weight, hessian = experts(10)
    if kind == "zero":
        hessian[0] = 0
    elif kind == "rank one":
        hessian[0] = torch.ones(K, K)
    elif kind == "dead columns":
        hessian[0, :40] = hessian[0, :, :40] = 0
    elif kind == "not positive definite":
        hessian[0, 0, 1] = hessian[0, 1, 0] = 1e6
    else:
        hessian[0, 7, 7] = 1e20
    quantized = quantize_gptq(weight, hessian, [4] * E, 32)
    restored = quantized.dequantize()
    assert torch.isfinite(restored).all()
    assert (restored - weight).abs().max() < weight.abs().max()
    healthy = quantize_gptq(weight[1:], hessian[1:], [4] * (E - 1), 32)
    assert_equal(take(quantized, [1, 2]), healthy)


def test_dead_columns_are_rounded_to_nearest() -> None:
    weight, hessian = experts(11)
    hessian[:, :32] = hessian[:, :, :32] = 0
    gptq = quantize_gptq(weight, hessian, [4] * E, 32, sweeps=0)
    nearest = quantize_rtn(weight, [4] * E, 32)
    assert torch.equal(gptq.codes[..., :32], nearest.codes[..., :32])


def test_rounding_to_nearest_weighs_channels_by_the_hessian() -> None:
    weight, hessian = experts(12)
    diagonal = torch.diag_embed(hessian.diagonal(dim1=-2, dim2=-1))
    weighted = output_error(weight, quantize_experts("rtn", weight, hessian, [2] * E, 32), diagonal)
    plain = output_error(weight, quantize_experts("rtn", weight, None, [2] * E, 32), diagonal)
    assert (weighted < plain).all()


def test_hqq_lowers_its_norm_from_where_it_starts() -> None:
    weight = torch.distributions.StudentT(3.0).sample((E, N, K))
    gain = []
    for bits in (2, 3, 4):
        start, end = quantize_rtn(weight, [bits] * E, 32), quantize_hqq(weight, [bits] * E, 32)
        assert torch.equal(start.scale, end.scale)
        before, after = (
            ((weight - q.dequantize()).abs() / q.scale.repeat_interleave(32, -1)[..., :K]).pow(0.7).sum(-1)
            for q in (start, end)
        )
        assert (after <= before * 1.0001).all()
        gain.append(float(after.sum() / before.sum()))
    assert min(gain) < 0.99


def test_hqq_does_not_depend_on_the_size_of_the_weights() -> None:
    weight, _ = experts(13)
    small, large = quantize_hqq(weight, [2, 3, 4], 32), quantize_hqq(weight * 1024, [2, 3, 4], 32)
    assert torch.equal(small.codes, large.codes)
    assert torch.equal(small.scale * 1024, large.scale)


@pytest.mark.parametrize("method", METHODS)
def test_wrong_weights_and_widths_are_errors(method: str) -> None:
    weight, hessian = experts()
    with pytest.raises(ValueError, match=r"`weight` must be \(experts, outputs, inputs\), got the shape \(24, 80\)"):
        quantize_experts(method, weight[0], hessian, [4], 32)
    with pytest.raises(ValueError, match="`bits` must have one width per expert, 3 of them, got 2"):
        quantize_experts(method, weight, hessian, [4, 4], 32)
    for width in (1, 9):
        with pytest.raises(ValueError, match=f"`bits` must be from 2 to 8, got {width} for expert 2"):
            quantize_experts(method, weight, hessian, [4, 4, width], 32)
    for size in (0, -32, 100):
        with pytest.raises(
            ValueError, match=rf"`group_size` must be one of \(32, 64, 128, 256, 512, 1024\), got {size}"
        ):
            quantize_experts(method, weight, hessian, [4] * E, size)
    for bad in (float("nan"), float("inf")):
        broken = weight.clone()
        broken[1, 2, 3] = bad
        with pytest.raises(ValueError, match="`weight` must be finite, that of expert 1 holds NaN or infinite"):
            quantize_experts(method, broken, hessian, [4] * E, 32)


@pytest.mark.parametrize("method", ["gptq", "rtn"])
def test_wrong_hessians_are_errors(method: str) -> None:
    weight, hessian = experts()
    with pytest.raises(ValueError, match=r"`hessian` must have the shape \(3, 80, 80\), .* got \(2, 80, 80\)"):
        quantize_experts(method, weight, hessian[:2], [4] * E, 32)
    hessian[2, 0, 0] = float("inf")
    with pytest.raises(ValueError, match="`hessian` must be finite, that of expert 2 holds NaN or infinite"):
        quantize_experts(method, weight, hessian, [4] * E, 32)


def test_wrong_options_are_errors() -> None:
    weight, hessian = experts()
    with pytest.raises(ValueError, match=r"`method` must be one of \['gptq', 'hqq', 'rtn'\], got 'awq'"):
        quantize_experts("awq", weight, hessian, [4] * E, 32)
    with pytest.raises(ValueError, match="`hessian` must be given for the method 'gptq', got None"):
        quantize_experts("gptq", weight, None, [4] * E, 32)
    with pytest.raises(ValueError, match=r"`damping` must not be negative, got -0\.1"):
        quantize_gptq(weight, hessian, [4] * E, 32, damping=-0.1)
    with pytest.raises(ValueError, match=r"`importance` must have the shape \(3, 80\), got \(80,\)"):
        quantize_rtn(weight, [4] * E, 32, torch.ones(K))
    with pytest.raises(ValueError, match="`norm` must be above 0 and at most 1, got 2"):
        quantize_hqq(weight, [4] * E, 32, norm=2.0)
    with pytest.raises(ValueError, match=r"`beta` must be positive and `kappa` at least 1, got 0\.0 and 1"):
        quantize_hqq(weight, [4] * E, 32, beta=0.0)
