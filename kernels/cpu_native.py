"""The packed linears as native code, for x86 CPUs with AVX512-VNNI, on the tile registers of AMX where there are some.

`cpu_native.cpp` is compiled by the host's C++ compiler on first use (a few seconds), kept in a cache folder, and called
through `ctypes`. Codes are bytes as they stand, and an input is three signed bytes: 23 bits, relative to the largest
number of its row. Their products are exact integers, which are scaled once for each group of channels. Other CPUs, and
hosts without a compiler, take the other kernels of `moe_compiler.kernels.cpu_packed`.
"""

from __future__ import annotations

import ctypes
import hashlib
import logging
import os
import shutil
import subprocess
import tempfile
import threading
from collections.abc import Sequence
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from moe_compiler.kernels.packed import PackedTensors
from moe_compiler.kernels.planes import TILE
from moe_compiler.kernels.reference import rows_per_input

logger = logging.getLogger(__name__)

SOURCES = (*sorted(Path(__file__).parent.glob("cpu_native*.h")), Path(__file__).with_name("cpu_native.cpp"))
CACHE_VARIABLE = "MOE_COMPILER_CACHE"
ACTIVATIONS = ("silu", "gelu", "gelu_tanh", "relu")
"""By their numbers in the native code."""

_FLAGS = (
    "-O3", "-march=native", "-std=c++17", "-fPIC", "-shared", "-fopenmp", "-w",
    "-fassociative-math", "-fno-signed-zeros", "-fno-trapping-math", "-fno-math-errno",
)  # fmt: skip
_NEEDED = {"avx512f", "avx512bw", "avx512dq", "avx512vl", "avx512_vnni", "f16c"}
_DTYPES = (torch.float32, torch.float16, torch.bfloat16)  # by their numbers in the native code
_POINTERS = (*PackedTensors._fields,)
_SIZES = ("out_features", "in_features", "groups", "group_size")
_compiling = threading.Lock()


class _Linear(ctypes.Structure):
    """`Linear` of `cpu_native.cpp`."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in _POINTERS),
        *((name, ctypes.c_int64) for name in _SIZES),
    )


_INT, _POINTER, _LINEAR = ctypes.c_int64, ctypes.c_void_p, ctypes.POINTER(_Linear)
_ARGUMENTS = {
    "packed_linear": (
        _LINEAR, _POINTER, _INT, _INT, _POINTER, _INT, _INT, _POINTER, _INT, _POINTER, _INT,
    ),
    "packed_experts": (
        _LINEAR, _LINEAR, _POINTER, _POINTER, _INT, _INT, _INT, _POINTER, _INT, _POINTER, _INT, _POINTER, _INT, _INT,
        _POINTER, _POINTER, _INT, _INT,
    ),
    "packed_experts_many": (
        _LINEAR, _LINEAR, _POINTER, _INT, _POINTER, _POINTER, _INT, _POINTER, _POINTER, _INT, _POINTER, _INT, _INT,
        _POINTER, _POINTER, _INT,
    ),
    "dequantize": (_LINEAR, _INT, _POINTER, _INT, _INT, _INT),
    "subtract_weight": (_LINEAR, _INT, _POINTER, _POINTER, _INT, _INT),
    "observe": (
        _POINTER, _INT, _INT, _INT, _POINTER, _POINTER, _INT, _POINTER, _POINTER, _POINTER, _POINTER, _INT,
    ),
}  # fmt: skip


def serves(x: Tensor, group_size: int) -> bool:
    """Whether the native kernels can take a call: its dtype, its groups, this CPU and its compiler."""
    return x.device.type == "cpu" and x.dtype in _DTYPES and group_size % TILE == 0 and library() is not None


def library() -> ctypes.CDLL | None:
    """The compiled kernels, or `None` where there is no such CPU, no compiler, or no right to its tile registers."""
    with _compiling:
        return _library()


@cache
def _library() -> ctypes.CDLL | None:
    compiler = os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++")
    flags = cpu_flags()
    if not flags >= _NEEDED or compiler is None:
        return None
    key = "\n".join((*(source.read_text() for source in SOURCES), *_FLAGS, *sorted(flags), compiler))
    name = f"cpu_native-{hashlib.sha256(key.encode()).hexdigest()[:16]}.so"
    folder = _cache_folder()
    path = folder / name
    try:
        if not path.exists():
            logger.info("compiling the native CPU kernels to %s", path)
            folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=folder) as work:
                command = [compiler, *_FLAGS, str(SOURCES[-1]), "-o", str(Path(work) / name)]
                subprocess.run(command, check=True, capture_output=True, text=True)
                (Path(work) / name).replace(path)
        native = ctypes.CDLL(str(path))
        for function, arguments in _ARGUMENTS.items():
            getattr(native, function).argtypes, getattr(native, function).restype = arguments, None
        return native
    except (OSError, subprocess.CalledProcessError) as error:
        reason = getattr(error, "stderr", None) or str(error)
        logger.warning("the native CPU kernels could not be compiled, slower ones run: %s", reason.strip()[:500])
        return None


def _cache_folder() -> Path:
    given = os.environ.get(CACHE_VARIABLE)
    if given:
        return Path(given)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "moe_compiler"


@cache
def cpu_flags() -> frozenset[str]:
    """The instruction sets of this CPU, as Linux names them; none elsewhere."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return frozenset()
    return frozenset(next((line.split(":", 1)[1].split() for line in lines if line.startswith("flags")), []))


def expert_linear(x: Tensor, expert_ids: Tensor, packed: PackedTensors, bias: Tensor | None, group_size: int) -> Tensor:
    """Expert linear over packed weights; arguments as in `moe_compiler.kernels.ops`.

    Returns:
        `(R, N)` float32, zero for ids of `E` or more.
    """
    x, expert_ids = x.contiguous(), expert_ids.contiguous()
    linear, kept = _describe(packed, x.shape[1], group_size)
    out = torch.empty(expert_ids.shape[0], packed.out_features)
    pointer, dtype, kept_bias = _numbers(bias)
    _loaded().packed_linear(
        linear, expert_ids.data_ptr(), expert_ids.shape[0], packed.num_experts, x.data_ptr(), _DTYPES.index(x.dtype),
        rows_per_input(x, expert_ids), pointer, dtype, out.data_ptr(), torch.get_num_threads(),
    )  # fmt: skip
    del kept, kept_bias
    return out


def experts(
    x: Tensor,
    top_k_index: Tensor,
    top_k_weights: Tensor,
    gate_up: PackedTensors,
    gate_up_bias: Tensor | None,
    down: PackedTensors,
    down_bias: Tensor | None,
    activation: str,
    group_size: int,
    dtype: torch.dtype,
    hidden: Tensor | None = None,
) -> Tensor:
    """All experts of a layer over packed weights; arguments as in `moe_compiler.kernels.ops`.

    `hidden`, `(R, I)` in the dtype of `x`, is where hidden states are put, but those of ids of `E` or more.

    Returns:
        `(T, H)` of `dtype`.
    """
    x, ids, weights = x.contiguous(), top_k_index.contiguous(), top_k_weights.float().contiguous()
    first, kept_first = _describe(gate_up, x.shape[1], group_size)
    second, kept_second = _describe(down, gate_up.out_features // 2, group_size)
    first_bias, first_dtype, kept_first_bias = _numbers(gate_up_bias)
    second_bias, second_dtype, kept_second_bias = _numbers(down_bias)
    out = torch.empty(x.shape[0], down.out_features, dtype=dtype)
    _loaded().packed_experts(
        first, second, ids.data_ptr(), weights.data_ptr(), *ids.shape, gate_up.num_experts, x.data_ptr(),
        _DTYPES.index(x.dtype), first_bias, first_dtype, second_bias, second_dtype, ACTIVATIONS.index(activation),
        None if hidden is None else hidden.data_ptr(), out.data_ptr(), _DTYPES.index(dtype), torch.get_num_threads(),
    )  # fmt: skip
    del kept_first, kept_second, kept_first_bias, kept_second_bias
    return out


def serves_many(x: Tensor, group_size: int) -> bool:
    """Whether `add_experts` can take a call: bfloat16, and the tile registers of AMX."""
    return x.dtype == torch.bfloat16 and serves(x, group_size) and bool(_loaded().has_many())


def add_experts(
    out: Tensor,
    many: Sequence[tuple[int, Tensor]],
    x: Tensor,
    top_k_weights: Tensor,
    gate_up: PackedTensors,
    gate_up_bias: Tensor | None,
    down: PackedTensors,
    down_bias: Tensor | None,
    activation: str,
    group_size: int,
    hidden: Tensor | None = None,
) -> None:
    """Adds experts with many rows to the output of a layer, one after the other.

    Args:
        out: `(T, H)` float32.
        many: experts and their rows, places in `top_k_weights`.
        x: `(T, H)` bfloat16.
        top_k_weights: `(T, k)`.
        gate_up: packed linear `(2I, H)`.
        gate_up_bias: `(E, 2I)`.
        down: packed linear `(H, I)`.
        down_bias: `(E, H)`.
        activation: one of `ACTIVATIONS`.
        group_size: input channels of one scale, a multiple of 128.
        hidden: `(R, I)` bfloat16, where these experts' hidden states are put.
    """
    x, weights = x.contiguous(), top_k_weights.float().contiguous()
    first, kept_first = _describe(gate_up, x.shape[1], group_size)
    second, kept_second = _describe(down, gate_up.out_features // 2, group_size)
    first_bias, first_dtype, kept_first_bias = _numbers(gate_up_bias)
    second_bias, second_dtype, kept_second_bias = _numbers(down_bias)
    table: list[int] = []
    start = 0
    for expert, rows in many:
        table += (expert, start, rows.shape[0])
        start += rows.shape[0]
    blocks, order = torch.tensor(table), torch.cat([rows for _, rows in many])
    _loaded().packed_experts_many(
        first, second, blocks.data_ptr(), len(many), order.data_ptr(), weights.data_ptr(), weights.shape[1],
        x.data_ptr(), first_bias, first_dtype, second_bias, second_dtype, ACTIVATIONS.index(activation),
        None if hidden is None else hidden.data_ptr(), out.data_ptr(), torch.get_num_threads(),
    )  # fmt: skip
    del kept_first, kept_second, kept_first_bias, kept_second_bias


def dequantize(
    packed: PackedTensors, expert: int, in_features: int, group_size: int, dtype: torch.dtype = torch.bfloat16
) -> Tensor:
    """The weight of one expert with the pool's channels, without its directions.

    Returns:
        `(N, K')` bfloat16, or float32 for any other `dtype`, with `K'` up to the next multiple of 128. Columns past
        `in_features` have no meaning but are finite.
    """
    linear, kept = _describe(packed, in_features, group_size)
    stride = -(-in_features // TILE) * TILE
    out = torch.empty(packed.out_features, stride, dtype=torch.bfloat16 if dtype == torch.bfloat16 else torch.float32)
    _loaded().dequantize(linear, expert, out.data_ptr(), _DTYPES.index(out.dtype), stride, torch.get_num_threads())
    del kept
    return out


def subtract_weight(original: Tensor, packed: PackedTensors, expert: int, group_size: int) -> Tensor:
    """What an original weight exceeds that of one expert by, which is `dequantize`'s.

    Args:
        original: `(N, K)` bfloat16 with `K` a multiple of 128.
        packed: the linear.
        expert: which expert.
        group_size: input channels of one scale, a multiple of 128.

    Returns:
        `(N, K)` bfloat16.
    """
    original = original.contiguous()
    linear, kept = _describe(packed, original.shape[1], group_size)
    out = torch.empty_like(original)
    _loaded().subtract_weight(
        linear, expert, original.data_ptr(), out.data_ptr(), original.shape[1], torch.get_num_threads()
    )
    del kept
    return out


def can_observe(x: Tensor) -> bool:
    """Whether `observe` can take these inputs."""
    return x.device.type == "cpu" and x.dtype in _DTYPES and library() is not None


def observe(x: Tensor, expert_ids: Tensor, first: Tensor, second: Tensor, abs_sum: Tensor, sq_sum: Tensor) -> None:
    """Adds `Σ_r first[r] · |x_r|` and `Σ_r second[r] · x_r²` over each expert's rows to sums.

    Args:
        x: `(T, K)` or `(R, K)`.
        expert_ids: `(R,)` int64; ids of `E` or more are in no sum.
        first: `(R,)` float32.
        second: `(R,)` float32.
        abs_sum: `(E, K)` float64, contiguous.
        sq_sum: `(E, K)` float64, contiguous.
    """
    x, experts = x.contiguous(), abs_sum.shape[0]
    order = torch.argsort(expert_ids, stable=True)
    starts = torch.zeros(experts + 1, dtype=torch.int64)
    torch.cumsum(torch.bincount(expert_ids, minlength=experts)[:experts], dim=0, out=starts[1:])
    first, second = first[order], second[order]
    _loaded().observe(
        x.data_ptr(), _DTYPES.index(x.dtype), x.shape[1], rows_per_input(x, expert_ids), order.data_ptr(),
        starts.data_ptr(), experts, first.data_ptr(), second.data_ptr(), abs_sum.data_ptr(), sq_sum.data_ptr(),
        torch.get_num_threads(),
    )  # fmt: skip


def _loaded() -> ctypes.CDLL:
    native = library()
    assert native is not None
    return native


def _describe(packed: PackedTensors, in_features: int, group_size: int) -> tuple[_Linear, PackedTensors]:
    """The structure, and the contiguous tensors that it points to."""
    kept = PackedTensors(*(tensor.contiguous() for tensor in packed))
    pointers = (tensor.data_ptr() for tensor in kept)
    return _Linear(*pointers, packed.out_features, in_features, packed.scale.shape[2], group_size), kept


def _numbers(bias: Tensor | None) -> tuple[int | None, int, Tensor | None]:
    """Address and dtype of a bias, and the tensor that is there."""
    if bias is None:
        return None, 0, None
    bias = (bias if bias.dtype in _DTYPES else bias.float()).contiguous()
    return bias.data_ptr(), _DTYPES.index(bias.dtype), bias
