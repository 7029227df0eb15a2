"""`moe-compiler adapt`: makes a profile for new data."""

from __future__ import annotations

import argparse
from pathlib import Path

from moe_compiler.cli.models import load_compiled
from moe_compiler.cli.names import model_path
from moe_compiler.cli.output import print_json, print_text
from moe_compiler.cli.profile_files import add_profile, check_profile_name
from moe_compiler.cli.texts import read_windows


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
