"""Runs in a peer's virtual environment: quantizes a model with the peer, measures it, writes what came out.

`run.py` starts it: `worker.py MODULE PACKAGE TASK OUTCOME`. The exit code is 0 if there is an outcome, a failure of the
peer included.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import sys
import traceback
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path += [str(HERE), str(HERE.parent)]

import torch  # noqa: E402
from accuracy_windows import window_losses  # noqa: E402
from exchange import Outcome, Quantized, Task  # noqa: E402


def measure(quantized: Quantized, task: Task) -> Outcome:
    """The figures of a quantized model, on the task's windows."""
    storage, notes = quantized.storage, [quantized.note]
    if storage.derivable_bytes:
        notes.append(f"stores {storage.derivable_bits:.3f} bits of trivial group indices besides, not counted")
    figures = {
        "bits_source": quantized.bits_source,
        "code_bits": quantized.code_bits,
        "effective_bits": storage.effective_bits,
        "size_bytes": storage.size_bytes,
        "compile_s": quantized.seconds,
        "note": "; ".join(note for note in notes if note),
    }
    model = quantized.model.eval()
    losses = {domain: window_losses(model, windows).tolist() for domain, windows in task.evaluation.items()}
    return Outcome("", "ok", figures, losses)


def main(module: str, package: str, task_path: str, outcome_path: str) -> int:
    """Runs the peer; see the module."""
    task = Task.load(Path(task_path))
    torch.manual_seed(task.seed)
    tool = f"{package} {importlib.metadata.version(package)}"
    try:
        quantize = importlib.import_module(module).quantize
        found = measure(quantize(task), task)
        outcome = Outcome(tool, found.status, found.figures, found.nll)
    except Exception as error:  # whatever a peer raises is its result
        traceback.print_exc()
        outcome = Outcome(tool, f"{type(error).__name__}: {error}")
    outcome.save(Path(outcome_path))
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
