"""`moe-compiler report`: a page of figures."""

from __future__ import annotations

import argparse
from pathlib import Path

from moe_compiler.cli.models import load_compiled
from moe_compiler.cli.output import print_text
from moe_compiler.cli.parser import UsageError
from moe_compiler.report import write_report


def run(options: argparse.Namespace) -> None:
    """Writes the page."""
    if options.output is None and not Path(options.model).is_dir():
        raise UsageError(f"`--output` must be given, since the model {options.model!r} is no folder to write into")
    target = Path(options.output or Path(options.model) / "report.html")
    if not target.parent.is_dir():
        raise FileNotFoundError(f"`--output` must lie in a folder that exists, but {target.parent} does not")
    model, tokenizer = load_compiled(options.model, options)
    written = write_report(model, target, tokenizer=tokenizer, figures=options.figures)
    print_text(f"wrote {written}")
