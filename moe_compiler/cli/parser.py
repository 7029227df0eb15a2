"""What can be typed: the commands, each with an example; a command's own module is imported when it runs."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from importlib import import_module

import moe_compiler
from moe_compiler.cli.options import ADD_OPTIONS


class UsageError(Exception):
    """What was typed cannot be meant; the message says why."""


@dataclass(frozen=True)
class Command:
    """One command.

    Attributes:
        summary: what it does, a line.
        example: the command with typical arguments.
    """

    summary: str
    example: str


COMMANDS: Mapping[str, Command] = {
    "compile": Command(
        "quantize the experts of a model and save it",
        "moe-compiler compile embedded --data docs=embedded:docs --data code=embedded:code --evaluate -o compiled",
    ),
    "eval": Command(
        "measure perplexity or zero-shot tasks, of two models side by side",
        "moe-compiler eval embedded compiled --data docs=embedded:docs --data records=embedded:records",
    ),
    "adapt": Command(
        "make a profile for new data and save it beside the model",
        "moe-compiler adapt compiled --data embedded:records --name records",
    ),
    "inspect": Command(
        "show graphs, widths, coverage and profiles of a compiled model",
        "moe-compiler inspect compiled --graphs --layer model.layers.0.mlp",
    ),
    "report": Command(
        "write an HTML page with the figures of a compiled model",
        "moe-compiler report compiled -o report.html",
    ),
    "generate": Command(
        "continue a text with a compiled or an original model",
        "moe-compiler generate compiled --prompt 'def read(' --max-new-tokens 40",
    ),
    "bench": Command(
        "measure speed and memory of a compiled model against the original",
        "moe-compiler bench compiled --original embedded",
    ),
    "serve": Command(
        "serve a model over HTTP with OpenAI's API",
        "moe-compiler serve compiled --port 8000 --on-drift switch",
    ),
    "demo": Command(
        "compile the embedded model on two domains, adapt it to the others, and print what that gave",
        "moe-compiler demo --seen docs,code --json result.json",
    ),
}


def build_parser(arguments: Sequence[str]) -> argparse.ArgumentParser:
    """The parser of the command line.

    Args:
        arguments: what was typed. The options of `CompileConfig` are defined only where the command takes them, since
            that imports torch.
    """
    parser = argparse.ArgumentParser(
        prog="moe-compiler",
        description=moe_compiler.__doc__.splitlines()[0] if moe_compiler.__doc__ else None,
        epilog="moe-compiler COMMAND --help says more. The model `embedded` and the texts `embedded:docs`, "
        "`embedded:code` and so on come with the package, so that every command can be tried without a download.",
    )
    parser.add_argument("--version", action="version", version=f"moe-compiler {moe_compiler.__version__}")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    chosen = next((argument for argument in arguments if not argument.startswith("-")), None)
    for name, command in COMMANDS.items():
        one = commands.add_parser(
            name,
            help=command.summary,
            description=f"{command.summary[0].upper()}{command.summary[1:]}.",
            epilog=f"example: {command.example}",
        )
        one.add_argument(
            "--debug", action="store_true", default=argparse.SUPPRESS, help="show the traceback of an error"
        )
        ADD_OPTIONS[name](one)
        if name == chosen == "compile":
            import_module("moe_compiler.cli.config_options").add_config_options(one)
        one.set_defaults(run=partial(_run, name))
    return parser


def _run(name: str, options: argparse.Namespace) -> None:
    import_module(f"moe_compiler.cli.{name}").run(options)
