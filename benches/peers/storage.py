"""How many bits an expert weight takes in what a quantizer stores: codes, scales, zero points, indices, padding.

Needs PyTorch and safetensors alone, so that it runs in the peers' virtual environments.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor, nn

EXPERT = re.compile(r"\.experts\.")
"""Modules and parameters below a module `experts` are the experts', as transformers names them."""


@dataclass(frozen=True)
class Storage:
    """What the experts of a model take.

    Attributes:
        weights: expert weights of the original model.
        size_bytes: bytes that stand for them, without those that follow from the shapes.
        derivable_bytes: bytes of tensors that follow from the shapes.
    """

    weights: int
    size_bytes: int
    derivable_bytes: int = 0

    @property
    def effective_bits(self) -> float:
        """Bits per expert weight, without what follows from the shapes."""
        return 8 * self.size_bytes / self.weights

    @property
    def derivable_bits(self) -> float:
        """Bits per expert weight that are stored besides, though they follow from the shapes."""
        return 8 * self.derivable_bytes / self.weights


def is_trivial_group_index(name: str, tensor: Tensor) -> bool:
    """Whether a tensor is a `g_idx` whose groups are runs of equal length in order, `0 … 0 1 … 1 …`.

    GPTQ's format stores the group of every input channel. Without reordering (`desc_act=False`) it says nothing.
    """
    if not name.endswith("g_idx") or tensor.dim() != 1 or not tensor.numel():
        return False
    groups = int(tensor.max()) + 1
    if tensor.numel() % groups:
        return False
    plain = torch.arange(groups, device=tensor.device).repeat_interleave(tensor.numel() // groups)
    return bool(torch.equal(tensor.long(), plain))


def count_storage(tensors: Iterable[tuple[str, Tensor]], weights: int) -> Storage:
    """Counts the bytes of the tensors that stand for the experts.

    Args:
        tensors: all that is stored for the experts, by name.
        weights: expert weights of the original model.

    Raises:
        ValueError: there are no tensors or no weights.
    """
    sizes = {False: 0, True: 0}
    for name, tensor in tensors:
        sizes[is_trivial_group_index(name, tensor)] += tensor.numel() * tensor.element_size()
    if not any(sizes.values()) or weights <= 0:
        raise ValueError(f"experts must have bytes and weights to count, but there are {sizes[False]} and {weights}")
    return Storage(weights, sizes[False], sizes[True])


def expert_tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Parameters and buffers of the experts of a model in memory."""
    yield from _of_experts(model.named_parameters())
    yield from _of_experts(model.named_buffers())


def _of_experts(named: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
    return ((name, tensor) for name, tensor in named if EXPERT.search(name))


def checkpoint_expert_tensors(folder: Path) -> Iterator[tuple[str, Tensor]]:
    """Tensors of the experts in the safetensors files of a checkpoint.

    Raises:
        FileNotFoundError: the folder has no such file.
    """
    files = sorted(folder.rglob("*.safetensors"))
    if not files:
        raise FileNotFoundError(f"`{folder}` must hold safetensors files, but has none")
    for path in files:
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 - not a mapping
                if EXPERT.search(name):
                    yield name, file.get_tensor(name)


def expert_matrices(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Every expert's matrices `(N, K)`, as views: a fused parameter `(E, N, K)` gives `E` of them."""
    for name, parameter in _of_experts(model.named_parameters()):
        if parameter.dim() == 2:
            yield name, parameter
        elif parameter.dim() == 3:
            yield from ((f"{name}.{expert}", matrix) for expert, matrix in enumerate(parameter))


def expert_weights(model: nn.Module) -> int:
    """How many weights the experts have."""
    return sum(matrix.numel() for _, matrix in expert_matrices(model))


def tensor_parts(name: str, tensor: Tensor) -> list[tuple[str, Tensor]]:
    """The plain tensors that a tensor subclass keeps its data in, such as codes and scales; else the tensor itself."""
    if not hasattr(tensor, "__tensor_flatten__"):
        return [(name, tensor)]
    names, _ = tensor.__tensor_flatten__()
    return [part for inner in names for part in tensor_parts(f"{name}.{inner}", getattr(tensor, inner))]
