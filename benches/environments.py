"""Does the package work with the versions it allows? Installs each combination and runs two examples in it.

python benches/environments.py --python python3.11 python3.12 --torch 2.11 2.13 --transformers 5.17 5.23 --table FILE

There is one virtual environment per Python and torch, in which transformers is exchanged. Each needs up to 5 GB, since
pip's torch for Linux brings CUDA; it is deleted afterwards unless `--keep` is given; one that was kept is used again.
"""

from __future__ import annotations

import argparse
import itertools
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
HEAD = "| Python | torch | transformers | compile, save, load, generate | adapt | without triton |\n" + "|---" * 6 + "|"
_VERSIONS = """
import platform, torch, transformers
print(platform.python_version(), torch.__version__, transformers.__version__)
"""
_WITHOUT_TRITON = """
import runpy, sys
sys.modules["triton"] = None
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@dataclass(frozen=True)
class Row:
    """What one combination gave.

    Attributes:
        versions: of Python, torch and transformers: those that were installed, or asked for where that failed.
        outcomes: of each step `"works"`, or why it does not.
    """

    versions: tuple[str, str, str]
    outcomes: tuple[str, ...]

    def __str__(self) -> str:
        return "| " + " | ".join((*self.versions, *self.outcomes)) + " |"


def run(command: Sequence[str | Path], timeout: float) -> tuple[bool, str]:
    """Runs a command offline.

    Args:
        command: the program and its arguments.
        timeout: in seconds.

    Returns:
        Whether it ended well, and its output, or the last line of its errors.
    """
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "TQDM_DISABLE": "1"}
    try:
        done = subprocess.run(
            list(map(str, command)), capture_output=True, text=True, timeout=timeout, env=environment, check=False
        )
    except subprocess.TimeoutExpired:
        return False, f"not done after {timeout:.0f} s"
    except OSError as error:
        return False, str(error)
    lines = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
    return (True, done.stdout.strip()) if done.returncode == 0 else (False, lines[-1].replace("|", "/"))


def install(python: str, torch: str, transformers: str, folder: Path, timeout: float) -> tuple[bool, str]:
    """Makes or reuses the environment in `folder`; arguments and result as those of `run`."""
    inside = folder / "bin" / "python"
    if not inside.exists():
        made, reason = run([python, "-m", "venv", folder], timeout)
        if not made:
            return made, reason
    packages = [f"torch=={torch}.*", f"transformers=={transformers}.*"]
    return run([inside, "-m", "pip", "install", "--quiet", *packages, "--editable", ROOT], timeout)


def try_out(folder: Path, asked: tuple[str, str, str], tokens: int, timeout: float) -> Row:
    """Runs the examples in an environment.

    Args:
        folder: the environment.
        asked: the versions it should have.
        tokens: to calibrate on, of each text.
        timeout: of each step, in seconds.
    """
    python = folder / "bin" / "python"
    found, versions = run([python, "-c", _VERSIONS], timeout)
    if not found:
        return Row(asked, (f"does not import: {versions}", "–", "–"))
    compiling, adapting = (ROOT / "examples" / f"{name}.py" for name in ("quantize_and_generate", "adapt_to_your_text"))
    with tempfile.TemporaryDirectory() as name:
        output, count = Path(name) / "compiled", ("--tokens", str(tokens))
        steps: list[list[str | Path]] = [
            [python, compiling, *count, "--output", output],
            [python, adapting, *count, "--model", output, "--profile", Path(name) / "profile"],
            [python, "-c", _WITHOUT_TRITON, compiling, *count, "--output", Path(name) / "again"],
        ]
        results = [run(step, timeout) for step in steps]
    first, second, third = versions.split()
    return Row((first, second, third), tuple("works" if worked else reason for worked, reason in results))


def main(arguments: Sequence[str] | None = None) -> int:
    """Tries all combinations and prints the table.

    Returns:
        1 if one that could be installed does not work.
    """
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--python", nargs="+", default=[sys.executable], help="interpreters (default: this one)")
    parser.add_argument("--torch", nargs="+", default=["2.11", "2.13"], help="versions, without the last part")
    parser.add_argument("--transformers", nargs="+", default=["5.17", "5.23"], help="the same")
    parser.add_argument("--tokens", type=int, default=512, help="to calibrate on, of each text")
    parser.add_argument("--timeout", type=float, default=1800, help="of an installation or a step, in seconds")
    parser.add_argument("--keep", type=Path, metavar="DIR", help="keep the environments here, and use those here")
    parser.add_argument("--table", type=Path, metavar="FILE", help="also write the table to a file")
    options = parser.parse_args(arguments)
    rows: list[Row] = []
    failed = False
    print(HEAD, flush=True)
    for python, torch in itertools.product(options.python, options.torch):
        name = f"{Path(python).name}-torch{torch}"
        folder = options.keep / name if options.keep else Path(tempfile.mkdtemp(prefix=name))
        try:
            for transformers in options.transformers:
                asked = (Path(python).name, torch, transformers)
                installed, reason = install(python, torch, transformers, folder, options.timeout)
                if installed:
                    row = try_out(folder, asked, options.tokens, options.timeout)
                    failed |= any(outcome != "works" for outcome in row.outcomes)
                else:
                    row = Row(asked, (f"not installed: {reason}", "–", "–"))
                rows.append(row)
                print(row, flush=True)
                if options.table:
                    options.table.write_text("\n".join([HEAD, *map(str, rows)]) + "\n")
        finally:
            if not options.keep:
                shutil.rmtree(folder, ignore_errors=True)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
