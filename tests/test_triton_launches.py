"""What the launchers ask of a GPU, at the sizes of large models: grids, compiled variants, offsets, the device."""

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import triton
import triton.language as tl
from kernel_launches import meta
from torch import Tensor
from triton.runtime.interpreter import GridExecutor, InterpretedFunction

from moe_compiler.kernels import cuda, triton_experts
from moe_compiler.kernels.packed import PackedTensors
from moe_compiler.kernels.tiles import Schedule, Tile
from moe_compiler.kernels.triton_epilogue import clear_foreign_rows

EXPERTS, HIDDEN, INTERMEDIATE, TOP_K, GROUP = 128, 4096, 1536, 8, 128  # Qwen3-235B-A22B
SMALL, LARGE = Tile(16, 8, 1, 2), Tile(64, 64, 8, 3)
SCHEDULES = {
    "direct": Schedule("decode", True, False, SMALL, SMALL),
    "decode": Schedule("decode", False, True, SMALL, SMALL),
    "prefill": Schedule("prefill", False, False, LARGE, LARGE),
    "dense": Schedule("dense", False, False, LARGE, LARGE),
}


@dataclass(frozen=True)
class Launch:
    """One launch: the kernel, its grid, and its integers that Triton would compile variants for."""

    name: str
    grid: tuple[int, ...]
    specialized: tuple[str, ...]


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> list[Launch]:
    """Filled by every launch, which runs nothing."""
    found: list[Launch] = []

    def run(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        parameters = inspect.signature(self.fn).parameters
        given = dict(zip(parameters, args, strict=False)) | kwargs
        constant = {name for name, one in parameters.items() if one.annotation == "tl.constexpr"}
        free = constant | set(self.kwargs.get("do_not_specialize") or ())
        integers = tuple(name for name in parameters if isinstance(given.get(name), int) and name not in free)
        found.append(Launch(self.fn.__name__, tuple(grid), integers))

    monkeypatch.setattr(InterpretedFunction, "run", run)
    return found


def packed(out_features: int, in_features: int, slots: int, directions: int) -> PackedTensors:
    groups = in_features // GROUP
    return PackedTensors(
        planes=meta(EXPERTS * out_features * in_features // 2, dtype=torch.int16),
        table=meta(EXPERTS, 2, dtype=torch.int32),
        scale=meta(EXPERTS, out_features, groups, dtype=torch.float16),
        zero_point=meta(EXPERTS, out_features, groups, dtype=torch.uint8),
        pool_offset=meta(EXPERTS + 1, dtype=torch.int32),
        pool_index=meta(slots, dtype=torch.int32),
        pool_value=meta(slots, out_features, dtype=torch.int8),
        pool_scale=meta(slots, dtype=torch.float32),
        pool_direction=meta(directions, in_features, dtype=torch.int8),
    )


def run_layer(schedule: Schedule, tokens: int) -> None:
    x = meta(tokens, HIDDEN, dtype=torch.bfloat16)
    index, weights = meta(tokens, TOP_K, dtype=torch.int64), meta(tokens, TOP_K, dtype=torch.float32)
    first, second = packed(2 * INTERMEDIATE, HIDDEN, 5000, 64), packed(HIDDEN, INTERMEDIATE, 2000, 64)
    cuda.run_experts(schedule, x, index, weights, first, None, second, None, "silu", GROUP)


@pytest.mark.parametrize("path", SCHEDULES)
def test_grids_stay_within_the_limits_of_a_gpu(path: str, launches: list[Launch]) -> None:
    """The first dimension may have 2**31 - 1 blocks, the others 65,535, and Triton multiplies all in 32 bits."""
    run_layer(SCHEDULES[path], 4 if path == "direct" else 1 << 20)
    assert launches
    for launch in launches:
        assert all(size <= 65_535 for size in launch.grid[1:]), launch
        blocks = 1
        for size in launch.grid:
            blocks *= size
        assert 0 < blocks < 1 << 31, launch


@pytest.mark.parametrize("path", SCHEDULES)
def test_the_number_of_tokens_compiles_nothing_anew(path: str, launches: list[Launch]) -> None:
    """Triton compiles an integer argument that is 1, or divisible by 16, apart, unless it is told not to."""
    run_layer(SCHEDULES[path], 16)
    assert not [launch for launch in launches if launch.specialized]


@triton.jit
def _clear(out: tl.tensor, order: tl.tensor, offsets: tl.tensor, N: tl.constexpr) -> None:
    columns = tl.arange(0, 16)
    clear_foreign_rows(out, order, offsets, 1, 0, columns, columns < N, 0, N, 1)


def test_rows_beyond_two_to_the_31_elements_are_cleared(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(GridExecutor, "_restore_args_dev", lambda *_: None)  # the tensor's unused pages stay unused
    width, row = 1 << 14, (1 << 17) + 3
    out = torch.empty(row + 1, width, dtype=torch.int8)
    out[row, :16] = 1
    _clear[(1,)](out, torch.tensor([row], dtype=torch.int32), torch.zeros(1, dtype=torch.int32), N=width)
    assert not out[row, :16].any()


def test_the_path_for_many_tokens_needs_blocks() -> None:
    weight, ids = packed(64, 128, 0, 0), meta(3, dtype=torch.int64)
    with pytest.raises(ValueError, match="`blocks` must be given on the path 'prefill', but is None"):
        triton_experts.linear("prefill", meta(3, 128, dtype=torch.float16), ids, None, weight, None, GROUP, LARGE)


def test_operators_launch_on_the_device_of_their_tensors(monkeypatch: pytest.MonkeyPatch) -> None:
    current: list[Tensor | None] = [None]

    @contextmanager
    def device_of(tensor: Tensor) -> Iterator[None]:
        current[0] = tensor
        yield
        current[0] = None

    def launched(x: Tensor) -> Tensor:
        assert current[0] is x
        return x

    monkeypatch.setattr(torch.cuda, "device_of", device_of)
    monkeypatch.setattr(cuda, "run_experts", lambda _, x, *__: launched(x))
    monkeypatch.setattr(triton_experts, "linear", lambda _, x, *__: launched(x))
    monkeypatch.setattr(cuda, "linear_dense", lambda x, *_: launched(x))
    monkeypatch.setattr(cuda, "route", lambda *_: launched(x))
    x, weight = meta(2, 128, dtype=torch.float16), packed(64, 128, 0, 0)
    index = meta(2, TOP_K, dtype=torch.int64)
    assert (
        cuda.packed_experts(x, index, meta(2, TOP_K, dtype=torch.float16), weight, None, weight, None, "silu", 128) is x
    )
    for schedule in SCHEDULES.values():
        monkeypatch.setattr(cuda, "choose_schedule", lambda *_, schedule=schedule, **__: schedule)
        assert cuda.packed_expert_linear(x, index.reshape(-1), weight, None, 128) is x
