"""Accuracy rows as Markdown: a table per suite, losses by domain, and the table of targets."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import astuple

from accuracy_rows import ORIGINAL, Row
from accuracy_statistics import CONFIDENCE
from accuracy_suites import SUITES
from accuracy_targets import Verdict
from harness import markdown_table

_FORMULA = "*"
_BY_DOMAIN = ("single",)


def report(rows: Sequence[Row], original: Row, verdicts: Sequence[Verdict], conditions: str) -> str:
    """Everything that was measured, as one Markdown text.

    Args:
        rows: all rows, peers' among them.
        original: the original model's row, that losses are against.
        verdicts: what became of the targets.
        conditions: a sentence on the tokens.
    """
    known = [row for row in rows if row.status == "ok" and row.name != ORIGINAL]
    suites = [*SUITES, *dict.fromkeys(row.suite for row in known if row.suite not in SUITES)]
    parts = [f"# Accuracy of {original.model}", conditions, _legend(original), _perplexities(original)]
    for suite in suites:
        members = [row for row in known if row.suite == suite]
        if members:
            table = _by_domain(members, original) if suite in _BY_DOMAIN else ""
            parts += [f"## {suite}", suite_table(members, original), table]
    failed = [row for row in rows if row.status != "ok"]
    if failed:
        cells = ((f"{row.suite}: {row.name}", row.status) for row in failed)
        parts += ["## Without figures", markdown_table(("row", "why"), cells)]
    parts += ["## Targets", targets_table(verdicts)]
    return "\n\n".join(part for part in parts if part) + "\n"


def suite_table(rows: Sequence[Row], original: Row) -> str:
    """One line per row; a row measured after adapting stands for the one before it, whose loss is beside it."""
    by_name = {row.name: row for row in rows}
    replaced = {_before(row) for row in rows if row.adapted}
    lines: list[dict[str, str]] = []
    for row in rows:
        before = by_name.get(_before(row)) if row.adapted else row
        if row.name in replaced:
            continue
        mark = _FORMULA if row.bits_source == "formula" else ""
        lines.append(
            {
                "": row.name,
                "code bits": _number(row.code_bits, 2),
                "effective bits": _number(row.effective_bits, 3) + mark,
                "MB": _number(None if row.size_bytes is None else row.size_bytes / 1e6, 2),
                "loss, seen": _loss(row, original, "seen"),
                "loss, new": _loss(before, original, "new"),
                "new, adapted": _loss(row, original, "new") if row.adapted else "",
                "gap recovered": "" if row.recovered is None else f"{row.recovered:.0%}",
                "compile, s": _number(row.compile_s, 1),
                "adapt, s": _number(row.adapt_s, 2),
            }
        )
    used = [name for name in lines[0] if any(line[name] for line in lines)]
    header = [name for name in lines[0] if name in used or not name]
    return markdown_table(header, ([line[name] for name in header] for line in lines))


def targets_table(verdicts: Sequence[Verdict]) -> str:
    """The targets, one line each."""
    return markdown_table(("target", "ours", "to reach", "difference", "verdict"), map(astuple, verdicts))


def _legend(original: Row) -> str:
    return (
        "Loss: mean over domains of `100 · ln(perplexity / perplexity of the original)`, with half of the "
        f"{CONFIDENCE:.0%} interval by paired bootstrap over windows. Bits and bytes are those of the buffers; "
        f"`{_FORMULA}`: computed for a packing that the evaluated model, with dequantized weights, does not have. "
        f"Weights of the original: {original.code_bits:g} bits."
    )


def _perplexities(original: Row) -> str:
    rows = [[ORIGINAL, *(f"{original.perplexity(domain):.3f}" for domain in original.nll)]]
    header = ["perplexity", *(f"{name} ({'seen' if name in original.seen else 'new'})" for name in original.nll)]
    return markdown_table(header, rows)


def _by_domain(rows: Sequence[Row], original: Row) -> str:
    """The loss on every domain by itself."""
    lines = []
    for row in rows:
        cells = [str(row.loss_on(original, (domain,))) for domain in original.nll]
        lines.append([row.name, *cells])
    return markdown_table(["loss on", *original.nll], lines)


def _before(row: Row) -> str:
    return row.name.rpartition(", ")[0]


def _loss(row: Row | None, original: Row, kind: str) -> str:
    found = None if row is None else row.loss(original, kind)
    return "" if found is None else str(found)


def _number(value: float | None, digits: int) -> str:
    return "" if value is None else f"{value:,.{digits}f}"
