"""Other projects' rows, from a file that `benches/peers/run.py` wrote, made comparable with ours."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace

from accuracy_rows import ORIGINAL, Row, read_rows

TOLERANCE = 0.01
"""How far, relatively, their original model's loss on a window may be from ours: rounding, not other text."""


def read_peers(path: str | os.PathLike[str] | None) -> list[Row]:
    """The rows of a file, the original model's among them; none without a file.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it holds no accuracy rows of an original model and others.
    """
    if path is None:
        return []
    rows = read_rows(path)
    if not any(row.name == ORIGINAL and row.nll for row in rows):
        raise ValueError(f"`peers` must have a row of the original model with figures, but {path} has none")
    return rows


def find_reference(peers: Sequence[Row], name: str) -> Row | None:
    """The peer of that name, or `None` where there are no peers.

    Raises:
        ValueError: there are peers, none of them with that name and figures.
    """
    found = next((row for row in peers if row.name == name and row.nll), None)
    if peers and found is None:
        names = ", ".join(row.name for row in peers if row.nll and row.name != ORIGINAL)
        raise ValueError(f"`reference` must be one of {names}, but is {name!r}")
    return found


def comparable(peers: Sequence[Row], original: Row) -> list[Row]:
    """The peers' rows on the windows of `original`: every n-th of theirs, if they have n times as many.

    Rows on other text, too few windows or without a domain lose their figures, and their status says why.
    """
    theirs = next((row for row in peers if row.name == ORIGINAL), None)
    if theirs is None:
        return []
    reason = _difference(_cut(theirs, original), original)
    found = []
    for row in peers:
        if row.name != ORIGINAL:
            why = reason or (_difference(_cut(row, original), original, texts=False) if row.nll else None)
            found.append(replace(row, status=why, nll={}) if why else _cut(row, original))
    return found


def _cut(row: Row, original: Row) -> Row:
    nll = {
        name: losses[:: max(1, len(losses) // len(original.nll[name]))]
        for name, losses in row.nll.items()
        if name in original.nll
    }
    return replace(row, nll=nll, seen=original.seen, new=original.new, seed=original.seed)


def _difference(row: Row, original: Row, texts: bool = True) -> str | None:
    """What forbids a comparison window by window."""
    if row.window != original.window:
        return f"measured in windows of {row.window} tokens, here they have {original.window}"
    for name, losses in original.nll.items():
        found = row.nll.get(name, ())
        if len(found) != len(losses):
            return f"measured on {len(found)} windows of {name}, here there are {len(losses)}"
        if texts and any(abs(one - other) > TOLERANCE * other for one, other in zip(found, losses, strict=True)):
            return f"measured on other windows of {name}: the original model's loss differs"
    return None
