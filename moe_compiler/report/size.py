"""What the model takes: bits and bytes by layer, and what was quantized of it."""

from __future__ import annotations

from matplotlib.patches import Patch

from moe_compiler.coverage import CompileReport, put_together
from moe_compiler.report.figure import OKABE_ITO, Figure, Text, canvas, finish, layer_labels, layer_ticks, styled

KINDS = ("experts", "shared experts", "other")
_SIXTEEN_BITS = 16


def layer_sizes(report: CompileReport) -> Figure:
    """Effective bits and bytes of every layer."""
    paths = list(report.plan.layers)
    labels = layer_labels(paths)
    place = list(range(len(paths)))
    by_layer = [report.of_block(path) for path in paths]
    routed = [put_together([entry for entry in entries if entry.kind == "experts"]) for entries in by_layer]
    effective, code = [one.effective_bits for one in routed], [one.code_bits for one in routed]
    with canvas(7.5, 4.6) as picture:
        upper, lower = picture.subplots(2, 1, sharex=True)
        upper.plot(place, effective, "o-", color=OKABE_ITO[0], markersize=4, label="effective bits")
        upper.plot(place, code, "s--", color=OKABE_ITO[1], markersize=4, label="code bits")
        if report.plan.target_bits is not None:
            upper.axhline(report.plan.target_bits, color="black", linewidth=0.8, linestyle=":", label="target")
        upper.set_ylim(0, 1.15 * max(*effective, report.plan.target_bits or 0))
        upper.set_ylabel("bits per expert weight")
        bottom = [0.0] * len(paths)
        for kind, color in zip(KINDS, (OKABE_ITO[0], OKABE_ITO[2], "#999999"), strict=True):
            size = [sum(e.size_bytes for e in entries if e.kind == kind) / 1e6 for entries in by_layer]
            if any(size):
                lower.bar(place, size, bottom=bottom, color=color, label=kind, width=0.75)
                bottom = [a + b for a, b in zip(bottom, size, strict=True)]
        lower.set_ylabel("MB (1e6 bytes)")
        lower.set_xlabel("layer")
        layer_ticks(lower.xaxis, labels)
        for axes in (upper, lower):
            styled(axes)
            axes.legend(loc="center left", bbox_to_anchor=(1, 0.5))
        return finish(
            picture,
            Text(
                "layer-sizes",
                "Bits and bytes of every layer",
                "Above: effective bits per weight of the routed experts (all their buffers: codes, scales, zero "
                "points, tables and the pool, divided by the weights they stand for) beside the code bits. Below: "
                "megabytes of each MoE block by kind of linear.",
                f"Lines of bits and stacked bars of megabytes over {len(paths)} layers.",
            ),
        )


def coverage(report: CompileReport) -> Figure:
    """The bytes of each kind of linear now, beside those of 16 bits a weight."""
    groups = report.groups()
    place = list(range(len(groups)))[::-1]
    with canvas(9.0, 1.2 + 0.5 * len(groups)) as picture:
        axes = picture.subplots()
        before = [_SIXTEEN_BITS * group.weights / 8e6 for group in groups]
        now = [group.size_bytes / 1e6 for group in groups]
        axes.barh([y + 0.2 for y in place], before, 0.38, color="#cccccc")
        bars = axes.barh(
            [y - 0.2 for y in place],
            now,
            0.38,
            color=[OKABE_ITO[0] if group.outcome == "lowered" else OKABE_ITO[1] for group in groups],
        )
        axes.bar_label(bars, [f"{group.effective_bits:.2f} bits, {group.outcome}" for group in groups], padding=3)
        axes.set_yticks(place, labels=[f"{group.linears} × {group.pattern}" for group in groups], fontsize=8)
        axes.set_xlabel("MB (1e6 bytes)")
        axes.xaxis.set_major_formatter("{x:,g}")
        axes.set_xlim(0, 1.25 * max(*before, *now))
        colors = {"at 16 bits a weight": "#cccccc", "now, lowered": OKABE_ITO[0], "now, left alone": OKABE_ITO[1]}
        handles = [Patch(color=color, label=label) for label, color in colors.items()]
        picture.legend(handles=handles, loc="outside upper center", ncols=3)
        styled(axes, "x")
        return finish(
            picture,
            Text(
                "coverage",
                "Coverage",
                "Megabytes of every linear of the MoE blocks as stored now, beside 16 bits a weight, with effective "
                "bits per weight and what was done. Attention, embeddings and the head are outside the MoE blocks and "
                "stay as they were.",
                f"Pairs of bars for {len(groups)} groups of linears.",
            ),
        )
