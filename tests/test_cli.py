"""The command line, and the demo on the embedded model with little data."""

import io
import json
import math
from typing import Any

import pytest
from rich.console import Console

from moe_compiler import __version__
from moe_compiler.cli import main
from moe_compiler.demo import run_demo


def test_version_and_help(capsys: Any) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["--version"])
    assert stop.value.code == 0
    assert capsys.readouterr().out == f"moe-compiler {__version__}\n"
    with pytest.raises(SystemExit) as stop:
        main(["demo", "--help"])
    assert stop.value.code == 0
    assert "example: moe-compiler demo --seen docs,code" in capsys.readouterr().out


def test_wrong_usage_is_exit_code_2(capsys: Any) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["fly"])
    assert stop.value.code == 2
    assert "invalid choice: 'fly'" in capsys.readouterr().err


def test_errors_are_one_line_without_a_traceback(capsys: Any) -> None:
    assert main(["demo", "--seen", "poetry"]) == 1
    error = capsys.readouterr().err
    assert error.startswith("moe-compiler: ValueError: `seen` must be some, not all, of code, docs")
    assert error.count("\n") == 1
    with pytest.raises(ValueError, match="but is poetry"):
        main(["--debug", "demo", "--seen", "poetry"])


def test_the_demo_measures_what_it_prints() -> None:
    console = Console(file=io.StringIO(), record=True, width=100)
    result = run_demo(calibration_tokens=2048, adapt_tokens=1024, evaluation_tokens=1024, console=console)
    text = console.export_text()
    names = [row.name for row in result.rows]
    assert names == ["original", "GPTQ-3*", "random 4/2", "DynaMo", "adapted**"]
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
