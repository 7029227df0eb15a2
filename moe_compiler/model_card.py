"""The model card of a saved model: what it is, what it costs, what it lost, how to load it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from moe_compiler.coverage import CompileReport, put_together
from moe_compiler.dynamo_config import DynamoConfig
from moe_compiler.embedded import MODEL_FOLDER

CARD = "README.md"
_MARK = "<!-- written by moe-compiler: remove this line to keep your own text when the model is saved again -->"


def is_card(path: Path) -> bool:
    """Whether a file is a card that `write_card` wrote and may replace."""
    return _MARK in path.read_text(encoding="utf-8", errors="replace")


def write_card(path: Path, model: Any) -> None:
    """Writes the card of a compiled model.

    Args:
        path: the file.
        model: the model, with `moe_report` and `config.quantization_config`.
    """
    report: CompileReport = model.moe_report
    config: DynamoConfig = model.config.quantization_config
    base = "" if config.compiled is None else config.compiled.base_model
    is_folder = Path(base).is_absolute()
    name = Path(base).name if is_folder else base  # who reads the card has other folders
    if Path(base) == MODEL_FOLDER:
        name = "embedded"
    sections = [_front_matter("" if is_folder else base), _MARK, _summary(type(model).__name__, name, report)]
    sections += [_bits(report), _datasets(report, config), _perplexities(report), _loading(name), _choices(report)]
    path.write_text("\n\n".join(section for section in sections if section) + "\n", encoding="utf-8")


def _front_matter(base: str) -> str:
    lines = ["---", "library_name: transformers", "tags:", "- moe-compiler", "- mixture-of-experts", "- quantized"]
    if base:
        lines += [f"base_model: {base}", "base_model_relation: quantized"]
    return "\n".join([*lines, "---"])


def _summary(kind: str, base: str, report: CompileReport) -> str:
    name = Path(base).name if base else kind
    origin = f"`{base}`" if base else f"A `{kind}` of unknown origin"
    widths = ", ".join(f"{share:.0%} at {width} bits" for width, share in report.plan.histogram().items())
    return (
        f"# {name}, experts at {report.effective_bits:.2f} bits\n\n"
        f"{origin}, compiled by moe-compiler: its experts are quantized, every one at its own width (of the routed "
        f"experts' weights {widths}), and can be adapted to new data while the model runs. "
        f"Strategy `{report.config.strategy}`, quantizer `{report.config.quantizer}`."
    )


def _bits(report: CompileReport) -> str:
    rows = []
    for kind, name in (("experts", "routed experts"), ("shared experts", "shared experts"), ("other", "other linears")):
        entries = [entry for entry in report.coverage if entry.kind == kind]
        if entries:
            group = put_together(entries)
            numbers = [f"{number:.2f}" for number in (group.size_bytes / 1e6, group.code_bits, group.effective_bits)]
            rows.append([name, f"{group.weights:,}", *numbers])
    table = _table(["linears of the MoE blocks", "weights", "MB", "code bits", "effective bits"], rows)
    return (
        f"## Bits\n\n{table}\n\nEffective bits count every buffer: codes, scales, zero points, tables and the pool. "
        "Everything outside of the MoE blocks is as it was."
    )


def _datasets(report: CompileReport, config: DynamoConfig) -> str:
    if not report.datasets:
        return ""
    sources = config.calibration_sources() or {}
    rows = [[name, f"{tokens:,}", sources.get(name) or "–"] for name, tokens in report.datasets.items()]
    return f"## Calibration data\n\n{_table(['dataset', 'tokens', 'source'], rows)}"


def _perplexities(report: CompileReport) -> str:
    if not report.perplexities:
        return ""
    rows = [
        [name, f"{original:.3f}", f"{compiled:.3f}", f"{compiled / original - 1:+.2%}"]
        for name, (original, compiled) in report.perplexities.items()
    ]
    return f"## Perplexity\n\n{_table(['dataset', 'original', 'compiled', 'change'], rows)}"


def _loading(base: str) -> str:
    original = f"`{base}`" if base else "the model that was compiled"
    return f"""## Use

With the package `moe-compiler` installed:

```python
import moe_compiler  # tells transformers how to load the model
from transformers import AutoModelForCausalLM, AutoTokenizer

folder = "."  # this folder, or the name of its repository
model = AutoModelForCausalLM.from_pretrained(folder)
print(model.runtime.profiles)  # what it was adapted to; `model.runtime.switch(name)` changes it
```

`model.runtime.adapt` needs the original weights, of {original}: from where they were, or from where
`model.runtime.attach_master` says that they are."""


def _choices(report: CompileReport) -> str:
    rows = [[f"`{name}`", f"`{value}`"] for name, value in report.config.to_dict().items()]
    return f"## Options\n\n{_table(['option', 'value'], rows)}"


def _table(header: Iterable[str], rows: Iterable[Sequence[str]]) -> str:
    columns = list(header)
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join("| " + " | ".join(str(cell).replace("|", r"\|") for cell in line) + " |" for line in lines)
