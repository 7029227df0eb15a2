"""`moe-compiler demo`."""

from __future__ import annotations

import argparse
from dataclasses import asdict

from moe_compiler.cli.output import write_json


def run(options: argparse.Namespace) -> None:
    """Runs the demo."""
    from moe_compiler.demo import run_demo

    result = run_demo(seen=[name.strip() for name in options.seen.split(",")])
    if options.json:
        write_json(asdict(result), options.json)
