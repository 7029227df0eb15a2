"""Every table and figure of the two papers as a command: measured on one model, beside what the papers print.

Run: python benches/bench_paper.py d-table1 m-table2 --model PATH --domains FOLDER --seen brown,web --csv FILE
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType

from accuracy_data import EMBEDDED, choose_domains, find_domains, load_original, read_domains
from accuracy_suites import target_of
from environment import Environment, pick_device
from harness import CsvWriter
from paper_figures import d_figures3_5, m_figures2_5
from paper_perplexity import d_table1, d_table3, m_table2
from paper_pool import d_figure7
from paper_published import DYNAMO, MOQA, TASKS
from paper_results import Finding, PaperRow, write_json
from paper_speed import d_figure8, d_figure9
from paper_study import Study
from paper_zero_shot import d_table2, m_table3

EXPERIMENTS: Mapping[str, Callable[[Study], Finding]] = MappingProxyType(
    {
        "d-table1": d_table1,
        "d-table2": d_table2,
        "d-table3": d_table3,
        "d-figures3-5": d_figures3_5,
        "d-figure7": d_figure7,
        "d-figure8": d_figure8,
        "d-figure9": d_figure9,
        "m-table2": m_table2,
        "m-table3": m_table3,
        "m-figures2-5": m_figures2_5,
    }
)
"""By name; `d` is DynaMo, `m` is MoQa."""
ALL = "all"
QUICK = {
    "tokens": 256, "adapt_tokens": 256, "eval_tokens": 256, "new_tokens": 8, "speed_tokens": 4, "prompt": 8,
    "rounds": 1, "seconds": 0.0, "limit": 4,
}  # fmt: skip


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        epilog=f"d: {DYNAMO}; m: {MOQA}",
    )  # fmt: skip
    add = parser.add_argument
    add("experiments", nargs="+", choices=(*EXPERIMENTS, ALL), metavar="EXPERIMENT",
        help=f"some of {', '.join(EXPERIMENTS)}, or all")  # fmt: skip
    add("--model", default=EMBEDDED, help="folder of the original model, its name on the hub, or `embedded`")
    add("--domains", nargs="+", default=[EMBEDDED], metavar="FOLDER or NAME=CALIBRATION,EVALUATION",
        help="a folder with NAME.calib.txt and NAME.eval.txt, pairs of files or sources, or `embedded`")  # fmt: skip
    add("--seen", type=_names, help="domains to calibrate on, with commas between; `docs,code` for `embedded`")
    add("--new", type=_names, help="the new domains; all others by default")
    add("--bits", default="paper", help="of DynaMo and MoQa: paper (2.95 code bits), own (what the method's rule "
        "gives), or a level of bench_accuracy.py such as codes=3.0, gptq-3 or 3.2 (effective)")  # fmt: skip
    add("--tokens", type=int, default=4096, help="of each seen domain, to calibrate on")
    add("--adapt-tokens", type=int, default=4096, help="of each new domain or task, to switch to")
    add("--eval-tokens", type=int, default=8192, help="held-out tokens of each domain, to evaluate on")
    add("--window", type=int, default=256, help="tokens per window")
    add("--task-data", metavar="DIR", help="files of the zero-shot tasks, see `moe_compiler.zero_shot`; from the hub "
        "without it")  # fmt: skip
    add("--tasks", type=_names, default=TASKS, help="zero-shot tasks, with commas between")
    add("--limit", type=int, help="documents of each task; all by default")
    add("--prompt", type=int, default=128, help="tokens of the prompt of d-figure8")
    add("--speed-tokens", type=int, default=64, help="tokens to generate for d-figure8")
    add("--seconds", type=float, default=10.0, help="for the rounds of d-figure8")
    add("--new-tokens", type=int, default=1024, help="tokens to generate for d-figure9")
    add("--rounds", type=int, default=3, help="at least so many, of what is timed")
    add("--dtype", default="auto", help="of the original's weights: auto is the checkpoint's")
    add("--seed", type=int, default=0)
    add("--device", help="cpu or cuda; the default is the GPU where there is one")
    add("--csv", help="file for all figures, those of the papers too")
    add("--json", help="file for all figures and readings")
    add("--quick", action="store_true", help="few tokens and tiny sizes, to see that everything runs")
    options = parser.parse_args(arguments)
    if options.quick:
        vars(options).update(QUICK)
    if options.seen is None:
        if options.domains != [EMBEDDED]:
            parser.error("--seen is needed where --domains are given")
        options.seen = ("docs", "code")
    if ALL in options.experiments:
        options.experiments = list(EXPERIMENTS)
    return options


def build_study(options: argparse.Namespace) -> Study:
    """Loads the model and reads the texts.

    Raises:
        ValueError: an option is wrong, or a text too short.
        FileNotFoundError: a text is not there.
        OSError: there is no such model.
    """
    if options.bits not in ("paper", "own"):
        target_of(options.bits, 0.0, 128)
    sources = find_domains(options.domains)
    seen, new = choose_domains(sources, options.seen, options.new)
    model, tokenizer = load_original(options.model, options.dtype, pick_device(options.device))
    texts = read_domains(
        sources, seen, new, tokenizer, window=options.window, calibration_tokens=options.tokens,
        adapt_tokens=options.adapt_tokens, evaluation_tokens=options.eval_tokens,
    )  # fmt: skip
    return Study(model, tokenizer, texts, options)


def main(arguments: Sequence[str] | None = None) -> int:
    """Measures and prints; returns 1 if an experiment failed."""
    options = parse(arguments)
    environment = Environment.of(pick_device(options.device))
    print(environment, flush=True)
    study = build_study(options)
    findings: list[Finding] = []
    failed: dict[str, str] = {}
    with CsvWriter(options.csv, PaperRow, environment) as writer:
        for name in dict.fromkeys(options.experiments):
            start = time.perf_counter()
            try:
                finding = EXPERIMENTS[name](study)
            except (ValueError, RuntimeError, FileNotFoundError, FloatingPointError) as error:
                failed[name] = str(error)
                print(f"\n{name} FAILED: {error}", flush=True)
                continue
            print(f"\n{finding}\n\n{name} took {time.perf_counter() - start:.0f} s", flush=True)
            findings.append(finding)
            for row in finding.rows:
                writer.write(row)
    if options.json is not None:
        write_json(options.json, findings)
    if failed:
        print(f"\n{len(failed)} of {len(failed) + len(findings)} experiments failed: {', '.join(failed)}")
    return 1 if failed else 0


def _names(text: str) -> tuple[str, ...]:
    return tuple(name for name in text.split(",") if name)


if __name__ == "__main__":
    sys.exit(main())
