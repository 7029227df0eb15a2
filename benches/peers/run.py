"""Quantizes a Mixture-of-Experts model with other projects' packages as they ship, and measures what it loses.

    python benches/peers/run.py --model DIR --domains FOLDER --seen brown,reviews,web --csv FILE

Every package runs in a virtual environment of its own, on the same calibration tokens; the same code measures all of
them on the same windows. See README.md beside this file.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path += [str(HERE), str(HERE.parent)]

import torch  # noqa: E402
from accuracy_data import choose_domains, find_domains  # noqa: E402
from accuracy_rows import ORIGINAL, Row, RowFile  # noqa: E402
from environment import Environment  # noqa: E402
from registry import PEERS, PLAN, find_peers  # noqa: E402
from runner import model_name, original_row, prepare, run_peer  # noqa: E402
from table import markdown_table  # noqa: E402
from virtual_environments import DEFAULT_FOLDER  # noqa: E402


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the peers and prints the table; 1 if none of them gave figures."""
    options = _parser().parse_args(arguments)
    peers = find_peers(options.peers)
    sources = find_domains(options.domains)
    seen, new = choose_domains(sources, options.seen, options.new)
    common = Row(
        suite="peers", name=ORIGINAL, model=model_name(options.model), tool="", calibration_tokens=options.tokens,
        window=options.window, seed=options.seed, seen=seen, new=new,
    )  # fmt: skip
    rows = RowFile(
        options.csv, (*seen, *new), resume=options.resume, environment=asdict(Environment.of(torch.device("cpu")))
    )
    with tempfile.TemporaryDirectory(prefix="peers-") as scratch:
        task = prepare(common, options.model, sources, options.eval_tokens, Path(scratch))
        if rows.original is None:
            rows.append(original_row(common, task))
        for name, peer in peers.items():
            if rows.has(common.suite, name):
                continue
            if PLAN in peer.settings.values() and options.plan is None:
                print(f"{name}: left out, since its widths come from a plan and there is no --plan", flush=True)
                continue
            row = run_peer(peer, replace(common, name=name), task, options.environments, options.plan, options.timeout)
            rows.append(row)
            print(f"{name}: {row.status}", flush=True)
    table = markdown_table(rows.rows)
    if options.table is not None:
        options.table.write_text(table)
    print(table)
    return 0 if any(row.status == "ok" and row.name != ORIGINAL for row in rows.rows) else 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__.partition("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    add = parser.add_argument
    add("--model", required=True, help="folder of the original model, or its name on the hub")
    add("--domains", required=True, nargs="+", metavar="FOLDER or NAME=CALIBRATION,EVALUATION",
        help="a folder with NAME.calib.txt and NAME.eval.txt, or pairs of files")  # fmt: skip
    add("--seen", required=True, type=_names, help="domains to calibrate on, with commas between")
    add("--new", type=_names, help="domains to measure besides; all others by default")
    add("--peers", default="all", help=f"some of {', '.join(PEERS)}")
    add("--plan", type=Path, help="JSON file of widths for gptqmodel-mixed, see plan_rules.py")
    add("--tokens", type=int, default=32768, help="tokens of each seen domain to calibrate on")
    add("--eval-tokens", type=int, default=32768, help="tokens of each domain to measure on")
    add("--window", type=int, default=256, help="tokens per window, of calibration and evaluation")
    add("--seed", type=int, default=0)
    add("--environments", type=Path, default=DEFAULT_FOLDER, help="where the virtual environments are kept")
    add("--timeout", type=int, default=1800, help="seconds that one peer may take")
    add("--csv", type=Path, help="where rows are written, each as soon as it is known")
    add("--table", type=Path, help="where the Markdown table is written")
    add("--resume", action="store_true", help="keep the rows that the CSV file has")
    return parser


def _names(text: str) -> tuple[str, ...]:
    return tuple(name for name in text.split(",") if name)


if __name__ == "__main__":
    sys.exit(main())
