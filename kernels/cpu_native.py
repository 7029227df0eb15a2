"""The packed linears as native code, for x86 CPUs with AVX512-BF16, on the tile registers of AMX where there are some.

`cpu_native.cpp` is compiled by the host's C++ compiler on first use (a few seconds), kept in a cache folder, and called
through `ctypes`. It multiplies bfloat16 numbers: a float16 or float32 input is split into two or three bfloat16 parts
that add up to it, which are rows more of the same expert. Other CPUs, and hosts without a compiler, take the kernels of
`moe_compiler.kernels.cpu_packed`.
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

logger = logging.getLogger(__name__)

SOURCE = Path(__file__).with_name("cpu_native.cpp")
CACHE_VARIABLE = "MOE_COMPILER_CACHE"
MAX_ROWS = 16
"""Most rows of a block in the native code."""

_FLAGS = (
    "-O3", "-march=native", "-std=c++17", "-fPIC", "-shared", "-fopenmp", "-w",
    "-fassociative-math", "-fno-signed-zeros", "-fno-trapping-math", "-fno-math-errno",
)  # fmt: skip
_NEEDED = {"avx512f", "avx512bw", "avx512dq", "avx512vl", "avx512_bf16", "f16c"}
_PARTS = {torch.bfloat16: 1, torch.float16: 2, torch.float32: 3}
_POINTERS = (*PackedTensors._fields,)
_SIZES = ("out_features", "in_features", "groups", "group_size")
_compiling = threading.Lock()


class _Linear(ctypes.Structure):
    """`Linear` of `cpu_native.cpp`."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in _POINTERS),
        *((name, ctypes.c_int64) for name in _SIZES),
    )


def serves(x: Tensor, group_size: int) -> bool:
    """Whether the native kernels can take a call: its dtype, its groups, this CPU and its compiler."""
    return x.device.type == "cpu" and x.dtype in _PARTS and group_size % TILE == 0 and library() is not None


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
    key = "\n".join((SOURCE.read_text(), *_FLAGS, *sorted(flags), compiler))
    name = f"cpu_native-{hashlib.sha256(key.encode()).hexdigest()[:16]}.so"
    folder = _cache_folder()
    path = folder / name
    try:
        if not path.exists():
            logger.info("compiling the native CPU kernels to %s", path)
            folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=folder) as work:
                command = [compiler, *_FLAGS, str(SOURCE), "-o", str(Path(work) / name)]
                subprocess.run(command, check=True, capture_output=True, text=True)
                (Path(work) / name).replace(path)
        native = ctypes.CDLL(str(path))
        return native if native.prepare() else None
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


def few_rows(packed: PackedTensors, blocks: Sequence[tuple[int, int]], x: Tensor, group_size: int) -> Tensor:
    """Rows of experts' linears, channel pool included.

    Args:
        packed: packed linear `(N, K)` of `E` experts.
        blocks: expert and number of rows of each block, in the order of the rows.
        x: `(R, K)` bfloat16, float16 or float32, the rows of all blocks.
        group_size: input channels of one scale, a multiple of 128.

    Returns:
        `(R, N)` float32.
    """
    native = library()
    assert native is not None
    parts = _PARTS[x.dtype]
    rows = _split(x, parts)  # (parts, R, K')
    if parts > 1:
        rows = rows.transpose(0, 1).flatten(0, 1).contiguous()  # the parts of a row follow each other
    stride = rows.shape[-1]
    rows = rows.view(-1, stride)
    table: list[int] = []
    start = 0
    for expert, count in blocks:
        left = count * parts  # a block may end between two parts of a row: they are added up afterwards
        while left:
            size = min(left, MAX_ROWS)
            table += (expert, start, size)
            start += size
            left -= size
    linear, kept = _describe(packed, x.shape[1], group_size)
    most = max(1, packed.pool_index.shape[0])
    if packed.pool_index.shape[0]:
        most = max(1, int(packed.pool_offset.diff().max()))
    order = torch.tensor(table, dtype=torch.int64)
    tiles = torch.empty(len(table) // 3, MAX_ROWS, stride, dtype=torch.bfloat16)
    sums = torch.empty(len(table) // 3, packed.scale.shape[2], MAX_ROWS)
    slots = torch.empty(rows.shape[0], most)
    out = torch.empty(rows.shape[0], packed.out_features)
    native.packed_rows(
        ctypes.byref(linear), _pointer(order), ctypes.c_int64(len(table) // 3), _pointer(rows), ctypes.c_int64(stride),
        _pointer(tiles), _pointer(sums), _pointer(slots), ctypes.c_int64(most), _pointer(out),
        ctypes.c_int64(torch.get_num_threads()),
    )  # fmt: skip
    del kept
    return out if parts == 1 else out.view(-1, parts, packed.out_features).sum(dim=1)


def dequantize(packed: PackedTensors, expert: int, in_features: int, group_size: int) -> Tensor:
    """The weight of one expert with the pool's channels, without its directions, `(N, K')` bfloat16 with `K'` up
    to the next multiple of 128.

    Columns past `in_features` have no meaning but are finite.
    """
    native = library()
    assert native is not None
    linear, kept = _describe(packed, in_features, group_size)
    stride = -(-in_features // TILE) * TILE
    out = torch.empty(packed.out_features, stride, dtype=torch.bfloat16)
    native.dequantize(
        ctypes.byref(linear), ctypes.c_int64(expert), _pointer(out), ctypes.c_int64(stride),
        ctypes.c_int64(torch.get_num_threads()),
    )  # fmt: skip
    del kept
    return out


def _split(x: Tensor, parts: int) -> Tensor:
    """`x` as a sum of bfloat16 numbers `(parts, R, K')`, zeros up to the next multiple of 128 channels."""
    padding = -x.shape[1] % TILE
    if parts == 1 and not padding:
        return x.contiguous()[None]
    out = x.new_zeros(parts, x.shape[0], x.shape[1] + padding, dtype=torch.bfloat16)
    rest = x
    for part in range(parts):
        out[part, :, : x.shape[1]] = rest
        if part + 1 < parts:
            rest = rest.float() - out[part, :, : x.shape[1]].float()
    return out


def _describe(packed: PackedTensors, in_features: int, group_size: int) -> tuple[_Linear, PackedTensors]:
    """The structure, and the contiguous tensors that it points to."""
    kept = PackedTensors(*(tensor.contiguous() for tensor in packed))
    pointers = {name: tensor.data_ptr() for name, tensor in kept._asdict().items()}
    sizes = dict(zip(_SIZES, (packed.out_features, in_features, packed.scale.shape[2], group_size), strict=True))
    return _Linear(**pointers, **sizes), kept


def _pointer(tensor: Tensor) -> ctypes.c_void_p:
    return ctypes.c_void_p(tensor.data_ptr())
