"""From a peer to its row: the same tokens for all, a process in its virtual environment, what came out of it."""

from __future__ import annotations

import importlib.metadata
import os
import subprocess
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import torch
from accuracy_data import Sources, read_domains
from accuracy_rows import Row
from accuracy_windows import window_losses
from exchange import Outcome, Task
from registry import PLAN, Peer
from storage import count_storage, expert_tensors, expert_weights
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from virtual_environments import InstallError, ensure_environment, last_error

WORKER = Path(__file__).resolve().parent / "worker.py"


def model_name(model: str) -> str:
    """What rows call a model: the last part of a folder's path, or the name on the hub."""
    return Path(model).resolve().name if Path(model).is_dir() else model


def prepare(row: Row, model: str, sources: Mapping[str, Sources], eval_tokens: int, scratch: Path) -> Task:
    """The tokens that all peers get: those that `bench_accuracy.py` calibrates and measures on.

    Args:
        row: says the domains, the tokens of each seen domain, the window and the seed.
        model: folder or name of the original model.
        sources: of the domains.
        eval_tokens: tokens of each domain to measure on.
        scratch: for the peers' files.
    """
    texts = read_domains(
        sources,
        row.seen,
        row.new,
        AutoTokenizer.from_pretrained(model),
        window=row.window,
        calibration_tokens=row.calibration_tokens,
        adapt_tokens=row.window,
        evaluation_tokens=eval_tokens,
    )
    with torch.device("meta"):
        empty = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(model))
    calibration = {name: texts.calibration[name] for name in row.seen}
    place = str(Path(model).resolve()) if Path(model).is_dir() else model
    return Task(place, expert_weights(empty), calibration, texts.evaluation, {}, row.seed, scratch)


def original_row(row: Row, task: Task) -> Row:
    """The original model's figures."""
    model = AutoModelForCausalLM.from_pretrained(task.model, dtype="auto").eval()
    storage = count_storage(expert_tensors(model), task.expert_weights)
    return replace(
        row,
        tool=f"transformers {importlib.metadata.version('transformers')}",
        code_bits=storage.effective_bits,
        effective_bits=storage.effective_bits,
        size_bytes=storage.size_bytes,
        nll={domain: window_losses(model, windows).tolist() for domain, windows in task.evaluation.items()},
    )


def run_peer(peer: Peer, row: Row, task: Task, environments: Path, plan: Path | None, timeout: int) -> Row:
    """Quantizes and measures in the peer's virtual environment; a failure is a row, too.

    Args:
        peer: the peer.
        row: what all rows have in common, with the name.
        task: what all peers get.
        environments: where virtual environments are kept.
        plan: stands for the setting `registry.PLAN`.
        timeout: seconds that it may take, installing aside.
    """
    settings = {name: str(plan.resolve()) if plan and value == PLAN else value for name, value in peer.settings.items()}
    shown = {name: plan.name if plan and value == PLAN else value for name, value in peer.settings.items()}
    row = replace(row, tool=peer.package, settings=shown)
    scratch = task.folder / row.name
    scratch.mkdir()
    task_path, outcome_path, log_path = (scratch / name for name in ("task.pt", "outcome.json", "log.txt"))
    replace(task, settings=settings, folder=scratch).save(task_path)
    try:
        python = ensure_environment(peer.environment, environments)
        command = [python, WORKER, peer.module, peer.package, task_path, outcome_path]
        variables = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
        with log_path.open("w") as log:
            code = subprocess.run(
                list(map(str, command)), cwd=scratch, env=variables | peer.variables, stdout=log,
                stderr=subprocess.STDOUT, timeout=timeout,
            ).returncode  # fmt: skip
    except InstallError as error:
        return replace(row, status=f"InstallError: {error}")
    except subprocess.TimeoutExpired:
        return replace(row, status=f"stopped after {timeout} s")
    if not outcome_path.exists():
        return replace(row, status=f"exit code {code}: {last_error(log_path.read_text())}")
    outcome = Outcome.load(outcome_path)
    return replace(row, tool=outcome.tool, status=outcome.status, nll=outcome.nll, **outcome.figures)
