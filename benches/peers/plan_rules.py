"""A plan of widths for experts' linears, as rules for quantizers that match module paths by regular expressions."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

WIDTHS = (2, 3, 4, 5, 6, 7, 8)
FUSED: Mapping[str, tuple[str, ...]] = {"gate_up_proj": ("gate_proj", "up_proj")}
"""Linears that peers keep as several where transformers keeps them as one."""

_EXPERT_LINEAR = re.compile(r"(.+\.experts)\.(\d+)\.(\w+)")


def read_plan(path: Path) -> dict[str, int]:
    """The plan in a JSON file, see `plan_widths`.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it holds no such plan.
    """
    return plan_widths(json.loads(path.read_text()))


def plan_widths(plan: Any) -> dict[str, int]:
    """The widths by module path, such as `model.layers.0.mlp.experts.7.gate_proj`.

    Args:
        plan: either such a mapping or what `PrecisionPlan.to_dict` gives (`model.moe_report.plan`).

    Raises:
        ValueError: it is neither, or a width is none of `WIDTHS`.
    """
    if not isinstance(plan, dict):
        raise ValueError(f"`plan` must be a JSON object, but is a {type(plan).__name__}")
    try:
        pairs = list(_of_layers(plan["layers"]) if "layers" in plan else plan.items())
    except KeyError as error:
        raise ValueError(f"`plan` lacks the field {error.args[0]!r} in one of its layers") from error
    widths = {split: bits for name, bits in pairs for split in _split(name)}
    for name, bits in widths.items():
        if not _EXPERT_LINEAR.fullmatch(name) or type(bits) is not int or bits not in WIDTHS:
            raise ValueError(
                f"`plan` must give paths like 'model.layers.0.mlp.experts.7.gate_proj' one of the widths {WIDTHS}, "
                f"but gives {name!r} {bits!r}"
            )
    if not widths:
        raise ValueError("`plan` must name at least one linear, but is empty")
    return widths


def dynamic_rules(widths: Mapping[str, int], default: int) -> dict[str, dict[str, int]]:
    """GPTQModel's `QuantizeConfig.dynamic`: a regular expression per MoE block, linear and width.

    Args:
        widths: from `read_plan`.
        default: the width that needs no rule.
    """
    experts: dict[tuple[str, str, int], list[int]] = {}
    for name, bits in widths.items():
        found = _EXPERT_LINEAR.fullmatch(name)
        assert found is not None
        path, expert, linear = found.groups()
        if bits != default:
            experts.setdefault((path, linear, bits), []).append(int(expert))
    return {
        rf"+:^{re.escape(path)}\.({'|'.join(map(str, sorted(numbers)))})\.{linear}$": {"bits": bits}
        for (path, linear, bits), numbers in experts.items()
    }


def _of_layers(layers: Sequence[Mapping[str, Any]]) -> Iterator[tuple[str, Any]]:
    for layer in layers:
        for linear, widths in layer["bits"].items():
            for expert, bits in enumerate(widths):
                yield f"{layer['path']}.experts.{expert}.{linear}", bits


def _split(name: str) -> list[str]:
    start, _, linear = name.rpartition(".")
    return [f"{start}.{one}" for one in FUSED.get(linear, (linear,))]
