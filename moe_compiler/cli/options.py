"""The options of every command. Nothing here imports torch, so that `--help` answers at once."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping

from moe_compiler.embedded import DOMAINS

EMBEDDED = "embedded"
MODEL_HELP = f"a folder, a model of the hub, or `{EMBEDDED}`: the small model that comes with the package"
COMPILED_HELP = "a model that `moe-compiler compile` saved"
SOURCE_HELP = (
    "a file or folder of texts (.txt, .jsonl, .parquet, .csv), a data set of the hub (wikitext2, c4, ptb, "
    f"name:config:split), or {EMBEDDED}:DOMAIN with the domain {', '.join(DOMAINS)}"
)


def positive(text: str) -> int:
    """Reads a number of at least 1.

    Raises:
        argparse.ArgumentTypeError: it is none.
    """
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a number of at least 1, but is {text!r}")
    return int(text)


def named_source(text: str) -> tuple[str, str]:
    """Splits `NAME=SOURCE`.

    Raises:
        argparse.ArgumentTypeError: it is not of that form.
    """
    name, _, source = text.partition("=")
    if not name or not source:
        raise argparse.ArgumentTypeError(f"must be NAME=SOURCE, as docs=embedded:docs, but is {text!r}")
    return name, source


def rule(text: str) -> str:
    """Reads the name of a rule of `adapt`.

    Raises:
        argparse.ArgumentTypeError: there is no such rule.
    """
    from moe_compiler.runtime.rules import RULES  # imports torch

    if text not in RULES:
        raise argparse.ArgumentTypeError(f"must be one of {', '.join(RULES)}, but is {text!r}")
    return text


def _compile(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", help=MODEL_HELP)
    parser.add_argument(
        "--data",
        metavar="NAME=SOURCE",
        type=named_source,
        action="append",
        required=True,
        help=f"a dataset to calibrate on, once for each. SOURCE: {SOURCE_HELP}",
    )
    parser.add_argument("-o", "--output", metavar="DIR", required=True, help="folder to save the compiled model in")
    parser.add_argument("--overwrite", action="store_true", help="save into a folder that is not empty")
    parser.add_argument("--tokens", type=positive, default=32_768, help="of each dataset (default: %(default)s)")
    _text(parser)
    parser.add_argument("--evaluate", action="store_true", help="measure perplexity before and after, on held-out text")
    parser.add_argument(
        "--eval-data",
        metavar="NAME=SOURCE",
        type=named_source,
        action="append",
        help="measure on these (default: on what follows the calibration data, which were not calibrated on)",
    )
    parser.add_argument("--eval-split", metavar="SPLIT", help="split of the --eval-data (default: as --split)")
    parser.add_argument("--eval-tokens", type=positive, default=16_384, help="of each (default: %(default)s)")
    _json(parser)
    _loading(parser)


def _eval(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("models", metavar="MODEL", nargs="+", help=f"one or two: {MODEL_HELP}")
    parser.add_argument(
        "--data",
        metavar="NAME=SOURCE",
        type=named_source,
        action="append",
        default=[],
        help=f"text to measure perplexity on, once for each. SOURCE: {SOURCE_HELP}",
    )
    parser.add_argument("--tokens", type=positive, default=16_384, help="of each dataset (default: %(default)s)")
    parser.add_argument("--window", type=positive, default=512, help="tokens per window (default: %(default)s)")
    _text(parser)
    parser.add_argument("--profile", metavar="NAME", help="profile to measure the compiled model with, or its file")
    parser.add_argument("--tasks", metavar="TASK,TASK", help="zero-shot tasks of lm-eval, as piqa,rte")
    parser.add_argument("--task-data", metavar="DIR", help="folder with local files of the tasks (default: the hub's)")
    parser.add_argument("--limit", type=positive, metavar="N", help="documents of each task, drawn (default: all)")
    parser.add_argument("--shots", type=int, default=0, help="worked examples before each document (default: 0)")
    parser.add_argument("--batch-size", type=positive, default=8, help="of the tasks (default: %(default)s)")
    _json(parser)
    _loading(parser)


def _adapt(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="DIR", help=COMPILED_HELP)
    parser.add_argument("--data", metavar="SOURCE", required=True, help=f"the new data: {SOURCE_HELP}")
    parser.add_argument("--name", required=True, help="what to call the profile")
    parser.add_argument(
        "--rule",
        type=rule,
        help="how to fill the pools: lowrank, compensate, restore or cluster (default: as chosen when compiling)",
    )
    parser.add_argument("--original", metavar="MODEL", help="the original model, if it is no longer where it was")
    parser.add_argument("--tokens", type=positive, default=8_192, help="of the new data (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="draws the texts (default: %(default)s)")
    _text(parser)
    parser.add_argument("-o", "--output", metavar="FILE", help="file of the profile (default: among those in DIR)")
    _json(parser)
    _loading(parser)


def _inspect(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="DIR", help=COMPILED_HELP)
    parser.add_argument("--graphs", action="store_true", help="print each MoE block's graph before and after")
    parser.add_argument("--plan", action="store_true", help="list the width of every expert")
    parser.add_argument("--coverage", action="store_true", help="list every linear of the MoE blocks")
    parser.add_argument("--layer", metavar="PATH", action="append", help="only this MoE block, once for each")
    parser.add_argument("--json", action="store_true", help="print JSON: all of it, the graphs only with --graphs")
    _loading(parser)


def _report(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="DIR", help=COMPILED_HELP)
    parser.add_argument("-o", "--output", metavar="FILE", help="the page (default: report.html in DIR)")
    parser.add_argument("--figures", metavar="FOLDER", help="folder to write the figures to as well, as PNG files")
    _loading(parser)


def _generate(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", help=MODEL_HELP)
    text = parser.add_mutually_exclusive_group(required=True)
    text.add_argument("--prompt", metavar="TEXT", help="what to continue")
    text.add_argument("--prompt-file", metavar="FILE", help="a file of what to continue; - is standard input")
    parser.add_argument(
        "--chat", action="store_true", help="put the prompt into the model's chat template, as a user's turn"
    )
    parser.add_argument("--profile", metavar="NAME", help="profile to generate with, or its file")
    parser.add_argument("--max-new-tokens", type=positive, default=128, help="at most so many (default: %(default)s)")
    parser.add_argument(
        "--temperature", type=float, default=0.0, help="0 takes the likeliest token (default: %(default)s)"
    )
    parser.add_argument("--top-p", type=float, default=1.0, help="of sampling (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of sampling (default: %(default)s)")
    parser.add_argument("--json", action="store_true", help="print JSON at the end instead of text as it comes")
    _loading(parser)


def _bench(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="DIR", help=COMPILED_HELP)
    parser.add_argument("--original", metavar="MODEL", help=f"the model to compare with: {MODEL_HELP}")
    parser.add_argument("--data", metavar="SOURCE", default="embedded:docs", help=f"text of the prompts: {SOURCE_HELP}")
    parser.add_argument("--batch", type=positive, default=1, help="sequences at a time (default: %(default)s)")
    parser.add_argument("--prompt-tokens", type=positive, default=256, help="of each (default: %(default)s)")
    parser.add_argument("--new-tokens", type=positive, default=64, help="to generate, 2 or more (default: %(default)s)")
    parser.add_argument("--rounds", type=positive, default=7, help="the models take turns (default: %(default)s)")
    parser.add_argument("--static-cache", action="store_true", help="which `generate` compiles for on a GPU")
    parser.add_argument("--profile", metavar="NAME", help="profile to measure with, or its file")
    _text(parser)
    _json(parser)
    _loading(parser)


def _serve(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", help=MODEL_HELP)
    parser.add_argument("--host", default="localhost", help="address to listen on (default: %(default)s)")
    parser.add_argument("--port", type=positive, default=8000, help="port to listen on (default: %(default)s)")
    parser.add_argument("--profile", metavar="NAME", help="profile to start with, or its file")
    parser.add_argument(
        "--on-drift",
        choices=["report", "switch"],
        help="log when the requests change, or follow to the nearest profile",
    )
    parser.add_argument("--log-level", default="warning", help="of transformers (default: %(default)s)")
    _loading(parser)


def _demo(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--seen", default="docs,code", help="domains to calibrate on (default: %(default)s)")
    parser.add_argument("--json", metavar="FILE", help="also write the table to FILE")


def _text(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--split", help="split of the data sets, as test (default: train, or the only one)")
    parser.add_argument("--column", help="column that has the text (default: text, or the only one of strings)")
    parser.add_argument("--copies", metavar="FOLDER", help="folder with local copies of the hub's data sets")


def _loading(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--dtype", default="auto", help="of the weights, as bfloat16 (default: what the files have)")
    parser.add_argument("--device", default="auto", help="as cpu or cuda:0 (default: a GPU if there is one)")


def _json(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")


ADD_OPTIONS: Mapping[str, Callable[[argparse.ArgumentParser], None]] = {
    "compile": _compile,
    "eval": _eval,
    "adapt": _adapt,
    "inspect": _inspect,
    "report": _report,
    "generate": _generate,
    "bench": _bench,
    "serve": _serve,
    "demo": _demo,
}
"""By command, what defines its options; those of `CompileConfig` are in `moe_compiler.cli.config_options`."""
