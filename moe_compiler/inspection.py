"""`explain`: what a compiled model looks like inside, printed."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.syntax import Syntax
from rich.table import Table
from rich.text import Text
from torch.fx import GraphModule

from moe_compiler.coverage import CompileReport, CoverageEntry
from moe_compiler.runtime.runtime import RuntimeLayer


def explain(
    model: Any,
    *,
    layers: Collection[str] | None = None,
    graphs: bool = True,
    console: Console | None = None,
) -> None:
    """Prints each MoE block's graph before and after, its experts' widths, its channel pool and its effective bits,
    and the coverage of the whole model.

    Args:
        model: a compiled model.
        layers: which blocks to show, by path; all if `None`. Blocks whose graphs have the same code are drawn once.
        graphs: whether to draw the graphs.
        console: where to print; standard output if `None`.

    Raises:
        TypeError: `model` was not compiled by `dynamo_compile`.
        KeyError: a path in `layers` is none of the model's MoE blocks.
    """
    report = getattr(model, "moe_report", None)
    if not isinstance(report, CompileReport):
        raise TypeError(f"`model` must have been compiled by dynamo_compile, but this {type(model).__name__} was not")
    known = model.runtime.layers
    for path in layers or ():
        if path not in known:
            raise KeyError(f"`layers` names {path!r}, but the model's MoE blocks are {', '.join(known)}")
    console = console or Console()
    drawn: dict[str, str] = {}
    for path, layer in known.items():
        if layers is None or path in layers:
            console.rule(f"[bold]{path}")
            console.print(_widths(layer, report))
            if graphs:
                console.print(_graphs(model.moe_graphs[path], path, drawn))
    console.rule("[bold]coverage")
    console.print(_coverage(report))


def _widths(layer: RuntimeLayer, report: CompileReport) -> RenderableType:
    table = Table("linear", "experts", "shape", "widths of the experts", "codes", "effective", "pool", "rare experts")
    for name, packed in layer.experts.all_packed().items():
        histogram = Counter(packed.bits)
        digits = "".join(map(str, packed.bits))
        widths = ", ".join(f"{histogram[width]} x INT{width}" for width in sorted(histogram))
        rare = report.blended[layer.block.path].get(name, ())
        table.add_row(
            name,
            str(packed.num_experts),
            f"{packed.out_features} x {packed.in_features}",
            f"{widths}\n{digits}",
            f"{packed.code_bits:.2f}",
            f"{packed.effective_bits:.2f}",
            f"{packed.pool.used} of {packed.pool.capacity} slots",
            ", ".join(map(str, rare)) or "-",
        )
    return table


def _graphs(graph: Any, path: str, drawn: dict[str, str]) -> RenderableType:
    stages = {**graph.meta["stages"], "lowered": readable(graph)}
    parts: list[RenderableType] = []
    for stage, code in stages.items():
        if code in drawn:
            parts.append(Text(f"{stage}: as in {drawn[code]}", style="dim"))
            continue
        drawn[code] = path
        parts += [Text(f"{stage}:", style="bold"), Syntax(code, "python", word_wrap=True)]
    return Group(*parts)


def readable(graph: GraphModule) -> str:
    """The code of a graph and of the graphs inside it, without the statements that only free memory."""
    code = graph.print_readable(print_output=False)
    code = re.sub(r";  [\w = ]+ = None$", "", code, flags=re.MULTILINE)
    code = code.replace("torch.ops.moe_compiler.", "ops.").replace(".default(", "(").replace("torch.nn.", "nn.")
    return code.replace(" : torch.Tensor", ": Tensor").replace("-> torch.Tensor", "-> Tensor").strip()


def _coverage(report: CompileReport) -> RenderableType:
    table = Table("linears", "number", "kind", "weights", "bytes", "codes", "effective", "what became of them")
    alike: dict[tuple[str, str, str], list[CoverageEntry]] = {}
    for entry in report.coverage:
        key = (re.sub(r"\.\d+\.", ".*.", entry.path), entry.kind, _outcome(entry))
        alike.setdefault(key, []).append(entry)
    for (pattern, kind, outcome), entries in alike.items():
        weights, size = sum(e.weights for e in entries), sum(e.size_bytes for e in entries)
        table.add_row(
            pattern,
            str(len(entries)),
            kind,
            f"{weights:,}",
            f"{size:,}",
            f"{sum(e.code_bits * e.weights for e in entries) / weights:.2f}",
            f"{8 * size / weights:.2f}",
            outcome,
        )
    table.caption = (
        f"routed experts: {report.code_bits:.3f} code bits, {report.effective_bits:.3f} effective bits per weight"
    )
    return table


def _outcome(entry: CoverageEntry) -> str:
    return "lowered" if entry.lowered else f"left alone: {entry.reason}"
