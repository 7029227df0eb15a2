"""The README's example runs as it stands, with the embedded model in place of the hub's."""

import re
from pathlib import Path
from typing import Any

import transformers

from moe_compiler.embedded import load_model, load_text

README = (Path(__file__).resolve().parent.parent / "README.md").read_text()


def test_the_example_runs(monkeypatch: Any, capsys: Any) -> None:
    block = re.search(r"```python\n(.*?)```", README, re.DOTALL)
    assert block is not None
    model, tokenizer = load_model()
    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", lambda *_, **__: model)
    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", lambda *_, **__: tokenizer)
    names = {
        "wiki_texts": [load_text("docs", "train", max_characters=4000)],
        "code_texts": [load_text("code", "train", max_characters=4000)],
        "new_texts": [load_text("records", "train", max_characters=4000)],
    }
    exec(block[1], names)
    printed = capsys.readouterr().out
    assert "adapted to 'support chat' by rule 'lowrank'" in printed
    assert "routed experts: " in printed
    assert model.moe_report.effective_bits <= 3.2


def test_the_gate_finds_its_commands() -> None:
    gate = (Path(__file__).resolve().parent.parent / ".ci" / "run").read_text()
    for block in re.findall(r"for block in (.*);", gate)[0].split():
        assert re.search(rf"<!-- ci: {block} -->\n```sh\n.+?```", README, re.DOTALL)
