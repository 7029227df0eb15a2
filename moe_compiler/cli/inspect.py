"""`moe-compiler inspect`: what a compiled model looks like inside."""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from collections.abc import Collection
from dataclasses import asdict
from typing import Any

from rich.console import Console

from moe_compiler.cli.models import load_compiled
from moe_compiler.cli.output import print_json, print_table, print_text
from moe_compiler.inspection import explain, readable
from moe_compiler.kernels.affine import WIDTHS
from moe_compiler.runtime.profile import Profile
from moe_compiler.runtime.report import jensen_shannon
from moe_compiler.runtime.runtime import CALIBRATION

_PIPE_WIDTH = 120
"""Characters in a line of graphs where they go to a file or pipe."""


def run(options: argparse.Namespace) -> None:
    """Prints what was asked for; a summary if nothing was."""
    model, _ = load_compiled(options.model, options)
    known = list(model.runtime.layers)
    for path in options.layer or ():
        if path not in known:
            raise ValueError(f"`--layer` must be one of the MoE blocks {', '.join(known)}, but is {path!r}")
    layers = [path for path in known if path in (options.layer or known)]
    if options.json:
        print_json(_everything(model, layers, graphs=options.graphs))
        return
    if options.graphs:
        explain(model, layers=layers, console=None if sys.stdout.isatty() else Console(width=_PIPE_WIDTH))
    if options.plan:
        _print_plan(model, layers)
    if options.coverage:
        _print_coverage(model, layers)
    if not (options.graphs or options.plan or options.coverage):
        _print_summary(model, layers)


def _print_summary(model: Any, layers: Collection[str]) -> None:
    report = model.moe_report
    rows = []
    for path in layers:
        for linear, packed in model.runtime.layers[path].experts.all_packed().items():
            widths = Counter(packed.bits)
            rows.append(
                [
                    f"{path}.{linear}",
                    f"{packed.num_experts} x {packed.out_features} x {packed.in_features}",
                    *(str(widths[bits] or "-") for bits in WIDTHS),
                    f"{packed.effective_bits:.3f}",
                    f"{packed.pool.used}/{packed.pool.capacity}",
                    f"{packed.size_bytes / 1e6:.3f}",
                ]
            )
    widths_of = [f"INT{bits}" for bits in WIDTHS]
    print_table(["expert linear", "experts", *widths_of, "bits", "pool slots", "MB"], rows)
    print_table(
        ["profile", "rule", "tokens", "pool slots", "MB", "divergence"],
        [_profile_row(model, profile) for profile in model.runtime.profiles.values()],
    )
    print_text(
        "bits: effective, of an expert weight; divergence: Jensen-Shannon, in bits, of the routing from that of the "
        "calibration data\n"
        f"{type(model).__name__}, strategy {report.config.strategy!r}, quantizer {report.config.quantizer!r}: "
        f"{report.code_bits:.3f} code bits, {report.effective_bits:.3f} effective bits per expert weight"
    )


def _profile_row(model: Any, profile: Profile) -> list[str]:
    found = _profile(model, profile)
    return [
        f"{profile.name} (active)" if found["active"] else profile.name,
        profile.rule,
        f"{profile.tokens:,}" if profile.tokens else "-",
        f"{found['slots_used']:,}/{found['slots']:,}",
        f"{profile.size_bytes / 1e6:.3f}",
        f"{found['divergence_bits']:.3f}",
    ]


def _profile(model: Any, profile: Profile) -> dict[str, Any]:
    """A profile in numbers; the divergence of the routing is the mean over the blocks."""
    base = model.runtime.profiles[CALIBRATION].histograms
    divergences = [float(jensen_shannon(found, base[path])) for path, found in profile.histograms.items()]
    return {
        "name": profile.name,
        "active": profile.name == model.runtime.active,
        "rule": profile.rule,
        "tokens": profile.tokens,
        "slots_used": sum(pool.used for pool in profile.pools.values()),
        "slots": sum(pool.capacity for pool in profile.pools.values()),
        "size_bytes": profile.size_bytes,
        "divergence_bits": sum(divergences) / len(divergences),
    }


def _bits(model: Any, layers: Collection[str]) -> dict[str, dict[str, list[int]]]:
    """By block and linear, the width of every expert."""
    return {
        path: {linear: list(packed.bits) for linear, packed in model.runtime.layers[path].experts.all_packed().items()}
        for path in layers
    }


def _print_plan(model: Any, layers: Collection[str]) -> None:
    rows = []
    for path, linears in _bits(model, layers).items():
        for linear, bits in linears.items():
            rows.append([f"{path}.{linear}", f"{sum(bits) / len(bits):.2f}", " ".join(map(str, bits))])
    print_table(["expert linear", "mean", "bits of each expert"], rows)


def _print_coverage(model: Any, layers: Collection[str]) -> None:
    rows = [
        [
            entry.path,
            entry.kind if entry.lowered else f"left alone: {entry.reason}",
            f"{entry.weights:,}",
            f"{entry.size_bytes / 1e6:.3f}",
            f"{entry.code_bits:.2f}",
            f"{entry.effective_bits:.2f}",
        ]
        for entry in _covered(model, layers)
    ]
    print_table(["linear", "kind", "weights", "MB", "code bits", "effective bits"], rows)


def _covered(model: Any, layers: Collection[str]) -> list[Any]:
    return [entry for path in layers for entry in model.moe_report.of_block(path)]


def _everything(model: Any, layers: Collection[str], *, graphs: bool) -> dict[str, Any]:
    report = model.moe_report
    found: dict[str, Any] = {
        "model": type(model).__name__,
        "config": report.config.to_dict(),
        "code_bits": report.code_bits,
        "effective_bits": report.effective_bits,
        "plan": _bits(model, layers),
        "coverage": [asdict(entry) for entry in _covered(model, layers)],
        "profiles": [_profile(model, profile) for profile in model.runtime.profiles.values()],
    }
    if graphs:
        found["graphs"] = {
            path: {**model.moe_graphs[path].meta["stages"], "lowered": readable(model.moe_graphs[path])}
            for path in layers
        }
    return found
