"""What the method should reach, as comparisons of rows on the same windows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from accuracy_rows import Row
from accuracy_suites import LEVELS, LOWEST_LEVEL

Kind = Literal["seen", "new"]
Key = tuple[str, str]
CANDIDATE = "budget, insured"
_MOST_NOISE = 0.1


@dataclass(frozen=True)
class Target:
    """One loss that should not be above another, or above a part of it.

    Attributes:
        text: what should hold.
        ours: suite and name of the row.
        theirs: those of the row to compare with.
        kind: on which domains.
        factor: how much of the other row's loss is allowed.
    """

    text: str
    ours: Key
    theirs: Key
    kind: Kind
    factor: float = 1.0


@dataclass(frozen=True)
class Verdict:
    """What became of a target.

    Attributes:
        text: what should hold.
        ours: our figure, as text.
        theirs: the figure to reach.
        difference: with its interval; negative is better for losses.
        verdict: `"reached"`, `"missed"` or `"not measured"`, with a word of doubt where noise could decide.
    """

    text: str
    ours: str = "–"
    theirs: str = "–"
    difference: str = "–"
    verdict: str = "not measured"

    @property
    def missed(self) -> bool:
        """Whether the figure is there and does not do."""
        return self.verdict.startswith("missed")


def targets(reference: Key, levels: Sequence[str] = LEVELS, candidate: str = CANDIDATE) -> list[Target]:
    """The comparisons to make.

    Args:
        reference: suite and name of the row to beat.
        levels: those of the suite `"allocation"`: first the reference's bits, then fewer.
        candidate: the allocation that the product stands for.
    """

    def row(name: str, level: str, adapted: bool = False) -> Key:
        return "allocation", f"{name} @ {level}" + (", adapted" if adapted else "")

    def part(name: str, level: str, kind: Kind, factor: float, adapted: bool, theirs: Key) -> Target:
        label = f"{kind}, adapted" if adapted else kind
        text = f"{name} @ {level}: {label}, at most {factor:g} of {theirs[1]}"
        return Target(text, row(name, level, adapted), theirs, kind, factor)

    two = reference[0], reference[1].replace("-3", "-2")
    wide = "groups of 256"
    found = [
        part(candidate, levels[0], "seen", 0.5, False, reference),
        part(candidate, levels[0], "new", 1.3, False, reference),
        part(candidate, levels[0], "new", 0.5, True, reference),
    ]
    if len(levels) > 1:
        found += [
            part(candidate, levels[1], "seen", 0.7, False, reference),
            part(candidate, levels[1], "new", 0.8, True, reference),
        ]
    found += [
        part(wide, LOWEST_LEVEL, "seen", 0.5, False, two),
        part(wide, LOWEST_LEVEL, "new", 0.8, False, two),
        part(wide, LOWEST_LEVEL, "new", 0.4, True, two),
    ]
    first, last, gptq = levels[0], levels[-1], ("quantizers", "GPTQ-2")
    found += [
        Target(f"dynamo @ {first}: seen, at most {reference[1]}", row("dynamo", first), reference, "seen"),
        Target("dynamo: seen, at most random", row("dynamo", first), row("random", first), "seen"),
        Target("dynamo: seen, at most pooled", row("dynamo", first), row("pooled", first), "seen"),
        Target(f"{candidate}: seen, at most dynamo", row(candidate, first), row("dynamo", first), "seen"),
        Target("insurance: new, at most without", row(CANDIDATE, first), row("budget", first), "new"),
        Target(f"{candidate} @ {last}: new, adapted, at most GPTQ-2", row(candidate, last, True), gptq, "new"),
    ]
    return found


SHARES: Mapping[str, float] = {"pool 1 %, lowrank": 0.5, "pool 4 %, lowrank": 1.0}
"""By the end of a row's name in the suite `"rules"`: the least share of the gap that adapting should win back."""


def judge(rows: Sequence[Row], reference: Key, original: Row, levels: Sequence[str] = LEVELS) -> list[Verdict]:
    """What became of every target.

    Args:
        rows: what was measured.
        reference: suite and name of the row to beat.
        original: the original model's row.
        levels: those of the suite `"allocation"`.
    """
    by_key = {row.key: row for row in rows if row.status == "ok"}
    found = [_judge_noise(rows, original, levels[0])]
    for target in targets(reference, levels):
        ours, theirs = by_key.get(target.ours), by_key.get(target.theirs)
        found.append(
            Verdict(target.text) if ours is None or theirs is None else _compare(target, ours, theirs, original)
        )
    for ending, least in SHARES.items():
        row = next((one for one in rows if one.suite == "rules" and one.name.endswith(ending)), None)
        text = f"{ending}: share of the gap to GPTQ redone, at least {least:.0%}"
        if row is None or row.recovered is None:
            found.append(Verdict(text))
        else:
            verdict = "reached" if row.recovered >= least else "missed"
            found.append(
                Verdict(text, f"{row.recovered:.0%}", f"{least:.0%}", f"{row.recovered - least:+.0%}", verdict)
            )
    return found


def _compare(target: Target, ours: Row, theirs: Row, original: Row) -> Verdict:
    try:
        difference = ours.loss(theirs, target.kind)
        figures = [one.loss(original, target.kind) for one in (ours, theirs)]
    except ValueError as error:
        return Verdict(target.text, verdict=f"not measured: {error}")
    if difference is None or None in figures:
        return Verdict(target.text)
    if target.factor != 1:
        ours_loss, theirs_loss = (figure.mean for figure in figures if figure is not None)
        verdict = "reached" if ours_loss <= target.factor * theirs_loss else "missed"
        share = f"{ours_loss / theirs_loss:.2f} times" if theirs_loss > 0 else "–"
        return Verdict(target.text, str(figures[0]), str(figures[1]), share, verdict)
    verdict = "reached" if difference.mean <= 0 else "missed"
    if difference.low <= 0 <= difference.high:
        verdict += ", within the noise"
    return Verdict(target.text, str(figures[0]), str(figures[1]), str(difference), verdict)


def _judge_noise(rows: Sequence[Row], original: Row, level: str) -> Verdict:
    """Whether the windows are enough: the widest interval of an allocation at one level."""
    text = f"half of the 95 % interval of a loss, at most {_MOST_NOISE}"
    found = [
        interval.half_width
        for row in rows
        if row.suite == "allocation" and row.status == "ok" and f"@ {level}" in row.name
        for interval in (row.loss(original, "seen"), row.loss(original, "new"))
        if interval is not None
    ]
    if not found:
        return Verdict(text)
    worst = max(found)
    return Verdict(
        text,
        f"{worst:.2f}",
        f"{_MOST_NOISE:.2f}",
        f"{worst - _MOST_NOISE:+.2f}",
        "reached" if worst <= _MOST_NOISE else "missed",
    )
