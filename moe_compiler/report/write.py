"""Putting a report together: which figures and tables there are, and the files."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import moe_compiler.report.adaptation as adaptation
import moe_compiler.report.allocation as allocation
import moe_compiler.report.channels as channels
import moe_compiler.report.graphs as graphs
import moe_compiler.report.joint as joint
import moe_compiler.report.significance as significance
import moe_compiler.report.similarity as similarity
import moe_compiler.report.size as size
import moe_compiler.report.tables as tables
import moe_compiler.report.tokens as token_figures
from moe_compiler.analysis import Analysis
from moe_compiler.coverage import CompileReport
from moe_compiler.graph_record import GraphRecord
from moe_compiler.replace_file import replace_file
from moe_compiler.report.figure import Figure
from moe_compiler.report.page import Part, Section, code_part, figure_part, page
from moe_compiler.runtime.profile import Profile
from moe_compiler.runtime.report import AdaptReport
from moe_compiler.runtime.runtime import CALIBRATION


@dataclass(frozen=True)
class Subject:
    """What a report is about.

    Attributes:
        name: the model's class.
        report: what compiling decided and did.
        analysis: what it found out.
        profiles: by name, the one that compiling made first.
        adaptations: what adapting did.
        tokenizer: of the model, or `None`.
    """

    name: str
    report: CompileReport
    analysis: Analysis
    profiles: Mapping[str, Profile]
    adaptations: tuple[AdaptReport, ...]
    tokenizer: Any


def write(model: Any, path: Path, tokenizer: Any, figures: Path | None, adaptations: tuple[AdaptReport, ...]) -> Path:
    """Writes the page, and the figures if asked; see `moe_compiler.report.write_report`."""
    subject = _subject(model, tokenizer, adaptations)
    if not path.parent.is_dir():
        raise FileNotFoundError(f"`path` must lie in a folder that exists, but {path.parent} does not")
    if figures is not None:
        if figures.exists() and not figures.is_dir():
            raise ValueError(f"`figures` must be a folder, but {figures} is a file")
        figures.mkdir(parents=True, exist_ok=True)
    drawn: list[Figure] = []
    sections = build_sections(subject, drawn)
    title = f"{subject.name}, compiled"
    note = (
        "Written by moe-compiler, which implements DynaMo and its earlier version MoQa (arXiv 2503.21135v3 and v1). "
        "Figures are of the calibration data unless they say otherwise."
    )
    if figures is not None:
        for figure in drawn:
            replace_file(figures / f"{figure.name}.png", figure.png)
    replace_file(path, page(title, note, sections).encode("utf-8"))
    return path


def build_sections(subject: Subject, drawn: list[Figure]) -> list[Section]:
    """The sections of the page, drawn one figure after the other; the figures are also put into `drawn`."""

    def draw(*makers: Callable[[], Figure]) -> tuple[Part, ...]:
        parts = []
        for maker in makers:
            drawn.append(maker())
            parts.append(figure_part(drawn[-1]))
        return tuple(parts)

    report, analysis, profiles = subject.report, subject.analysis, subject.profiles
    several = len(analysis.datasets) > 1
    alike = any(x.similarity is not None and x.num_experts > 1 for x in analysis.layers.values())
    pairs = alike or any(x.coactivation is not None and x.num_experts > 1 for x in analysis.layers.values())
    adapted: tuple[Part, ...] = ()
    if profiles:
        adapted = (tables.profiles(profiles, subject.adaptations),)
        if len(profiles) > 1:
            reference = next(iter(profiles))
            adapted += draw(
                lambda: adaptation.slots_moved(profiles, reference), lambda: adaptation.routing_divergence(profiles)
            )
        if subject.adaptations:
            adapted += draw(lambda: adaptation.expected_errors(subject.adaptations))
    return [
        Section("overview", "Overview", tables.overview(report, analysis)),
        Section(
            "data",
            "Calibration data",
            (
                tables.datasets(analysis),
                *draw(lambda: token_figures.token_utilization(analysis)),
                tables.frequent_tokens(analysis, subject.tokenizer),
            ),
        ),
        Section(
            "significance",
            "Significance",
            (
                *draw(
                    lambda: significance.significance_by_dataset(analysis),
                    lambda: significance.significance_map(analysis),
                    lambda: significance.dynamics_map(analysis),
                ),
                *(
                    draw(lambda: joint.joint_distribution(analysis), lambda: joint.dataset_correlation(analysis))
                    if several
                    else ()
                ),
                *draw(lambda: channels.channel_significance(analysis)),
            ),
        ),
        Section(
            "similarity",
            "Similarity of experts",
            (
                *(
                    draw(
                        lambda: similarity.cosine_similarity_map(analysis),
                        lambda: similarity.similarity_by_layer(analysis),
                    )
                    if alike
                    else ()
                ),
                *(draw(lambda: similarity.expert_graphs(analysis)) if pairs else ()),
            ),
        ),
        Section(
            "allocation",
            "Allocation of widths",
            draw(lambda: allocation.clusters(analysis), lambda: allocation.width_map(analysis)),
        ),
        Section(
            "size",
            "Size and coverage",
            (
                *draw(lambda: size.layer_sizes(report)),
                tables.layers(report, analysis),
                *draw(lambda: size.coverage(report)),
                tables.coverage(report),
            ),
        ),
        Section("adaptation", "Adaptation", adapted),
        Section("graphs", "Graphs", _graph_parts(analysis, drawn)),
    ]


def _graph_parts(analysis: Analysis, drawn: list[Figure]) -> tuple[Part, ...]:
    """The first block's graphs drawn, and the code of every different graph."""
    first = next(iter(analysis.layers))
    parts: list[Part] = []
    for stage, record in analysis.stages(first).items():
        drawn.append(graphs.block_graph(first, stage, record))
        parts.append(figure_part(drawn[-1]))
    for number, record in enumerate(analysis.graphs):
        stage, paths = _owners(analysis, number)
        others = f" and {len(paths) - 1} more blocks" if len(paths) > 1 else ""
        title = f"Code, {stage}, {paths[0]}{others}"
        parts.append(code_part(f"code-{number}", title, _size(record), record.text))
    return tuple(parts)


def _owners(analysis: Analysis, number: int) -> tuple[str, list[str]]:
    """The stage and the blocks that a graph belongs to."""
    found = [(s, path) for path, layer in analysis.layers.items() for s, n in layer.stages.items() if n == number]
    return " and ".join(dict.fromkeys(stage for stage, _ in found)), [path for _, path in found]


def _size(record: GraphRecord) -> str:
    return f"{len(record.text.splitlines())} lines, {len(record.nodes)} nodes"


def _subject(model: Any, tokenizer: Any, adaptations: Sequence[AdaptReport]) -> Subject:
    report = getattr(model, "moe_report", None)
    if not isinstance(report, CompileReport):
        raise TypeError(f"`model` must have been compiled by dynamo_compile, but this {type(model).__name__} was not")
    if report.analysis is None:
        raise ValueError(
            "`model.moe_report.analysis` is None, so there is nothing to report: the model was saved or loaded "
            "without its analysis; compile it again, or read the file with `Analysis.load`"
        )
    for one in adaptations:
        if not isinstance(one, AdaptReport):
            raise TypeError(f"`adaptations` must hold what `adapt` returned, but holds a {type(one).__name__}")
        if [layer.path for layer in one.layers] != list(report.analysis.layers):
            raise ValueError(f"`adaptations` must be of this model, but {one.name!r} has other MoE blocks")
    known = dict(getattr(getattr(model, "runtime", None), "profiles", {}))
    first = {CALIBRATION: known.pop(CALIBRATION)} if CALIBRATION in known else {}
    return Subject(type(model).__name__, report, report.analysis, first | known, tuple(adaptations), tokenizer)
