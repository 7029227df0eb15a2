"""Buffers whose dtype is part of the format: `.half()` or `.to(torch.bfloat16)` must move, never round them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

_INTEGER_VIEW = {torch.float16: torch.int16, torch.float32: torch.int32, torch.float64: torch.int64}


class FixedDtypeBuffers(nn.Module):
    """A module whose own floating-point buffers keep their dtype.

    `nn.Module.to(dtype)` converts every floating-point tensor it meets. Here the buffers are shown to it as integers
    of the same size, which it moves between devices but does not convert. Parameters and child modules are not
    affected.
    """

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        dtypes = {
            name: buffer.dtype
            for name, buffer in self._buffers.items()
            if buffer is not None and buffer.dtype in _INTEGER_VIEW
        }
        self._view_buffers({name: _INTEGER_VIEW[dtype] for name, dtype in dtypes.items()})
        try:
            return super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        finally:
            self._view_buffers(dtypes)

    def _view_buffers(self, dtypes: dict[str, torch.dtype]) -> None:
        for name, dtype in dtypes.items():
            buffer = self._buffers[name]
            assert buffer is not None
            self._buffers[name] = buffer.view(dtype)
