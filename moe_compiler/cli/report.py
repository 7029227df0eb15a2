"""`moe-compiler report`: a page of figures."""

from __future__ import annotations

import argparse
from pathlib import Path

from moe_compiler.cli.models import add_loading_options, load_compiled
from moe_compiler.cli.output import print_text
from moe_compiler.report import write_report


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Defines the command's options."""
    parser.add_argument("model", metavar="DIR", help="a model that `moe-compiler compile` saved")
    parser.add_argument("-o", "--output", metavar="FILE", help="the page (default: report.html in DIR)")
    parser.add_argument("--figures", metavar="DIR", help="folder to write the figures to as well, as PNG files")
    add_loading_options(parser)


def run(options: argparse.Namespace) -> None:
    """Writes the page."""
    target = Path(options.output or Path(options.model) / "report.html")
    if not target.parent.is_dir():
        raise FileNotFoundError(f"`--output` must lie in a folder that exists, but {target.parent} does not")
    model, tokenizer = load_compiled(options.model, options)
    written = write_report(model, target, tokenizer=tokenizer, figures=options.figures)
    print_text(f"wrote {written}")
