"""Who measured, and with what: a number is worth nothing without it."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
import subprocess
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path

import torch

Device = torch.device
_PEERS = ("gemlite", "vllm", "sglang")


@dataclass(frozen=True)
class Environment:
    """Who measured, and with what. Versions are `"absent"` where a package is not installed.

    Attributes:
        device: name of the GPU or CPU that was measured.
        device_type: `"cpu"` or `"cuda"`.
        cpu: name of the host's CPU.
        cores: CPU cores this process may use.
        threads: threads PyTorch uses.
        python: version.
        torch: version.
        cuda: version of CUDA that PyTorch was built with.
        triton: version.
        transformers: version.
        peers: versions of other projects' MoE or low-bit kernels that are installed.
        commit: of this repository, with `+` where tracked files differ from it.
        date: UTC, ISO 8601.
    """

    device: str
    device_type: str
    cpu: str
    cores: int
    threads: int
    python: str
    torch: str
    cuda: str
    triton: str
    transformers: str
    peers: str
    commit: str
    date: str

    @classmethod
    def of(cls, device: Device) -> Environment:
        """The environment of this process, measuring on `device`."""
        cpu = _cpu_name()
        return cls(
            device=torch.cuda.get_device_name(device) if device.type == "cuda" else cpu,
            device_type=device.type,
            cpu=cpu,
            cores=len(os.sched_getaffinity(0)),
            threads=torch.get_num_threads(),
            python=platform.python_version(),
            torch=torch.__version__,
            cuda=torch.version.cuda or "absent",
            triton=_version("triton"),
            transformers=_version("transformers"),
            peers=", ".join(f"{name} {_version(name)}" for name in _PEERS),
            commit=_commit(),
            date=datetime.now(UTC).isoformat(timespec="seconds"),
        )

    def __str__(self) -> str:
        return "\n".join(f"{name:13}{value}" for name, value in asdict(self).items())


def pick_device(name: str | None) -> torch.device:
    """The device of that name, or the GPU where there is one, else the CPU.

    Raises:
        ValueError: a GPU was asked for and there is none.
    """
    if name is None:
        name = "cuda" if torch.cuda.is_available() else "cpu"
    device = torch.device(name)
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"`device` must be cpu or cuda, but is {name!r}")
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"`device` is {name!r}, but PyTorch {torch.__version__} sees no GPU")
    return device


def _cpu_name() -> str:
    try:
        found = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    except OSError:
        found = None
    return found.group(1).strip() if found else platform.machine()


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "absent"


def _commit() -> str:
    def git(*arguments: str) -> str:
        folder = Path(__file__).resolve().parent
        return subprocess.run(
            ["git", *arguments], cwd=folder, capture_output=True, text=True, check=True
        ).stdout.strip()

    try:
        return git("rev-parse", "--short", "HEAD") + ("+" if git("status", "--porcelain", "-uno") else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
