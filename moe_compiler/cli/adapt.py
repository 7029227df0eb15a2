"""`moe-compiler adapt`: makes a profile for new data."""

from __future__ import annotations

import argparse
from pathlib import Path

from moe_compiler.cli.models import add_loading_options, load_compiled
from moe_compiler.cli.names import SOURCE_HELP, model_path
from moe_compiler.cli.output import print_json, print_text
from moe_compiler.cli.profile_files import add_profile, check_profile_name
from moe_compiler.cli.texts import add_text_options, positive, read_windows
from moe_compiler.runtime.rules import RULES


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Defines the command's options."""
    parser.add_argument("model", metavar="DIR", help="a model that `moe-compiler compile` saved")
    parser.add_argument("--data", metavar="SOURCE", required=True, help=f"the new data: {SOURCE_HELP}")
    parser.add_argument("--name", required=True, help="what to call the profile")
    parser.add_argument("--rule", choices=RULES, help="how to fill the pools (default: as chosen when compiling)")
    parser.add_argument("--original", metavar="MODEL", help="the original model, if it is no longer where it was")
    parser.add_argument("--tokens", type=positive, default=8_192, help="of the new data (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="draws the texts (default: %(default)s)")
    add_text_options(parser)
    parser.add_argument("-o", "--output", metavar="FILE", help="file of the profile (default: among those in DIR)")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    add_loading_options(parser)


def run(options: argparse.Namespace) -> None:
    """Adapts the model, saves the profile and prints what moved."""
    folder = Path(options.model)
    if options.output is None:
        check_profile_name(folder, options.name)
    elif not Path(options.output).parent.is_dir():
        raise FileNotFoundError(f"`--output` must lie in a folder that exists, but is {options.output}")
    model, tokenizer = load_compiled(options.model, options)
    if options.original is not None:
        model.runtime.attach_master(model_path(options.original))
    windows = read_windows(
        options.data,
        tokenizer,
        model,
        options,
        name=options.name,
        tokens=options.tokens,
        window=model.moe_report.config.sequence_length,
        seed=options.seed,
    )
    report = model.runtime.adapt(windows, rule=options.rule, name=options.name)
    if options.output is None:
        target = add_profile(folder, model, options.name)
    else:
        target = Path(options.output)
        model.runtime.save(options.name, target)
    if options.json:
        print_json({**report.to_dict(), "output": str(target)})
    else:
        print_text(f"{report}\nsaved in {target}")
