"""Finding every MoE block of a model: those that can be captured, and the reason for each that cannot."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator
from dataclasses import dataclass

from torch import nn

from moe_compiler.passes.experts import experts_kind

_EXPERTS_CLASS = re.compile(r"(Experts|MoE|Moe|MoA|SparseMLP|Mo[eE](Block|Layer))$")
_EXPERTS_NAME = re.compile(r"(^|_)experts$")
_SEQUENCE_MIXER = re.compile(r"attn|attention|mamba")


@dataclass(frozen=True)
class FoundExperts:
    """Experts of a supported form.

    Attributes:
        path: path of the experts in the model.
        block_path: path of their block: the parent, or the experts themselves where the parent is a whole
            decoder layer.
    """

    path: str
    block_path: str

    @property
    def name(self) -> str:
        """The experts' name in their parent."""
        return self.path.rsplit(".", 1)[-1]

    @property
    def has_block(self) -> bool:
        """Whether the experts sit in a block of their own."""
        return self.path != self.block_path


def find_experts(model: nn.Module) -> list[FoundExperts]:
    """Find the experts of every MoE block of `model`, in module order.

    Raises:
        ValueError: the model has no MoE block, has one that no supported form fits, or uses one at two
            places.
    """
    found: list[FoundExperts] = []
    for path, module in model.named_modules():
        kind = experts_kind(module) if path else None
        if kind is None or (kind == "list" and not _is_experts_name(path)):
            continue
        parent_path = path.rpartition(".")[0]
        siblings = [name for name, _ in model.get_submodule(parent_path).named_children()]
        has_block = parent_path and not any(_SEQUENCE_MIXER.search(name) for name in siblings)
        found.append(FoundExperts(path, parent_path if has_block else path))
    _refuse_unsupported(model, found)
    if not found:
        raise ValueError(
            f"no MoE block found in {type(model).__name__}: `model` must have experts, as stacked 3-D "
            "weights or as an nn.ModuleList of MLPs"
        )
    _refuse_shared(model, found)
    return found


def refusal(model: nn.Module, path: str, reason: object) -> ValueError:
    """Make the error for a MoE block that cannot be captured."""
    return ValueError(
        f"`model` ({type(model).__name__}) has a MoE block that cannot be captured: `{path}` "
        f"({type(model.get_submodule(path)).__name__}): {reason}"
    )


def _refuse_unsupported(model: nn.Module, found: list[FoundExperts]) -> None:
    suspects = list(_suspects(model, found))
    # Of a block and the experts in it, name the experts.
    innermost = [path for path in suspects if not any(other.startswith(f"{path}.") for other in suspects)]
    if innermost:
        reason = _reason(model.get_submodule(innermost[0]))
        more = f" ({len(innermost) - 1} more modules like it)" if len(innermost) > 1 else ""
        raise refusal(model, innermost[0], reason + more)


def _suspects(model: nn.Module, found: list[FoundExperts]) -> Iterator[str]:
    """Yield modules that are experts or a MoE block by name and neither belong to nor hold supported ones."""
    for path, module in model.named_modules():
        inside = any(path == one.block_path or path.startswith(f"{one.block_path}.") for one in found)
        around = any(one.path.startswith(f"{path}.") for one in found)
        named = _EXPERTS_CLASS.search(type(module).__name__) or _is_experts_name(path)
        if path and named and not inside and not around:
            yield path


def _refuse_shared(model: nn.Module, found: list[FoundExperts]) -> None:
    paths: dict[nn.Module, list[str]] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        paths.setdefault(module, []).append(path)
    for one in found:
        used = paths[model.get_submodule(one.block_path)]
        if len(used) > 1:
            raise refusal(model, one.block_path, f"it is used at several places: {', '.join(used)}")


def _is_experts_name(path: str) -> bool:
    name = path.rsplit(".", 1)[-1]
    return bool(_EXPERTS_NAME.search(name)) and "shared" not in name


def _reason(module: nn.Module) -> str:
    """Say why experts are of no supported form: the first thing that differs."""
    inputs = list(inspect.signature(module.forward).parameters)
    call = f"forward({', '.join(inputs)})"
    weights = dict(module.named_parameters(recurse=False))
    stacked = {name: weight for name, weight in weights.items() if weight.dim() == 3}
    first = next((name for name in ("gate_up_proj", "up_proj") if name in stacked), None)
    if isinstance(module, nn.ModuleList | nn.ModuleDict):
        base = "nn.ModuleList" if isinstance(module, nn.ModuleList) else "nn.ModuleDict"
        kinds = ", ".join(sorted({type(child).__name__ for child in module.children()}))
        return f"its experts are an {base} of {kinds} called through {call}, not an nn.ModuleList of gated MLPs"
    tables = [name for name, child in module.named_children() if isinstance(child, nn.Embedding)]
    if tables:
        return f"its experts are looked-up rows of nn.Embedding ({', '.join(tables)}), not linear layers"
    if first and "down_proj" in stacked and stacked[first].shape[0] != stacked["down_proj"].shape[0]:
        return (
            f"{first} holds {stacked[first].shape[0]} experts, down_proj {stacked['down_proj'].shape[0]}: "
            "the others are no linear layers, and the experts of one layer must all have the same form"
        )
    if stacked and len(inputs) != 3:
        return (
            f"its {call} must take (hidden states, expert index, routing weights); without them it cannot be "
            "seen which token goes to which expert"
        )
    shapes = ", ".join(f"{name} {tuple(weight.shape)}" for name, weight in module.named_parameters())
    return f"it has no stacked 3-D weights (gate_up_proj or up_proj, and down_proj), but {shapes or 'none'}"
