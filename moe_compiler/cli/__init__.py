"""The command `moe-compiler`.

Exit codes: 0 done, 1 an error, 2 wrong usage, 130 interrupted. An error is one line on standard error.
"""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Sequence

from moe_compiler.cli.parser import UsageError, build_parser

_EXPLAINED = (ValueError, TypeError, RuntimeError, OSError, ImportError, ArithmeticError)
"""Errors whose text says what is wrong; of others the name is printed too."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line.

    Args:
        arguments: what was typed after the program's name; those of the process if `None`.

    Returns:
        The exit code: 0, 1 for an error, 2 for wrong usage, 130 after Ctrl-C.
    """
    typed = sys.argv[1:] if arguments is None else list(arguments)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # threads that spin while they wait slow a busy machine down
    warnings.filterwarnings("ignore", message=".*TRITON_DEFAULT_FP_FUSION.*")
    debug = "--debug" in typed
    try:
        options = build_parser(typed).parse_args(typed)
        options.run(options)
        sys.stdout.flush()
    except KeyboardInterrupt:
        return _fail("interrupted", 130)
    except BrokenPipeError:  # the reader of a pipe went away, as in `moe-compiler inspect DIR | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except UsageError as error:
        return _fail(str(error), 2)
    except Exception as error:
        if debug:
            raise
        return _fail(_one_line(error), 1)
    return 0


def _one_line(error: Exception) -> str:
    text = " ".join(str(error).split())
    if isinstance(error, _EXPLAINED) and text:
        return text
    return f"{': '.join(filter(None, (type(error).__name__, text)))} (--debug shows where)"


def _fail(text: str, code: int) -> int:
    print(f"moe-compiler: {text}", file=sys.stderr)
    return code
