"""What runs on a GPU, tried on a CPU under Triton's interpreter: every path of a schedule gives the oracle's result."""

import logging
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from packed import random_packed
from torch import Tensor

from moe_compiler.kernels import cpu, cuda, ops
from moe_compiler.kernels.reference import packed_expert_linear_reference, packed_experts_reference
from moe_compiler.kernels.tiles import Schedule, Tile

SMALL, LARGE = Tile(16, 8, 1, 2), Tile(16, 16, 4, 2)
SCHEDULES = {
    "direct": Schedule("decode", True, False, SMALL, SMALL),
    "decode": Schedule("decode", False, False, SMALL, SMALL),
    "decode, atomic": Schedule("decode", False, True, SMALL, SMALL),
    "prefill": Schedule("prefill", False, False, LARGE, LARGE),
    "dense": Schedule("dense", False, False, LARGE, LARGE),
}
BITS = [2, 8, 4, 6]


def arguments(dtype: torch.dtype = torch.float16, directions: int = 0) -> tuple:
    gate_up = random_packed(BITS, 48, 64, slots=6, directions=directions, seed=1)
    down = random_packed(BITS[::-1], 64, 24, slots=3, directions=directions, seed=2)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(4, 64, generator=generator).to(dtype) / 8
    index = torch.randint(0, 5, (4, 2), generator=generator)  # 4 is another rank's
    weights = torch.rand(4, 2, generator=generator)
    biases = [torch.randn(4, n, generator=generator).to(dtype) for n in (48, 64)]
    return (x, index, weights, list(gate_up.tensors), biases[0], list(down.tensors), biases[1], "silu", 32)


def close(actual: Tensor, expected: Tensor) -> bool:
    return actual.dtype == expected.dtype and float((actual - expected).abs().max() / expected.abs().max()) < 1e-2


@pytest.mark.parametrize(
    ("name", "directions"), [("direct", 0), ("decode", 3), ("decode, atomic", 0), ("prefill", 3), ("dense", 3)]
)
def test_every_path_gives_the_same_result(name: str, directions: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda, "choose_schedule", lambda *_, **__: SCHEDULES[name])
    given = arguments(directions=directions)
    assert close(cuda.packed_experts(*given), packed_experts_reference(*given))
    x, index, _, gate_up, bias, *_, group_size = given
    linear = (x, index.reshape(-1), gate_up, bias, group_size)
    assert close(cuda.packed_expert_linear(*linear), packed_expert_linear_reference(*linear))


def test_the_table_of_the_package_serves_a_small_batch() -> None:
    given = arguments(torch.bfloat16)
    assert close(cuda.packed_experts(*given), packed_experts_reference(*given))


def test_pytorch_can_ask_for_the_same_bits_every_time(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    kernels = SimpleNamespace(
        gate_up=lambda _, x, *__: x, down=lambda _, h, *__, deterministic: asked.append(deterministic) or h
    )
    monkeypatch.setattr(cuda, "triton_experts", kernels)
    monkeypatch.setattr(cuda, "choose_schedule", lambda *_, **__: replace(SCHEDULES["direct"], atomic=True))
    given = arguments()
    cuda.packed_experts(*given)
    monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: True)
    cuda.packed_experts(*given)
    assert asked == [False, True]


def test_a_workspace_that_is_too_large_is_not_made(monkeypatch: pytest.MonkeyPatch) -> None:
    packed = random_packed(BITS, 48, 64)
    x, ids = torch.randn(4, 64).half(), torch.arange(4)
    monkeypatch.setattr(cuda, "choose_schedule", lambda *_, exclude=None: SCHEDULES["decode" if exclude else "dense"])
    assert cuda._schedule(x, ids, packed.tensors, 64).path == "dense"
    monkeypatch.setattr(cuda, "MAX_WORKSPACE_BYTES", 4 * 48 * 64 * 2 - 1)
    assert cuda._schedule(x, ids, packed.tensors, 64).path == "decode"


def test_float32_runs_as_plain_pytorch() -> None:
    given = arguments(torch.float32)
    assert torch.equal(cuda.packed_experts(*given), cpu.packed_experts(*given))
    x, index, _, gate_up, bias, *_, group_size = given
    linear = (x, index.reshape(-1), gate_up, bias, group_size)
    assert torch.equal(cuda.packed_expert_linear(*linear), cpu.packed_expert_linear(*linear))


def test_without_triton_a_gpu_runs_plain_pytorch_and_says_so(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def missing(name: str) -> None:
        raise ModuleNotFoundError("No module named 'triton'", name="triton")

    monkeypatch.setattr(ops.importlib, "import_module", missing)
    ops._cuda_kernels.cache_clear()
    with caplog.at_level(logging.WARNING):
        assert ops._cuda_kernels() is cpu
    assert "Triton is not installed" in caplog.text
    ops._cuda_kernels.cache_clear()
