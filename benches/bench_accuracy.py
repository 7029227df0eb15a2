"""What quantizing costs in perplexity: quantizers, allocations, rules of `adapt`, seen and new domains, with intervals.

Run: python benches/bench_accuracy.py --model PATH --domains FOLDER --seen brown,reviews,web --suite all --csv FILE
"""

from __future__ import annotations

import argparse
import dataclasses
import fnmatch
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from accuracy_compile import Options
from accuracy_data import EMBEDDED, Texts, choose_domains, find_domains, load_original, read_domains
from accuracy_peers import comparable, find_reference, read_peers
from accuracy_report import report, targets_table
from accuracy_rows import Row, RowFile
from accuracy_run import Workbench
from accuracy_suites import LEVELS, SUITES, Case, build_cases, target_of
from accuracy_targets import judge
from environment import Environment, pick_device

from moe_compiler import CompileConfig
from moe_compiler.progress import RichProgress

QUICK = {"tokens": 512, "adapt_tokens": 512, "eval_tokens": 512}


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    add = parser.add_argument
    add("--model", default=EMBEDDED, help="folder of the original model, its name on the hub, or `embedded`")
    add("--domains", nargs="+", default=[EMBEDDED], metavar="FOLDER or NAME=CALIBRATION,EVALUATION",
        help="a folder with NAME.calib.txt and NAME.eval.txt, pairs of files or sources, or `embedded`")  # fmt: skip
    add("--seen", type=_names, help="domains to calibrate on, with commas between; `docs,code` for `embedded`")
    add("--new", type=_names, help="the new domains; all others by default")
    add("--suite", type=_names, default=("all",), help=f"some of {', '.join(SUITES)}, with commas between, or all")
    add("--only", nargs="+", metavar="PATTERN", help="only cases whose names match, such as 'budget*'")
    add("--levels", type=_names, help="effective bits of the suite allocation, such as gptq-3-0.3 or 3.05; "
        f"{','.join(LEVELS)} by default, or those of the reference")  # fmt: skip
    add("--tokens", type=int, default=8192, help="of each seen domain, to calibrate on")
    add("--adapt-tokens", type=int, default=8192, help="of each new domain, to adapt to")
    add("--eval-tokens", type=int, default=16384, help="held-out tokens of each domain, to evaluate on")
    add("--window", type=int, default=256, help="tokens per window")
    add("--seed", type=int, default=0)
    add("--set", nargs="+", default=[], metavar="FIELD=VALUE", dest="overrides",
        help="fields of CompileConfig for all cases, values as JSON or words")  # fmt: skip
    add("--dtype", default="auto", help="of the original's weights: auto is the checkpoint's")
    add("--device", help="cpu or cuda; the default is the GPU where there is one")
    add("--csv", help="file for the rows, each written as soon as it is known")
    add("--resume", action="store_true", help="keep the rows that the CSV file has")
    add("--table", help="Markdown file to write")
    add("--plot", help="image file to write; needs matplotlib")
    add("--peers", help="CSV file of other projects' rows, to show beside ours")
    add("--reference", default="GPTQ-3", help="row to beat: one of --peers by its name, or one of the quantizers")
    add("--quick", action="store_true", help="few tokens, to see that everything runs")
    options = parser.parse_args(arguments)
    if options.quick:
        vars(options).update(QUICK)
    if options.seen is None:
        if options.domains != [EMBEDDED]:
            parser.error("--seen is needed where --domains are given")
        options.seen = ("docs", "code")
    if options.resume and options.csv is None:
        parser.error("--resume needs --csv")
    options.suite = SUITES if options.suite == ("all",) else options.suite
    return options


def overrides_of(pairs: Sequence[str], window: int) -> dict[str, Any]:
    """The fields of `CompileConfig` that `FIELD=VALUE` arguments set; lists become tuples.

    Args:
        pairs: the arguments.
        window: tokens per window, which is also the length of a calibration sample.

    Raises:
        ValueError: an argument has another form, or a value is out of range.
        TypeError: there is no such field.
    """
    found = {}
    for pair in pairs:
        name, sign, text = pair.partition("=")
        if not sign or not name:
            raise ValueError(f"`set` must be like pool_fraction=0.02, but is {pair!r}")
        try:
            value = json.loads(text)
        except json.JSONDecodeError:
            value = text
        found[name] = value
    CompileConfig().with_overrides(**{"sequence_length": window} | found)
    return found


def chosen_cases(options: argparse.Namespace, domains: Sequence[str], levels: Sequence[str]) -> list[Case]:
    """The cases to measure: always the original model's, which all losses are against.

    Raises:
        ValueError: there is no such suite, no such level, or no case of that name.
    """
    for level in levels:
        target_of(level, 0.0, 128)
    cases = build_cases(options.suite, domains, levels)
    if options.only is None:
        return cases
    found = [case for case in cases if any(fnmatch.fnmatch(case.name, pattern) for pattern in options.only)]
    if not found:
        raise ValueError(f"`only` must match some of {', '.join(case.name for case in cases)}, but is {options.only}")
    return [cases[0], *(case for case in found if case != cases[0])]


def measure(
    options: argparse.Namespace,
    cases: Sequence[Case],
    file: RowFile,
    texts: Texts,
    model: Any,
) -> int:
    """Measures the cases; returns how many rows failed."""
    config = Options(
        model=options.model,
        dtype=options.dtype,
        window=options.window,
        seed=options.seed,
        overrides=overrides_of(options.overrides, options.window),
    )
    progress = RichProgress() if sys.stderr.isatty() else None
    return Workbench(model, texts, config, file, say=_say, progress=progress).run(cases)


def main(arguments: Sequence[str] | None = None) -> int:
    """Measures and prints; returns 1 if a row failed."""
    start = time.perf_counter()
    options = parse(arguments)
    overrides_of(options.overrides, options.window)
    sources = find_domains(options.domains)
    seen, new = choose_domains(sources, options.seen, options.new)
    peers = read_peers(options.peers)
    reference = find_reference(peers, options.reference)
    levels = options.levels or LEVELS
    if options.levels is None and reference is not None and reference.effective_bits is not None:
        bits = reference.effective_bits
        levels = (f"{bits:.2f}", f"{bits - 0.3:.2f}", *LEVELS[2:])
    cases = chosen_cases(options, (*seen, *new), levels)
    device = pick_device(options.device)
    environment = Environment.of(device)
    print(environment, flush=True)
    model, tokenizer = load_original(options.model, options.dtype, device)
    texts = read_domains(
        sources, seen, new, tokenizer, window=options.window, calibration_tokens=options.tokens,
        adapt_tokens=options.adapt_tokens, evaluation_tokens=options.eval_tokens,
    )  # fmt: skip
    conditions = texts.describe(options.window)
    print(f"\n{conditions}\n", flush=True)
    record = {name: str(value) for name, value in dataclasses.asdict(environment).items()}
    file = RowFile(options.csv, (*seen, *new), resume=options.resume, environment=record)
    failed = measure(options, cases, file, texts, model)
    finish(options, file, peers, levels, conditions)
    print(f"\n{time.perf_counter() - start:.0f} s in all")
    return 1 if failed else 0


def finish(
    options: argparse.Namespace,
    file: RowFile,
    peers: Sequence[Row],
    levels: Sequence[str],
    conditions: str,
) -> None:
    """Writes the table and the plot, and prints the targets."""
    original = file.original
    if original is None:
        print("\nThe original model has no figures, so nothing can be compared.")
        return
    rows = [*file.rows, *comparable(peers, original)]
    suite = "peers" if peers else "quantizers"
    verdicts = judge(rows, (suite, options.reference), original, levels)
    text = report(rows, original, verdicts, conditions)
    if options.table is not None:
        Path(options.table).parent.mkdir(parents=True, exist_ok=True)
        Path(options.table).write_text(text)
    if options.plot is not None:
        from accuracy_plot import draw  # needs matplotlib, which nothing else does

        for path in draw(rows, original, options.plot, conditions):
            print(f"\ndrew {path}")
    print("\n" + (targets_table(verdicts) if options.table is not None else text))


def _say(line: str) -> None:
    print(line, flush=True)


def _names(text: str) -> tuple[str, ...]:
    return tuple(name for name in text.split(",") if name)


if __name__ == "__main__":
    sys.exit(main())
