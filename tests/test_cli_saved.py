"""The commands that make and use a saved model, run one after the other on the embedded model with little data."""

import argparse
import contextlib
import io
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from moe_compiler.cli import bench, main
from moe_compiler.cli.compile import read_datasets
from moe_compiler.config import CompileConfig
from moe_compiler.data import load_samples
from moe_compiler.embedded import load_model
from moe_compiler.zero_shot_result import Metric, TaskScore, ZeroShotResult

WINDOW = 128


def run(*arguments: Any) -> str:
    """What a command prints; it must succeed."""
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        code = main([str(argument) for argument in arguments])
    assert code == 0
    return printed.getvalue()


def read(*arguments: Any) -> Any:
    """What a command prints as JSON."""
    return json.loads(run(*arguments, "--json"))


@pytest.fixture(scope="module")
def made(tmp_path_factory: Any) -> tuple[Path, dict[str, Any]]:
    """A folder with the compiled embedded model, and what compiling it printed."""
    folder = tmp_path_factory.mktemp("cli") / "compiled"
    data = ["--data", "docs=embedded:docs", "--data", "code=embedded:code"]
    config = ["--quantizer", "rtn", "--sequence-length", WINDOW, "--target-bits", "3.5", "--rule", "restore"]
    size = ["--tokens", 1024, "--evaluate", "--eval-tokens", 512]
    return folder, read("compile", "embedded", *data, *config, *size, "-o", folder)


@pytest.fixture(scope="module")
def folder(made: tuple[Path, dict[str, Any]]) -> Path:
    """The folder, with a profile for records."""
    printed = run("adapt", made[0], "--data", "embedded:records", "--name", "Our records", "--tokens", 512)
    assert "adapted to 'Our records' by rule 'restore' on 512 tokens" in printed
    assert f"saved in {made[0]}/profiles/our-records.safetensors" in printed
    return made[0]


def test_compile_says_what_it_made_and_the_card_too(made: tuple[Path, dict[str, Any]]) -> None:
    folder, printed = made
    assert printed["effective_bits"] <= 3.5
    assert printed["calibration_tokens"] == {"docs": 1024, "code": 1024}
    assert printed["evaluation_tokens"] == {"docs": 512, "code": 512}
    assert printed["config"]["quantizer"] == "rtn"
    card = (folder / "README.md").read_text()
    assert f"{printed['perplexity']['docs']['compiled']:.3f}" in card
    assert "embedded:docs" in card


def test_eval_measures_what_compile_measured(made: tuple[Path, dict[str, Any]]) -> None:
    folder, printed = made
    options = ["--data", "docs=embedded:docs", "--data", "code=embedded:code", "--tokens", 512, "--window", WINDOW]
    found = read("eval", "embedded", folder, *options)
    assert [one["profile"] for one in found["models"]] == [None, "calibration"]
    for number, name in enumerate(("original", "compiled")):
        wanted = {data: values[name] for data, values in printed["perplexity"].items()}
        assert found["models"][number]["perplexity"] == pytest.approx(wanted, rel=1e-6)


def test_eval_prints_a_table_with_the_profile(folder: Path) -> None:
    options = ["--data", "records=embedded:records", "--tokens", 256, "--window", WINDOW, "--profile", "Our records"]
    printed = run("eval", "embedded", folder, *options)
    assert f"{folder} (Our records)   loss" in printed
    assert "windows of 128 tokens, the first of each not scored; loss: 100 ln(second / first)" in printed


def test_eval_runs_tasks(folder: Path, monkeypatch: Any) -> None:
    score = TaskScore({"acc": Metric(0.5, 0.1)}, 4, 9, "1.0", "a file")
    result = ZeroShotResult({"piqa": score}, num_fewshot=2, limit=4, seed=0, lm_eval="0")
    called: dict[str, Any] = {}

    def zero_shot(model: Any, tokenizer: Any, tasks: Any, **options: Any) -> ZeroShotResult:
        called.update(tasks=tasks, **options)
        return result

    monkeypatch.setattr("moe_compiler.zero_shot_evaluation.zero_shot", zero_shot)
    monkeypatch.setattr("moe_compiler.tasks.harness.read_documents", lambda tasks, data: called.update(read=data))
    options = ["--tasks", "piqa, rte", "--task-data", "here", "--limit", 4, "--shots", 2]
    assert str(result).splitlines()[0].strip() in run("eval", folder, *options)
    wanted = {"tasks": ("piqa", "rte"), "data": "here", "limit": 4, "num_fewshot": 2, "batch_size": 8, "read": "here"}
    assert called == wanted
    assert read("eval", folder, *options)["models"][0]["tasks"] == json.loads(json.dumps(result.to_dict()))


def test_a_profile_is_there_after_loading_again(folder: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert list(model.runtime.profiles) == ["calibration", "Our records"]
    assert model.runtime.active == "calibration"
    assert model.runtime.profiles["Our records"].tokens == 512


def test_a_profile_may_lie_elsewhere_and_be_replaced(folder: Path, tmp_path: Path, capsys: Any) -> None:
    file = tmp_path / "markup.safetensors"
    options = ["--data", "embedded:markup", "--tokens", 256]
    report = read("adapt", folder, *options, "--name", "markup", "--original", "embedded", "-o", file)
    assert (report["name"], report["tokens"], report["output"]) == ("markup", 256, str(file))
    assert file.is_file()
    assert run("generate", folder, "--prompt", "<a", "--max-new-tokens", 2, "--profile", file)
    before = (folder / "profiles" / "our-records.safetensors").read_bytes()
    records = ["--data", "embedded:records", "--tokens", 512]
    read("adapt", folder, *records, "--name", "Our records", "--rule", "cluster")
    assert (folder / "profiles" / "our-records.safetensors").read_bytes() != before
    assert sorted(path.name for path in (folder / "profiles").iterdir()) == [
        "calibration.safetensors",
        "our-records.safetensors",
    ]
    assert main(["adapt", str(folder), "--data", "embedded:markup", "--name", "calibration"]) == 1
    assert "`--name` must not be 'calibration', the profile that the saved model has" in capsys.readouterr().err
    assert main(["adapt", str(folder), "--data", "x", "--name", "y", "-o", str(tmp_path / "no" / "y")]) == 1
    assert "`--output` must lie in a folder that exists" in capsys.readouterr().err


def test_inspect_as_json_is_all_of_it(made: tuple[Path, dict[str, Any]], folder: Path) -> None:
    found = read("inspect", folder, "--graphs")
    assert found["effective_bits"] == made[1]["effective_bits"]
    assert [profile["name"] for profile in found["profiles"]] == ["calibration", "Our records"]
    assert [profile["active"] for profile in found["profiles"]] == [True, False]
    assert found["profiles"][0]["divergence_bits"] == 0 < found["profiles"][1]["divergence_bits"] < 1
    path = "model.layers.1.mlp"
    assert len(found["plan"][path]["down_proj"]) == 16
    assert list(found["graphs"][path]) == ["captured", "observed", "lowered"]
    assert "packed_experts" in found["graphs"][path]["lowered"]
    experts = [entry for entry in found["coverage"] if entry["kind"] == "experts"]
    assert sum(entry["size_bytes"] for entry in experts) == made[1]["expert_bytes"]


def test_inspect_prints_what_was_asked_for(folder: Path, capsys: Any) -> None:
    summary = run("inspect", folder)
    assert "calibration (active)" in summary
    assert "model.layers.2.mlp.down_proj" in summary
    one = ["--layer", "model.layers.1.mlp"]
    plan = run("inspect", folder, "--plan", "--coverage", *one)
    assert "bits of each expert" in plan
    assert "left alone: not an expert" in plan
    assert "layers.2" not in plan
    assert "ops.packed_experts(" in run("inspect", folder, "--graphs", *one)
    assert main(["inspect", str(folder), "--layer", "head"]) == 1
    assert "`--layer` must be one of the MoE blocks model.layers.0.mlp" in capsys.readouterr().err


def test_report_writes_the_page(folder: Path, monkeypatch: Any) -> None:
    called: list[Any] = []

    def write_report(model: Any, path: Path, *, tokenizer: Any, figures: Any) -> Path:
        called.append((list(model.runtime.profiles), path, tokenizer.vocab_size, figures))
        return path

    monkeypatch.setattr("moe_compiler.cli.report.write_report", write_report)
    page = folder / "report.html"
    assert run("report", folder, "--figures", "x") == f"wrote {page}\n"
    assert called == [(["calibration", "Our records"], page, 1792, "x")]


def test_generate_streams_the_text_of_the_model(folder: Path, capsys: Any, tmp_path: Path) -> None:
    prompt = "def read("
    options = ["--max-new-tokens", 8, "--profile", "Our records"]
    printed = run("generate", folder, "--prompt", prompt, *options)
    assert " tokens/s" in capsys.readouterr().err
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    model.runtime.switch("Our records")
    inputs = tokenizer(prompt, return_tensors="pt")
    output = model.generate(**inputs, max_new_tokens=8, do_sample=False)
    assert printed == tokenizer.decode(output[0]) + "\n"
    (tmp_path / "prompt.txt").write_text(prompt)
    found = read("generate", folder, "--prompt-file", tmp_path / "prompt.txt", *options)
    assert found["prompt"] + found["text"] + "\n" == printed
    sampled = ["--prompt", prompt, "--temperature", "2", "--top-p", "0.9", "--max-new-tokens", 8, "--seed"]
    texts = [read("generate", "embedded", *sampled, seed)["text"] for seed in (1, 1, 2)]
    assert texts[0] == texts[1] != texts[2]


def test_bench_compares_with_the_original(folder: Path, capsys: Any, tmp_path: Path) -> None:
    options = ["--prompt-tokens", 16, "--new-tokens", 3, "--rounds", 2, "--batch", 2]
    found = read("bench", folder, "--original", "embedded", *options, "--profile", "Our records")
    original, compiled = found["models"]["original"], found["models"]["compiled"]
    assert len(original["prompt_s"]) == len(compiled["decode_s"]) == 2
    assert original["weight_bytes"] == bench.weight_bytes(load_model(torch.bfloat16)[0])
    assert found["ratios"]["weights"] == compiled["weight_bytes"] / original["weight_bytes"] < 0.5
    assert found["switch_ms"] > 0
    printed = run("bench", folder, *options)
    assert "decode, tokens/s" in printed
    assert "ratio" not in printed
    (tmp_path / "notes.txt").write_text("too little")
    assert main(["bench", str(folder), "--data", str(tmp_path / "notes.txt")]) == 1
    assert "`--data` must have 256 tokens for the prompts, but has " in capsys.readouterr().err


def chosen(source: str, *, evaluate: bool = True) -> argparse.Namespace:
    options: dict[str, Any] = {"evaluate": evaluate, "eval_data": None, "tokens": 32, "eval_tokens": 32, "split": None}
    options |= {"eval_split": None, "column": None, "copies": None, "data": [("notes", source)]}
    return argparse.Namespace(**options)


def test_held_out_windows_follow_those_to_calibrate_on(tmp_path: Path) -> None:
    model, tokenizer = load_model()
    text = " ".join(f"line {number}" for number in range(40))
    (tmp_path / "notes.txt").write_text(text)
    config = CompileConfig(sequence_length=16)
    calibration, evaluation = read_datasets(chosen(str(tmp_path / "notes.txt")), config, model, tokenizer)
    both = load_samples(text, tokenizer=tokenizer, sequence_length=16, max_tokens=64)
    assert torch.equal(torch.stack([*calibration["notes"], *evaluation["notes"]]), torch.stack(list(both)))
    assert len(calibration["notes"]) == len(evaluation["notes"]) == 2
    alone, nothing = read_datasets(chosen(str(tmp_path / "notes.txt"), evaluate=False), config, model, tokenizer)
    assert torch.equal(torch.stack(list(alone["notes"])), torch.stack(list(calibration["notes"])))
    assert nothing == {}
    (tmp_path / "notes.txt").write_text("too little")
    with pytest.raises(ValueError, match="`--evaluate` must find text after the 32 tokens to calibrate on"):
        read_datasets(chosen(str(tmp_path / "notes.txt")), config, model, tokenizer)


def test_compile_refuses_a_bad_output_before_it_begins(folder: Path, tmp_path: Path, capsys: Any) -> None:
    (tmp_path / "file").write_text("")
    for output, message in ((folder, "give --overwrite to use it"), (tmp_path / "file", "is a file")):
        assert main(["compile", "embedded", "--data", "docs=embedded:docs", "-o", str(output)]) == 2
        assert message in capsys.readouterr().err
    twice = ["--data", "docs=embedded:docs", "--data", "docs=embedded:code"]
    assert main(["compile", "embedded", *twice, "-o", str(tmp_path / "new")]) == 2
    assert "`--data` must give every dataset a name of its own" in capsys.readouterr().err
