"""Finding the original weights of a saved model again, and refusing those of another."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from moe_compiler.kernels.experts import PackedExpertLinear
from moe_compiler.runtime.adaptation import RuntimeLayer
from moe_compiler.runtime.checkpoint import Checkpoint, CheckpointWeight
from moe_compiler.runtime.master import CheckpointMaster, LinearMaster

TOLERANCE = 1e-3
"""Relative difference that a norm or an error may have from what was saved: sums in another order."""


def attached_masters(
    layers: Mapping[str, RuntimeLayer], checkpoint: Checkpoint
) -> dict[str, dict[str, CheckpointMaster]]:
    """Masters that read the original weights of every linear from files; reads all of these weights once.

    Weights are the right ones if every column has the norm that was noted when the model was compiled, and lies as far
    from the quantized base as it did then.

    Args:
        layers: the layers by path.
        checkpoint: the files.

    Returns:
        The masters by path and linear.

    Raises:
        ValueError: a linear's weights are not in the files.
        RuntimeError: a file cannot be read.
    """
    masters: dict[str, dict[str, CheckpointMaster]] = {}
    for path, layer in layers.items():
        masters[path] = {}
        for name, packed in layer.experts.all_packed().items():
            master = layer.masters[name]
            source = _source(layer, name, packed, checkpoint)
            if source is None:
                raise ValueError(
                    f"the model in {checkpoint.folder} is not the one that was compiled: none of its tensors has the "
                    f"columns that `{layer.block.spec.path}.{name}` had"
                )
            masters[path][name] = CheckpointMaster(master.error, master.column_norm, source)
    return masters


def _source(
    layer: RuntimeLayer, name: str, packed: PackedExpertLinear, checkpoint: Checkpoint
) -> CheckpointWeight | None:
    master = layer.masters[name]
    shape = (packed.num_experts, packed.out_features, packed.in_features)
    return checkpoint.match(
        layer.block.spec.path, name, shape, master.dtype, lambda weight: _agrees(weight, master, packed)
    )


def _agrees(source: CheckpointWeight, master: LinearMaster, packed: PackedExpertLinear) -> bool:
    """Whether these are the weights that the base was made from; reads until one expert differs."""
    for expert in range(packed.num_experts):
        weight = source.read(expert).float()
        if not _alike(torch.linalg.vector_norm(weight, dim=0), master.column_norm[expert]):
            return False
        difference = weight - packed.dequantize_expert(expert).cpu()
        if not _alike(difference.square().sum(dim=0), master.error[expert]):
            return False
    return True


def _alike(found: torch.Tensor, noted: torch.Tensor) -> bool:
    scale = noted.abs().max() if noted.numel() else noted.sum()
    return bool(((found - noted).abs() <= TOLERANCE * (noted.abs() + 1e-3 * scale)).all())
