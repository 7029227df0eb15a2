"""Virtual environments for the peers, since they do not agree on versions of transformers and NumPy."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

REQUIREMENTS = Path(__file__).resolve().parent / "requirements"
DEFAULT_FOLDER = Path.home() / ".cache" / "moe_compiler" / "peers"
_DONE = "installed.txt"


class InstallError(RuntimeError):
    """A peer could not be installed; the message ends with pip's own error."""


def ensure_environment(name: str, folder: Path) -> Path:
    """Makes the virtual environment of a peer unless it is there with the same requirements.

    Args:
        name: of the requirements file and of the environment.
        folder: where environments are kept.

    Returns:
        Its Python.

    Raises:
        InstallError: pip failed.
        FileNotFoundError: there is no such requirements file.
    """
    path = REQUIREMENTS / f"{name}.txt"
    requirements = path.read_text()
    environment = folder / name
    python = environment / "bin" / "python"
    done = environment / _DONE
    if done.exists() and done.read_text() == requirements and python.exists():
        return python
    shutil.rmtree(environment, ignore_errors=True)
    folder.mkdir(parents=True, exist_ok=True)
    _run([sys.executable, "-m", "venv", str(environment)], name)
    _run([str(python), "-m", "pip", "install", "--quiet", "--no-compile", "-r", str(path)], name)
    done.write_text(requirements)
    return python


def _run(command: list[str], name: str) -> None:
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    found = subprocess.run(command, capture_output=True, text=True, env=environment)
    if found.returncode:
        raise InstallError(f"{name} cannot be installed: {last_error(found.stderr)}")


def last_error(text: str) -> str:
    """The last line that names an error, else the last line."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    errors = [line for line in lines if "error" in line.lower()]
    return (errors or lines or ["no message"])[-1]
