"""What must hold of a model before it is compiled."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn
from transformers import PreTrainedModel

from moe_compiler.passes.capture import MoEBlock


def check_model(model: nn.Module) -> None:
    """Refuses a model that cannot be compiled as it stands.

    Raises:
        TypeError: `model` is not an `nn.Module`, or is the wrapper that `torch.compile` returns.
        ValueError: it is compiled already, is on the meta device, has offload hooks, or is quantized already.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"`model` must be an nn.Module, but is a {type(model).__name__}")
    if hasattr(model, "_orig_mod"):
        raise TypeError("`model` must be the model itself, but is what torch.compile returned: compile it afterwards")
    kind = type(model).__name__
    if getattr(model, "runtime", None) is not None:
        raise ValueError(f"`model` ({kind}) is compiled already: load the original again to compile it anew")
    if getattr(model, "hf_quantizer", None) is not None:
        method = getattr(model, "quantization_method", "unknown")
        raise ValueError(f"`model` ({kind}) is quantized already, by {method}: load the original weights instead")
    check_offload(model)
    for name, parameter in model.named_parameters():
        if parameter.device.type == "meta":
            raise ValueError(f"`model` ({kind}) must have its weights, but `{name}` is on the meta device")


def check_offload(model: nn.Module) -> None:
    """Refuses a model with hooks that move its weights.

    Raises:
        ValueError: names the first such module.
    """
    for name, module in model.named_modules():
        hook = getattr(module, "_hf_hook", None)
        if hook is not None and getattr(hook, "offload", True):
            raise ValueError(
                f"`model` ({type(model).__name__}) must not have offload hooks, but `{name or '.'}` has a "
                f"{type(hook).__name__}: "
                "load it without device_map, or call accelerate.hooks.remove_hook_from_submodules first"
            )


def vocabulary_size(model: nn.Module) -> int | None:
    """How many token ids the model knows, or `None` where it does not say."""
    embeddings = model.get_input_embeddings() if isinstance(model, PreTrainedModel) else None
    return embeddings.num_embeddings if isinstance(embeddings, nn.Embedding) else None


def check_finite(model: nn.Module) -> None:
    """Refuses NaN and infinite weights.

    Raises:
        ValueError: names the first such parameter.
    """
    for name, parameter in model.named_parameters():
        if parameter.is_floating_point() and not bool(torch.isfinite(parameter).all()):
            raise ValueError(f"`model` must have finite weights, but parameter `{name}` holds NaN or infinity")


def check_blocks(model: nn.Module, blocks: Mapping[str, MoEBlock]) -> None:
    """Refuses models whose experts are not ordinary floating-point weights.

    Raises:
        ValueError: names the experts and what they hold.
    """
    for block in blocks.values():
        for name, parameter in block.experts.named_parameters():
            if not parameter.is_floating_point() or parameter.dtype.itemsize not in (2, 4):
                raise ValueError(
                    f"experts must hold 16 or 32-bit floating-point weights, but `{block.spec.path}.{name}` of "
                    f"{type(model).__name__} is {parameter.dtype}"
                )
            if type(parameter.data) is not torch.Tensor:
                raise ValueError(
                    f"experts must hold ordinary tensors, but `{block.spec.path}.{name}` of {type(model).__name__} "
                    f"is a {type(parameter.data).__name__}: load the model without tensor parallelism"
                )
