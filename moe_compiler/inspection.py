"""`explain`: what a compiled model looks like inside, printed."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection
from textwrap import wrap
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.syntax import Syntax
from rich.text import Text
from torch.fx import GraphModule

from moe_compiler.coverage import CompileReport
from moe_compiler.runtime.adaptation import RuntimeLayer


def explain(
    model: Any,
    *,
    layers: Collection[str] | None = None,
    graphs: bool = True,
    console: Console | None = None,
) -> None:
    """Prints each MoE block's graph before and after, its experts' widths, its pool and its effective bits,
    and what was covered of all its MoE blocks.

    Args:
        model: a compiled model.
        layers: which blocks to show, by path; all if `None`. Blocks whose graphs have the same code are drawn once.
        graphs: whether to draw the graphs.
        console: where to print; standard output if `None`.

    Raises:
        TypeError: `model` was not compiled by `dynamo_compile`.
        ValueError: a path in `layers` is none of the model's MoE blocks.
    """
    report = getattr(model, "moe_report", None)
    if not isinstance(report, CompileReport):
        raise TypeError(f"`model` must have been compiled by dynamo_compile, but this {type(model).__name__} was not")
    known = model.runtime.layers
    for path in layers or ():
        if path not in known:
            raise ValueError(f"`layers` must be among the MoE blocks {', '.join(known)}, but has {path!r}")
    console = console or Console()
    drawn: dict[str, str] = {}
    for path, layer in known.items():
        if layers is None or path in layers:
            console.rule(f"[bold]{path}")
            console.print(_widths(layer, report), highlight=False, soft_wrap=True)
            if graphs:
                console.print(_graphs(model.moe_graphs[path], path, drawn, console))
    console.rule("[bold]coverage")
    console.print(_coverage(report), highlight=False, soft_wrap=True)


def _widths(layer: RuntimeLayer, report: CompileReport) -> str:
    lines = []
    for name, packed in layer.experts.all_packed().items():
        histogram = Counter(packed.bits)
        widths = ", ".join(f"{histogram[width]} x INT{width}" for width in sorted(histogram))
        rare = ", ".join(map(str, report.blended[layer.block.path].get(name, ()))) or "none"
        lines += [
            f"{name}: {packed.num_experts} experts of {packed.out_features} x {packed.in_features}, {widths}",
            f"    bits by expert: {''.join(map(str, packed.bits))}",
            f"    {packed.code_bits:.2f} code bits, {packed.effective_bits:.2f} effective bits",
            f"    pool: {packed.pool.used} of {packed.pool.capacity} slots",
            f"    experts that saw too few tokens for a Hessian of their own: {rare}",
        ]
    for name, packed in layer.experts.shared_packed().items():
        lines.append(
            f"{name} of the shared experts: run as {packed.num_experts} more that every token takes, "
            f"INT{packed.bits[0]}"
        )
    return "\n".join(lines)


def _graphs(graph: Any, path: str, drawn: dict[str, str], console: Console) -> RenderableType:
    stages = {**graph.meta["stages"], "lowered": readable(graph)}
    parts: list[RenderableType] = []
    for stage, code in stages.items():
        if code in drawn:
            parts.append(Text(f"{stage}: as in {drawn[code]}", style="dim"))
            continue
        drawn[code] = path
        code = wrapped(code, console.width - 1)
        # without colours `Syntax` would only fill the lines with blanks
        parts += [Text(f"{stage}:", style="bold"), Syntax(code, "python") if console.is_terminal else Text(code)]
    return Group(*parts)


def wrapped(code: str, width: int) -> str:
    """The code with lines longer than `width` characters broken and hung below their start."""
    lines: list[str] = []
    for line in code.splitlines():
        hanging = " " * (len(line) - len(line.lstrip()) + 4)
        lines += wrap(line, width, subsequent_indent=hanging, break_long_words=False, drop_whitespace=True) or [""]
    return "\n".join(lines)


def readable(graph: GraphModule) -> str:
    """The code of a graph and of the graphs inside it, without the statements that only free memory."""
    code = graph.print_readable(print_output=False)
    code = re.sub(r";  [\w = ]+ = None$", "", code, flags=re.MULTILINE)
    code = code.replace("torch.ops.moe_compiler.", "ops.").replace(".default(", "(").replace("torch.nn.", "nn.")
    return code.replace(" : torch.Tensor", ": Tensor").replace("-> torch.Tensor", "-> Tensor").strip()


def _coverage(report: CompileReport) -> str:
    lines = []
    for group in report.groups():
        outcome = f"{group.kind}, lowered" if group.outcome == "lowered" else group.outcome
        lines += [
            f"{group.linears} x {group.pattern}: {outcome}",
            f"    {group.weights:,} weights, {group.size_bytes / 1e6:.3f} MB, {group.code_bits:.2f} code bits, "
            f"{group.effective_bits:.2f} effective bits",
        ]
    lines.append(
        f"routed experts: {report.code_bits:.3f} code bits, {report.effective_bits:.3f} effective bits per weight"
    )
    return "\n".join(lines)
