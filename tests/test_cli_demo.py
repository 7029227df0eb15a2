"""The demo on the embedded model with little data."""

import io
import json
import math
from pathlib import Path
from typing import Any

from rich.console import Console

from moe_compiler.cli import main
from moe_compiler.demo import DemoResult, DemoRow, run_demo


def test_the_demo_measures_what_it_prints() -> None:
    console = Console(file=io.StringIO(), record=True, width=100)
    result = run_demo(calibration_tokens=2048, adapt_tokens=1024, evaluation_tokens=1024, console=console)
    text = console.export_text()
    names = [row.name for row in result.rows]
    assert names == ["original", "GPTQ-3*", "random 4/2", "compiled", "adapted**"]
    assert result.recompilations == 0
    original, uniform, *packed = result.rows
    for row in packed:
        assert row.effective_bits <= uniform.effective_bits + 1e-9
        assert row.size_bytes < original.size_bytes / 4
        assert all(math.isfinite(value) and value > 1 for value in row.perplexity.values())
        assert f"{row.effective_bits:.2f}" in text
    for domain in result.seen:
        assert result.rows[3].perplexity[domain] == result.rows[4].perplexity[domain]
    assert "0 recompilations over 3 adaptations" in text
    assert "ops.packed_experts(" in text
    assert json.dumps(result.rows[0].perplexity)


def test_the_command_writes_the_table(monkeypatch: Any, tmp_path: Path) -> None:
    row = DemoRow("original", 16, 16.0, 100, {"docs": 2.0})
    called: list[Any] = []

    def run(*, seen: list[str]) -> DemoResult:
        called.append(seen)
        return DemoResult((row,), tuple(seen), (), 0, 1, 2.0)

    monkeypatch.setattr("moe_compiler.demo.run_demo", run)
    assert main(["demo", "--seen", "docs, code", "--json", str(tmp_path / "result.json")]) == 0
    assert called == [["docs", "code"]]
    written = json.loads((tmp_path / "result.json").read_text())
    assert written["rows"][0]["perplexity"] == {"docs": 2.0}
    assert written["seconds"] == 2.0
