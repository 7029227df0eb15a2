"""`benches/gpu.sh` on a machine that has PyTorch, Triton and transformers, but not the package's other dependencies."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
STUB = """#!/usr/bin/env bash
case "$*" in
*is_available*) echo "Stub GPU" ;;
*"import datasets"*) exit 1 ;;
*) exec "$REAL_PYTHON" -c '
import sys
for name in ("datasets", "jenkspy", "networkx", "rich", "scipy", "hypothesis", "pytest"):
    sys.modules[name] = None
import bench_generate, bench_moe_layer, gpu_check
print("all imported") ' ;;
esac
"""


def test_the_steps_import_nothing_else(tmp_path: Path) -> None:
    """The package is laid out as in the repository, by links; the one step that runs imports what all would."""
    (tmp_path / "benches").mkdir()
    for source in (ROOT / name for name in ("moe_compiler", "kernels", "passes", "runtime")):
        (tmp_path / source.name).symlink_to(source)
    for source in (ROOT / "benches").iterdir():
        if source.name != "results":
            (tmp_path / "benches" / source.name).symlink_to(source)
    stub = tmp_path / "python"
    stub.write_text(STUB)
    stub.chmod(0o755)
    environment = {**os.environ, "PYTHON": str(stub), "REAL_PYTHON": sys.executable}
    result = subprocess.run(
        [tmp_path / "benches" / "gpu.sh", "check", "adapt"], env=environment, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stdout + result.stderr
    assert "all imported" in result.stdout
    assert "check: done" in result.stdout
    assert "adapt: left out, it needs the packages datasets and jenkspy" in result.stdout
