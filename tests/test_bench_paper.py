"""The papers' experiments: what they print is what the papers print, and each runs on a tiny trained model."""

import csv
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from task_files import CB, write_jsonl
from test_benches import bench, read_csv

from moe_compiler.embedded import load_text

SIZES = [
    "--layers", "1", "--hidden-size", "128", "--experts", "6", "--vocabulary", "300", "--window", "32", "--windows", "3"
]  # fmt: skip
DOMAINS = ("docs", "records")


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("texts")
    for domain in DOMAINS:
        for split, kind in (("train", "calib"), ("evaluation", "eval")):
            text = load_text(domain, split, 2500)  # type: ignore[arg-type]
            (folder / f"{domain}.{kind}.txt").write_text(text)
    return folder


@pytest.fixture(scope="module")
def trained(texts: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    assert bench("paper_model").main(["--output", str(folder), "--domains", str(texts), "--steps", "2", *SIZES]) == 0
    return folder


def run(trained: Path, texts: Path, *arguments: str) -> int:
    """Runs the bench on the tiny model."""
    fixed = ["--model", str(trained), "--domains", str(texts), "--seen", "docs", "--window", "32", "--device", "cpu"]
    code: int = bench("bench_paper").main([*arguments, "--quick", *fixed])
    return code


def test_the_model_has_the_form_of_qwen(trained: Path) -> None:
    config = json.loads((trained / "config.json").read_text())
    assert config["model_type"] == "qwen2_moe"
    assert config["shared_expert_intermediate_size"] == 4 * config["moe_intermediate_size"]
    weights = load_file(trained / "model.safetensors")
    assert weights["model.layers.0.mlp.shared_expert_gate.weight"].shape == (1, 128)
    assert all(weight.dtype == torch.bfloat16 and weight.isfinite().all() for weight in weights.values())


def test_training_data_and_sizes_are_checked(texts: Path, tmp_path: Path) -> None:
    module, sources = bench("paper_model"), bench("accuracy_data").Sources
    with pytest.raises(ValueError, match="`experts` must be at least 4, but is 3"):
        module.PaperModelConfig(experts=3)
    with pytest.raises(ValueError, match="`hidden_size` must be a multiple of 128, but is 100"):
        module.PaperModelConfig(hidden_size=100)
    with pytest.raises(ValueError, match="`window` must be at most 1024, but is 2000"):
        module.PaperModelConfig(window=2000)
    with pytest.raises(ValueError, match="`minutes` must be positive, but is 0"):
        module.PaperModelConfig(minutes=0)
    with pytest.raises(ValueError, match="`steps` must be at least 1, but is 0"):
        module.PaperModelConfig(steps=0)
    with pytest.raises(FileNotFoundError, match="`domains` must name files to train on, but there is no"):
        module.read_pieces(sources(str(tmp_path / "none.txt"), ""), 100)
    (tmp_path / "empty.txt").touch()
    with pytest.raises(ValueError, match=r"`domains` must have text to train on, but .*empty.txt is empty"):
        module.read_pieces(sources(str(tmp_path / "empty.txt"), ""), 100)
    with pytest.raises(ValueError, match="`domains` must have more than 256 tokens each, but 'a' has 5"):
        module.fit(None, {"a": torch.zeros(5)}, module.PaperModelConfig())


def test_language_modeling_and_its_ablation(
    trained: Path, texts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, as_json = tmp_path / "folder" / "paper.csv", tmp_path / "paper.json"
    assert run(trained, texts, "d-table1", "d-table3", "d-figure7", "--csv", str(path), "--json", str(as_json)) == 0
    rows = read_csv(path, bench("paper_results").PaperRow)
    measured = {
        (row["experiment"], row["method"], row["item"]): float(row["value"])
        for row in rows
        if row["source"] == "measured" and row["quantity"] == "perplexity"
    }
    methods = {"original", "GPTQ-3", "random half (MoEPTQ-R)", "DynaMo", "DynaMo, cluster"}
    assert {(method, item) for experiment, method, item in measured if experiment == "d-table1"} == {
        (method, domain) for method in methods for domain in DOMAINS
    }
    for method in ("original", "GPTQ-3", "DynaMo, cluster"):
        assert measured["d-table1", method, "records"] == measured["d-table3", method, "records"]
    assert measured["d-table1", "DynaMo", "docs"] == measured["d-table1", "DynaMo, cluster", "docs"]
    assert all(math.isfinite(value) and value > 1 for value in measured.values())
    output = capsys.readouterr().out
    assert "Calibrated on 256 tokens of each seen domain (docs)" in output
    assert "reading: switching is by rule `cluster`" in output
    assert "1.42 to 1.57" in output  # times the original's perplexity, by the paper's GPTQ on its four models
    found = json.loads(as_json.read_text())
    assert [one["experiment"] for one in found] == ["d-table1", "d-table3", "d-figure7"]
    assert sum(len(one["rows"]) for one in found) == len(rows)


def test_figures_as_data(trained: Path, texts: Path, tmp_path: Path) -> None:
    path = tmp_path / "figures.csv"
    assert run(trained, texts, "d-figures3-5", "m-figures2-5", "--bits", "own", "--csv", str(path)) == 0
    with open(path) as file:
        rows = list(csv.DictReader(file))

    def total(experiment: str, quantity: str, domain: str) -> float:
        return sum(
            float(row["value"])
            for row in rows
            if row["experiment"] == experiment and row["quantity"] == quantity and row["item"].endswith(f"on {domain}")
        )

    for domain in DOMAINS:  # four experts per token
        assert total("d-figures3-5", "significance", domain) == pytest.approx(4)
        assert total("m-figures2-5", "significance", domain) == pytest.approx(4)
        assert total("m-figures2-5", "activation rate", domain) == pytest.approx(4)
    assert sum(row["quantity"] == "width" for row in rows) == 6 * 2
    assert sum(row["quantity"] == "cosine similarity" for row in rows) == 6 * 5 / 2
    assert {row["item"] for row in rows if row["quantity"] == "data set weight"} == set(DOMAINS)


def test_times(trained: Path, texts: Path, tmp_path: Path) -> None:
    path = tmp_path / "times.csv"
    assert run(trained, texts, "d-figure8", "d-figure9", "--bits", "3.2", "--csv", str(path)) == 0
    rows = read_csv(path, bench("paper_results").PaperRow)
    shares = [float(row["value"]) for row in rows if row["item"] == "share"]
    assert len(shares) == 3
    assert all(0 < share < 1 for share in shares)
    speeds = {row["method"]: float(row["value"]) for row in rows if row["quantity"] == "generate"}
    assert set(speeds) == {"bf16", "random half (MoEPTQ-R)", "DynaMo"}
    assert min(speeds.values()) > 0


def test_zero_shot(trained: Path, texts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "CB").mkdir()
    write_jsonl(tmp_path / "CB" / "val.jsonl", CB)
    path = tmp_path / "tasks.csv"
    arguments = ["--tasks", "cb", "--task-data", str(tmp_path), "--bits", "3.2", "--csv", str(path)]
    assert run(trained, texts, "d-table2", *arguments) == 0
    rows = read_csv(path, bench("paper_results").PaperRow)
    scores = {row["method"]: float(row["value"]) for row in rows if row["source"] == "measured"}
    assert set(scores) == {"original", "GPTQ-3", "random half (MoEPTQ-R)", "DynaMo", "DynaMo, cluster"}
    assert all(score % 25 == 0 for score in scores.values())  # of four documents
    assert "Documents scored: cb 4." in capsys.readouterr().out


def test_a_failed_experiment_is_reported(
    trained: Path, texts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(trained, texts, "d-table2", "d-figure7", "--task-data", str(tmp_path)) == 1
    output = capsys.readouterr().out
    assert "d-table2 FAILED: `data` must have a folder 'arc_challenge'" in output
    assert "1 of 2 experiments failed: d-table2" in output
    assert run(trained, texts, "d-table3", "d-figure9", "--new", "") == 1
    output = capsys.readouterr().out
    assert "d-table3 FAILED: `new` must name at least one domain for d-table3" in output
    assert "d-figure9 FAILED: `new` must name at least one domain for d-figure9" in output
    with pytest.raises(ValueError, match=r"a level must be like gptq-3, gptq-3-0.3, codes=2.5 or 3.05, but is 'few'"):
        run(trained, texts, "d-figure7", "--bits", "few")


def test_the_papers_figures_agree_with_their_text() -> None:
    """Decreases and increases that the abstracts and section texts name follow from the tables."""
    published = bench("paper_published")

    gptq = {name: methods["GPTQ-3"] for name, methods in published.PERPLEXITY[published.DYNAMO].items()}
    ours = {name: methods["DynaMo"] for name, methods in published.PERPLEXITY[published.DYNAMO].items()}
    gains = [(gptq[name].wiki + gptq[name].c4 - ours[name].wiki - ours[name].c4) / 2 for name in gptq]
    assert min(gains) == pytest.approx(2.78, abs=0.01)
    assert max(gains) == pytest.approx(4.54, abs=0.01)
    for model, by_task in published.ABLATION.items():
        wiki = published.PERPLEXITY[published.DYNAMO][model]
        assert (by_task["Wiki"][0], by_task["Wiki"][2]) == (wiki["GPTQ-3"].wiki, wiki["DynaMo"].wiki)
        cb: Any = published.ZERO_SHOT[published.DYNAMO][model]
        assert (by_task["CB"][0], by_task["CB"][2]) == (cb["GPTQ-3"].accuracy[-1], cb["DynaMo"].accuracy[-1])
    moqa = published.PERPLEXITY[published.MOQA]
    gains = [
        sum(getattr(one["GPTQ-3"], k) - getattr(one["MoQa"], k) for one in moqa.values()) / 3 for k in ("wiki", "c4")
    ]
    assert gains == pytest.approx([1.69, 2.18], abs=0.01)
