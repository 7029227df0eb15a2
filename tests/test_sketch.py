"""Output errors known from a few columns: nearly the best directions, and a size that is honest about the rest."""

import pytest
import torch
from rule_cases import whole_master
from torch import Tensor

import moe_compiler.runtime.lowrank as lowrank_module
from moe_compiler.kernels.experts import PackedExpertLinear
from moe_compiler.passes.moments import Gram, RowMoments
from moe_compiler.passes.quantize import quantize_experts
from moe_compiler.runtime.lowrank import lowrank
from moe_compiler.runtime.quality import output_errors
from moe_compiler.runtime.sketch import OutputSketch, expected_outputs, orthonormal, sketch

OUTPUTS, CHANNELS, TOKENS, WIDTH = 320, 256, 200, 24


def correlated_rows(tokens: int, seed: int) -> Tensor:
    """Rows whose second moments fall off as those of activations do, slowly."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.linalg.qr(torch.randn(CHANNELS, CHANNELS, generator=generator)).Q
    spectrum = torch.arange(1, CHANNELS + 1) ** -0.4
    return (torch.randn(tokens, CHANNELS, generator=generator) * spectrum) @ mixing.t()


def start_of(rows: Tensor, error: Tensor, width: int = WIDTH) -> tuple[Tensor, Tensor]:
    gram = Gram(rows, torch.zeros(CHANNELS), is_hessian=False)
    block = torch.randn(CHANNELS, width, generator=torch.Generator().manual_seed(2))
    return expected_outputs(gram, error.square().sum(dim=0), block, torch.float32)


def case(seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed + 100)
    error = torch.randn(OUTPUTS, CHANNELS, generator=generator) * torch.rand(CHANNELS, generator=generator)
    return error, correlated_rows(TOKENS, seed)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_directions_hold_nearly_all_that_the_best_do(dtype: torch.dtype) -> None:
    error, rows = case()
    image = error @ rows.t()
    best = torch.linalg.svdvals(image).square()
    gain, outputs, directions, known = sketch(error.to(dtype), rows.to(dtype), start_of(rows, error)[1], 1)
    torch.testing.assert_close(outputs.t() @ outputs, torch.eye(WIDTH), rtol=0, atol=1e-4)
    held = (outputs[:, :8].t() @ image).square().sum(dim=1)
    assert float(held.sum()) > 0.98 * float(best[:8].sum())
    torch.testing.assert_close(gain[:8], held, rtol=0.02, atol=0)
    tolerance = {torch.float32: 1e-3, torch.bfloat16: 0.05}[dtype]
    torch.testing.assert_close(directions, outputs.t() @ error, rtol=0, atol=tolerance * float(directions.abs().max()))
    again = sketch(error.to(dtype), rows.to(dtype), start_of(rows, error)[1], 1)
    assert torch.equal(again[1], outputs)
    assert known.squared_error() == pytest.approx(float(best.sum()), rel=0.1)


def test_what_is_foretold_is_what_independent_errors_give() -> None:
    error, rows = case()
    gain, _ = start_of(rows, error, 64)
    exact = torch.linalg.svdvals(rows * error.square().sum(dim=0).sqrt()).square()
    assert float(gain[0]) == pytest.approx(float(exact[0]), rel=0.05)
    gram = Gram(rows.t() @ rows, torch.zeros(CHANNELS), is_hessian=True)
    block = torch.randn(CHANNELS, 64, generator=torch.Generator().manual_seed(2))
    same, _ = expected_outputs(gram, error.square().sum(dim=0), block, torch.float32)
    torch.testing.assert_close(same, gain, rtol=1e-3, atol=1e-4 * float(gain[0]))


def test_the_size_is_right_on_average_and_never_negative() -> None:
    error, rows = case()
    image = error @ rows.t()
    value = torch.randn(OUTPUTS, 3, generator=torch.Generator().manual_seed(1))
    seen = torch.randn(rows.shape[0], 3, generator=torch.Generator().manual_seed(2))
    value[:, 0], seen[:, 0] = image[:, :5].mean(dim=1), 0.2
    expected = [float(image.square().sum()), float((image - value @ seen.t()).square().sum())]
    whole = OutputSketch.whole(image)
    assert [whole.squared_error(), whole.squared_error(value, seen)] == pytest.approx(expected, rel=1e-5)
    start = start_of(rows, error)[1]
    found = []
    for seed in range(300):
        known = sketch(error, rows, start, seed)[3]
        found.append([known.squared_error(), known.squared_error(value, seen)])
    mean = torch.tensor(found, dtype=torch.float64).mean(dim=0).tolist()
    assert mean == pytest.approx(expected, rel=0.03)
    left, size, right = torch.linalg.svd(image, full_matrices=False)
    assert sketch(error, rows, start, 7)[3].squared_error(left * size, right.t()) >= 0


def test_columns_that_depend_on_each_other_become_zero() -> None:
    block = torch.randn(50, 3, generator=torch.Generator().manual_seed(0)) * 1e-15
    basis = orthonormal(orthonormal(torch.cat([block, block @ torch.ones(3, 1)], dim=1)))
    torch.testing.assert_close(basis.t() @ basis, torch.diag(torch.tensor([1.0, 1, 1, 0])), rtol=0, atol=1e-5)
    assert torch.equal(orthonormal(torch.zeros(9, 2)), torch.zeros(9, 2))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_lowrank_by_sketches_wins_what_the_exact_method_wins(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Experts of very unequal use, so that some win many times more slots than others."""
    generator = torch.Generator().manual_seed(4)
    weight = torch.randn(6, OUTPUTS, CHANNELS, generator=generator).to(dtype)
    quantized = quantize_experts("rtn", weight.float(), None, [2, 4, 2, 4, 2, 2], 128)
    packed = PackedExpertLinear.from_quantized(quantized, 48, 48)
    ids = torch.multinomial(torch.tensor([8.0, 8, 5, 4, 3, 1]), 1200, replacement=True, generator=generator)
    gate = torch.rand(1200, generator=generator) ** 3
    moments = RowMoments(correlated_rows(1200, 5).to(dtype), ids, gate, 6)
    master = whole_master(weight, packed)
    sketches: dict[int, OutputSketch] = {}
    pool = lowrank(master, packed, moments, sketches)
    assert any(known.basis is not None for known in sketches.values())
    before, after = output_errors(master, packed, [packed.pool, pool], moments)
    energy = torch.ones(6, CHANNELS)
    told = output_errors(master, packed, [packed.pool, pool], moments, None, sketches)
    assert told == pytest.approx([before, after], rel=0.05)
    assert all(one > 0 for one in output_errors(master, packed, [packed.pool, pool], moments, energy, sketches))
    monkeypatch.setattr(lowrank_module, "EXACT_ROWS", 400)
    best = output_errors(master, packed, [lowrank(master, packed, moments)], moments)[0]
    assert before - after > 0.98 * (before - best)
