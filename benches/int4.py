"""4-bit expert linears of other projects: ATen's on the CPU, GemLite's on a GPU where that is installed."""

from __future__ import annotations

import importlib
import importlib.util
from typing import Any, Protocol

import torch
from torch import Tensor

GROUP_SIZE = 128


class ExpertLinear(Protocol):
    """One linear `(N, K)` of each of `E` experts, in 4 bits.

    Attributes:
        dtype: of its activations.
    """

    dtype: torch.dtype

    def __call__(self, x: Tensor, expert: int) -> Tensor:
        """The linear of one expert; `x` `(M, K)`."""
        ...


class AtenLinear:
    """ATen's packed 4-bit matrix product on the CPU, one random weight `(N, K)` for each of `E` experts.

    Weights are in the form that `torch.ops.aten._convert_weight_to_int4pack_for_cpu` gives: the first is converted,
    the others are random bytes of its shape.
    """

    dtype = torch.bfloat16

    def __init__(self, num_experts: int, out_features: int, in_features: int) -> None:
        codes = torch.randint(0, 16, (out_features, in_features), dtype=torch.int32)
        first = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes, 2)
        self.packed = torch.randint(0, 256, (num_experts, *first.shape), dtype=first.dtype)
        self.packed[0] = first
        groups = in_features // GROUP_SIZE
        scale = torch.full((num_experts, groups, out_features, 1), 0.2 * in_features**-0.5)
        self.scale_and_zero = torch.cat([scale, torch.zeros_like(scale)], dim=3).to(self.dtype)

    def __call__(self, x: Tensor, expert: int) -> Tensor:
        """The linear of one expert; `x` `(M, K)` bfloat16."""
        out: Tensor = torch.ops.aten._weight_int4pack_mm_for_cpu(
            x, self.packed[expert], GROUP_SIZE, self.scale_and_zero[expert]
        )
        return out


class GemliteLinear:
    """GemLite's `GemLiteLinear`, one of random weights per expert.

    Method: github.com/mobiusml/gemlite, README and tests/test_gemlitelineartriton.py.
    """

    dtype = torch.float16

    def __init__(self, num_experts: int, out_features: int, in_features: int, device: torch.device) -> None:
        core = importlib.import_module("gemlite.core")
        self.layers: list[Any] = []
        for _ in range(num_experts):
            codes = torch.randint(0, 16, (out_features, in_features), dtype=torch.uint8, device=device)
            groups = codes.numel() // GROUP_SIZE
            scale = torch.full((groups, 1), 0.2 * in_features**-0.5, dtype=self.dtype, device=device)
            layer = core.GemLiteLinear(
                4,
                group_size=GROUP_SIZE,
                in_features=in_features,
                out_features=out_features,
                input_dtype=core.DType.FP16,
                output_dtype=core.DType.FP16,
            )
            layer.pack(codes, scale, torch.full_like(scale, 7.5), None)
            self.layers.append(layer)

    def __call__(self, x: Tensor, expert: int) -> Tensor:
        """The linear of one expert; `x` `(M, K)` float16."""
        out: Tensor = self.layers[expert](x)
        return out


class Unusable:
    """In place of a linear that could not be made: says why when it is called."""

    dtype = torch.float16

    def __init__(self, reason: Exception) -> None:
        self.reason = reason

    def __call__(self, x: Tensor, expert: int) -> Tensor:
        """Raises the reason."""
        raise RuntimeError(str(self.reason)) from self.reason


def available(num_experts: int, out_features: int, in_features: int, device: torch.device) -> dict[str, ExpertLinear]:
    """The 4-bit linears that run on `device`, by name, with random weights."""
    if device.type == "cpu":
        return {"int4 ATen": AtenLinear(num_experts, out_features, in_features)}
    if importlib.util.find_spec("gemlite") is None:
        return {}
    try:
        return {"int4 gemlite": GemliteLinear(num_experts, out_features, in_features, device)}
    except Exception as error:  # another project's failure is a line of the table, not the end of the bench
        return {"int4 gemlite": Unusable(error)}


def int4_bytes(bf16_bytes: int) -> int:
    """Bytes of 4-bit codes with a 16-bit scale and zero point per group, for weights of `bf16_bytes`."""
    return int(bf16_bytes / 4 * (1 + 8 / GROUP_SIZE))
