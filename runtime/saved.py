"""The file of a saved model that holds what its run time knows of the original weights and the calibration data.

It is in the safetensors format; its metadata hold a JSON header. Whole original weights are not in it: they are in the
model that was compiled, and `Runtime.attach_master` finds them there.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from moe_compiler.kernels.experts import PackedExpertLinear
from moe_compiler.runtime.adaptation import RuntimeLayer
from moe_compiler.runtime.master import CacheMaster, DetachedMaster, LinearMaster

FORMAT_VERSION = 1
_HEADER = "moe_compiler.runtime"
_COUNT = "calibration_count"


@dataclass(frozen=True)
class SavedLayer:
    """What is saved of one `RuntimeLayer`; see there."""

    masters: Mapping[str, LinearMaster]
    calibration_count: Tensor
    top_k: int


def write_layers(layers: Mapping[str, RuntimeLayer], path: Path, fingerprint: str) -> None:
    """Writes what the run time knows of a model's layers.

    Args:
        layers: the layers by path.
        path: the file.
        fingerprint: the model's, see `moe_compiler.runtime.profile.fingerprint`.

    Raises:
        OSError: the file could not be written.
    """
    tensors: dict[str, Tensor] = {}
    linears: dict[str, dict[str, Any]] = {}
    for block, layer in layers.items():
        tensors[f"{block}.{_COUNT}"] = layer.calibration_count
        linears[block] = {}
        for name, master in layer.masters.items():
            linears[block][name] = str(master.dtype).removeprefix("torch.")
            parts = {"error": master.error, "column_norm": master.column_norm}
            if isinstance(master, CacheMaster):
                parts |= {"kept_places": master.kept_places, "kept_columns": master.kept_columns}
            tensors |= {f"{block}.{name}.{part}": tensor for part, tensor in parts.items()}
    header = {
        "format_version": FORMAT_VERSION,
        "fingerprint": fingerprint,
        "dtypes": linears,
        "top_k": {block: layer.top_k for block, layer in layers.items()},
    }
    contiguous = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    safetensors.torch.save_file(contiguous, path, {_HEADER: json.dumps(header)})


def read_layers(
    path: Path, packed: Mapping[str, Mapping[str, PackedExpertLinear]], fingerprint: str
) -> dict[str, SavedLayer]:
    """Reads what `write_layers` wrote.

    Args:
        path: the file.
        packed: the packed linears of the model that it must fit, by path and name.
        fingerprint: the model's.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is damaged, of another version or of another model: names file and reason.
    """
    if not path.is_file():
        raise FileNotFoundError(f"the saved model is not complete: {path} does not exist")
    try:
        with safe_open(path, framework="pt") as file:
            header = json.loads((file.metadata() or {})[_HEADER])
            if header["format_version"] != FORMAT_VERSION:
                raise ValueError(f"its `format_version` must be {FORMAT_VERSION}, but is {header['format_version']!r}")
            if header["fingerprint"] != fingerprint:
                raise ValueError("it belongs to another model")
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        return {block: _layer(block, linears, header, tensors) for block, linears in packed.items()}
    except (SafetensorError, KeyError, TypeError, AttributeError, ValueError) as error:
        reason = f"it lacks {error}" if isinstance(error, KeyError) else str(error)
        raise ValueError(f"{path} cannot be read: {reason}") from error


def _layer(
    block: str, linears: Mapping[str, PackedExpertLinear], header: Mapping[str, Any], tensors: Mapping[str, Tensor]
) -> SavedLayer:
    masters: dict[str, LinearMaster] = {}
    experts = 0
    for name, one in linears.items():
        key, experts = f"{block}.{name}", one.num_experts
        error, norm = tensors[f"{key}.error"], tensors[f"{key}.column_norm"]
        if error.shape != (experts, one.in_features) or norm.shape != error.shape:
            raise ValueError(f"`{key}` must be {(experts, one.in_features)}, but is {tuple(error.shape)}")
        if f"{key}.kept_places" in tensors:
            kept = tensors[f"{key}.kept_places"], tensors[f"{key}.kept_columns"]
            masters[name] = CacheMaster(error, norm, *kept)
        else:
            masters[name] = DetachedMaster(error, norm, _dtype(header["dtypes"][block][name]))
    count = tensors[f"{block}.{_COUNT}"]
    if count.shape != (experts,):
        raise ValueError(f"`{block}.{_COUNT}` must be {(experts,)}, but is {tuple(count.shape)}")
    return SavedLayer(masters, count, int(header["top_k"][block]))


def _dtype(name: str) -> torch.dtype:
    found = getattr(torch, name, None)
    if not isinstance(found, torch.dtype):
        raise ValueError(f"{name!r} is no dtype")
    return found
