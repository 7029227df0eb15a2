"""The command `moe-compiler`."""

from __future__ import annotations

import argparse
import json
import os
import sys
import warnings
from collections.abc import Sequence
from dataclasses import asdict

import moe_compiler


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit code: 0, 1 for an error, 2 for wrong usage."""
    parser = argparse.ArgumentParser(prog="moe-compiler", description=moe_compiler.__doc__)
    parser.add_argument("--version", action="version", version=f"moe-compiler {moe_compiler.__version__}")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    commands = parser.add_subparsers(dest="command", required=True)
    demo = commands.add_parser(
        "demo",
        help="compile the embedded model on two domains, adapt it to the others, and print what that gave",
        epilog="example: moe-compiler demo --seen docs,code --json result.json",
    )
    demo.add_argument("--seen", default="docs,code", help="domains to calibrate on (default: %(default)s)")
    demo.add_argument("--json", metavar="FILE", help="also write the table to FILE")
    options = parser.parse_args(arguments)
    try:
        return _demo(options)
    except Exception as error:
        if options.debug:
            raise
        print(f"moe-compiler: {type(error).__name__}: {error}", file=sys.stderr)
        return 1


def _demo(options: argparse.Namespace) -> int:
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # threads that spin while they wait slow a busy machine down
    warnings.filterwarnings("ignore", message=".*TRITON_DEFAULT_FP_FUSION.*")
    from moe_compiler.demo import run_demo  # torch and transformers load only when a command needs them

    result = run_demo(seen=[name.strip() for name in options.seen.split(",")])
    if options.json:
        with open(options.json, "w") as file:
            json.dump(asdict(result), file, indent=2)
    return 0


if __name__ == "__main__":
    sys.exit(main())
