"""`moe-compiler demo`."""

from __future__ import annotations

import argparse
from dataclasses import asdict

from moe_compiler.cli.output import write_json


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Defines the command's options."""
    parser.add_argument("--seen", default="docs,code", help="domains to calibrate on (default: %(default)s)")
    parser.add_argument("--json", metavar="FILE", help="also write the table to FILE")


def run(options: argparse.Namespace) -> None:
    """Runs the demo."""
    from moe_compiler.demo import run_demo

    result = run_demo(seen=[name.strip() for name in options.seen.split(",")])
    if options.json:
        write_json(asdict(result), options.json)
