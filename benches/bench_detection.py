"""How soon the drift guard notices that the data have changed, and how often it is wrong while they have not.

For every ordered pair of domains: the first one's profile is in the pools, its text streams through the model, then the
second one's. Whether the data have changed is asked after every batch, by the policy that `on_drift` has by default.
Every domain has a profile, made from text that is not in the stream. Domains are the embedded ones, or the files
`NAME.calib.txt` and `NAME.eval.txt` of a folder, the first for calibration and profile, the second for the stream.

Run: python benches/bench_detection.py
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import permutations
from pathlib import Path
from statistics import median
from typing import Any

import torch
from adapt_models import EMBEDDED, compile_quickly, load, windows
from environment import Environment, pick_device
from harness import CsvWriter, markdown_table
from torch import Tensor

from moe_compiler.embedded import DOMAINS, load_text
from moe_compiler.runtime.detection import Detection, measure_detection
from moe_compiler.runtime.guard import DriftPolicy

CHARACTERS = 8
"""More than a token has in any domain."""


@dataclass(frozen=True)
class DetectionRow:
    """A stream that changes from one domain to another.

    Attributes:
        model: the model.
        steady: the domain before the change, whose profile is in the pools.
        changed: the domain after it.
        margin: how much nearer another profile must be, in bits.
        batch: tokens between two looks.
        steady_tokens: tokens before the change.
        checks: looks before the change.
        false_alarms: how many of these saw a change.
        largest_gap: the largest divergence, in bits, that the active profile then had over the nearest one.
        detected_after: tokens of the changed stream until a look saw it; empty if none did.
        changed_tokens: tokens after the change.
        nearest: the profile that was nearest at the end.
    """

    model: str
    steady: str
    changed: str
    margin: float
    batch: int
    steady_tokens: int
    checks: int
    false_alarms: int
    largest_gap: float
    detected_after: int | None
    changed_tokens: int
    nearest: str | None


def texts(folder: str | None, tokens: int) -> dict[str, tuple[str, str]]:
    """By domain, text for its profile and text for the stream.

    Raises:
        FileNotFoundError: the folder has fewer than two domains.
    """
    if folder is None:
        size = CHARACTERS * tokens
        return {name: (load_text(name, "train", size), load_text(name, "evaluation", size)) for name in DOMAINS}
    found = {}
    for stream in sorted(Path(folder).glob("*.eval.txt")):
        profile = stream.with_name(stream.name.replace(".eval.", ".calib."))
        if profile.is_file():
            found[stream.name.removesuffix(".eval.txt")] = (profile.read_text(), stream.read_text())
    if len(found) < 2:
        raise FileNotFoundError(f"`--domains` must hold NAME.calib.txt and NAME.eval.txt of two domains: {folder}")
    return found


def batches(windows_of_one: Iterable[Tensor], batch: int) -> list[Tensor]:
    """The windows as a stream of batches `(1, S)` of at most `batch` tokens."""
    return [piece[None] for piece in torch.cat(list(windows_of_one)).split(batch)]


def row_of(name: str, pair: tuple[str, str], found: Detection, policy: DriftPolicy, options: Any) -> DetectionRow:
    """What was found for one pair of domains."""
    return DetectionRow(
        model=name,
        steady=pair[0],
        changed=pair[1],
        margin=policy.margin,
        batch=options.batch,
        steady_tokens=found.steady_tokens,
        checks=found.checks,
        false_alarms=found.false_alarms,
        largest_gap=found.largest_gap,
        detected_after=found.detected_after,
        changed_tokens=options.changed_tokens,
        nearest=found.nearest,
    )


def table(rows: Sequence[DetectionRow]) -> str:
    """Tokens until each change was noticed: rows are the domains before it, columns those after it."""
    names = list(dict.fromkeys(row.steady for row in rows))
    by_pair: Mapping[tuple[str, str], DetectionRow] = {(row.steady, row.changed): row for row in rows}
    lines = []
    for steady in names:
        mine = [row for row in rows if row.steady == steady]
        cells = []
        for changed in names:
            row = by_pair.get((steady, changed))
            after = "–" if row is None else "not" if row.detected_after is None else f"{row.detected_after:,}"
            cells.append(after if row is None or row.nearest == changed else f"{after} ({row.nearest})")
        alarms = f"{mine[0].false_alarms} in {mine[0].checks}"
        lines.append((steady, *cells, alarms, f"{max(row.largest_gap for row in mine):.4f}"))
    return markdown_table(("from \\ to", *names, "false alarms", "largest gap, bits"), lines)


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default=EMBEDDED, help="folder of a model; the embedded one by default")
    parser.add_argument("--domains", help="folder of NAME.calib.txt and NAME.eval.txt; the embedded domains by default")
    parser.add_argument("--seen", nargs="+", help="domains to calibrate on; the first two by default")
    parser.add_argument("--calibration-tokens", type=int, default=4096, help="of each domain seen")
    parser.add_argument("--profile-tokens", type=int, default=4096, help="of each domain, for its profile")
    parser.add_argument("--steady-tokens", type=int, default=4096, help="before the change")
    parser.add_argument("--changed-tokens", type=int, default=2048, help="after the change")
    parser.add_argument("--batch", type=int, default=64, help="tokens between two looks")
    parser.add_argument("--margin", type=float, default=DriftPolicy.margin, help="in bits")
    parser.add_argument("--device", help="cpu or cuda; the default is the GPU where there is one")
    parser.add_argument("--csv", help="file to write")
    parser.add_argument("--quick", action="store_true", help="few tokens, to see that everything runs")
    options = parser.parse_args(arguments)
    if options.quick:
        options.calibration_tokens = options.profile_tokens = 256
        options.steady_tokens = options.changed_tokens = 768
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    """Measures and prints; returns 0."""
    options = parse(arguments)
    device = pick_device(options.device)
    environment = Environment.of(device)
    print(environment)
    domains = texts(options.domains, max(options.calibration_tokens, options.profile_tokens, options.steady_tokens))
    seen = options.seen or list(domains)[:2]
    model, tokenizer = load(options.model, device)

    def tokens(name: str, part: int, count: int) -> list[Tensor]:
        return windows(domains[name][part], count, tokenizer, model, name=name)

    compile_quickly(
        model, {name: tokens(name, 0, options.calibration_tokens) for name in seen}, pool=0.01, master="memory"
    )
    for name in domains:
        model.runtime.adapt(tokens(name, 0, options.profile_tokens), name=name, rule="restore")
    policy = DriftPolicy("report", margin=options.margin)
    rows = []
    with CsvWriter(options.csv, DetectionRow, environment) as writer:
        for pair in permutations(domains, 2):
            model.runtime.switch(pair[0])
            steady = batches(tokens(pair[0], 1, options.steady_tokens), options.batch)
            changed = batches(tokens(pair[1], 1, options.changed_tokens), options.batch)
            rows.append(
                row_of(options.model, pair, measure_detection(model.runtime, policy, steady, changed), policy, options)
            )
            writer.write(rows[-1])
    print(
        f"\nTokens until a change was noticed (another nearest profile at the end in brackets); {options.model}, "
        f"margin {policy.margin} bits, a look every {options.batch} tokens, {options.steady_tokens:,} tokens before "
        "each change\n"
    )
    print(table(rows))
    noticed = [row.detected_after for row in rows if row.detected_after is not None]
    streams = {row.steady: row for row in rows}.values()
    print(
        f"\n{len(noticed)} of {len(rows)} changes noticed, after {median(noticed) if noticed else 0:,.0f} tokens in "
        f"the median and {max(noticed, default=0):,} at most; {sum(row.false_alarms for row in streams)} false alarms "
        f"in {sum(row.checks for row in streams)} looks"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
