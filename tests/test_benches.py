"""The benches run at tiny sizes, write the columns they promise, and their parts say what is true."""

import csv
import importlib
import os
import shutil
import subprocess
import sys
from dataclasses import fields, replace
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_layers import imports, modules

from moe_compiler.kernels.reference import packed_experts_reference

BENCHES = Path(__file__).resolve().parent.parent / "benches"
CPU = torch.device("cpu")


def bench(name: str) -> ModuleType:
    """A module of the folder `benches`, which is no package: its scripts find each other beside themselves."""
    if str(BENCHES) not in sys.path:
        sys.path.append(str(BENCHES))
    return importlib.import_module(name)


def read_csv(path: Path, row_type: type) -> list[dict[str, str]]:
    """The rows; asserts that the columns are the row's and the environment's fields."""
    with open(path) as file:
        reader = csv.DictReader(file)
        rows = list(reader)
    assert reader.fieldnames == [field.name for field in (*fields(row_type), *fields(bench("environment").Environment))]
    assert all(row["torch"] == torch.__version__ and row["device_type"] == "cpu" for row in rows)
    return rows


def test_layer_bench(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "folder" / "layer.csv"
    code = bench("bench_moe_layer").main(["--quick", "--no-compile", "--device", "cpu", "--csv", str(path)])
    assert code == 0
    rows = read_csv(path, bench("targets").LayerRow)
    assert {row["mode"] for row in rows} == {"layer", "operator"}
    assert {row["status"] for row in rows} == {"ok"}
    layer = {row["candidate"]: row for row in rows if row["mode"] == "layer" and row["tokens"] == "1"}
    assert set(layer) == {
        "packed", "packed, no pool", "bf16 grouped_mm", "bf16 batched_mm", "bf16 F.linear", "int4 ATen",
    }  # fmt: skip
    assert layer["packed"]["experts_hit"] == "3"  # two routed, one shared
    assert float(layer["bf16 F.linear"]["speedup"]) == 1
    assert float(layer["packed"]["best_ms"]) > 0
    assert layer["packed"]["pool_cost"]
    assert not layer["bf16 F.linear"]["pool_cost"]
    assert int(layer["bf16 F.linear"]["bytes_read"]) == 3 * 2 * 3 * 256 * 128
    printed = capsys.readouterr().out
    assert printed.count("not measured here") == len(bench("targets").TARGETS)  # tiny sizes prove nothing


def test_layer_bench_of_chosen_candidates(tmp_path: Path) -> None:
    path, module = tmp_path / "layer.csv", bench("bench_moe_layer")
    arguments = ["--quick", "--modes", "layer", "--device", "cpu", "--csv", str(path), "--candidates"]
    assert module.main([*arguments, "packed*", "bf16 F.linear"]) == 0
    rows = read_csv(path, bench("targets").LayerRow)
    assert {row["candidate"] for row in rows} == {"packed", "packed, no pool", "bf16 F.linear"}
    with pytest.raises(ValueError, match=r"`candidates` must match some of packed, .*, but is \('fast',\)"):
        module.main([*arguments, "fast"])


def test_generate_bench(tmp_path: Path) -> None:
    path = tmp_path / "generate.csv"
    assert bench("bench_generate").main(["--quick", "--device", "cpu", "--csv", str(path)]) == 0
    rows = read_csv(path, bench("bench_generate").GenerateRow)
    assert [(row["batch"], row["candidate"]) for row in rows] == [
        (batch, candidate) for batch in ("1", "2") for candidate in ("bf16", "packed")
    ]
    assert float(rows[0]["speedup"]) == 1
    assert all(float(row["decode_tokens_per_s"]) > 0 for row in rows)
    assert int(rows[1]["expert_bytes"]) < int(rows[0]["expert_bytes"]) / 3


def test_generate_bench_has_the_real_sizes() -> None:
    config, shape = bench("models").model_config(16, False), bench("workloads").SHAPES["OLMoE-1B-7B"]
    assert (config.hidden_size, config.intermediate_size) == (shape.hidden_size, shape.intermediate_size)
    assert (config.num_experts, config.num_experts_per_tok) == (shape.num_experts, shape.top_k)
    assert config.vocab_size == 50304
    assert bench("models").model_config(2, False).vocab_size == 50304 / 8


def test_adapt_bench(tmp_path: Path) -> None:
    path = tmp_path / "adapt.csv"
    arguments = ["--quick", "--device", "cpu", "--rules", "restore", "--csv", str(path)]
    assert bench("bench_adapt").main(arguments) == 0
    (row,) = read_csv(path, bench("bench_adapt").AdaptRow)
    steps = sum(float(row[f"{step}_s"]) for step in ("observe", "choose", "swap"))
    assert steps == pytest.approx(float(row["adapt_s"]))
    assert float(row["share"]) == pytest.approx(float(row["adapt_s"]) / float(row["generate_s"]))
    assert row["tokens"] == "256"


def test_adapt_bench_at_a_real_shape(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "adapt.csv"
    arguments = ["--quick", "--device", "cpu", "--shape", "olmoe-1b-7b", "--layers", "1", "--csv", str(path)]
    assert bench("bench_adapt").main(arguments) == 0
    rows = read_csv(path, bench("bench_adapt").AdaptRow)
    assert [row["rule"] for row in rows] == list(bench("bench_adapt").RULES)
    assert {row["model"] for row in rows} == {"OLMoE-1B-7B, 1 of 16 layers"}
    with pytest.raises(SystemExit):
        bench("bench_adapt").main(["--shape", "Mixtral"])
    assert "must be OLMoE-1B-7B, but is Mixtral" in capsys.readouterr().err


def test_the_real_shape_has_errors_of_its_widths() -> None:
    model = bench("adapt_models").real_shape(1, True, 0.02, CPU)
    (layer,) = model.runtime.layers.values()
    for name, packed in layer.experts.all_packed().items():
        assert packed.bits == (2, 4, 2, 4)
        master = layer.masters[name]
        found = torch.stack([(master.weight(e).float() - packed.dequantize_expert(e)).square().sum(0) for e in (0, 3)])
        torch.testing.assert_close(found, master.error[[0, 3]], rtol=0.05, atol=1e-3)


def test_compile_time_bench_at_a_real_shape(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "time.csv"
    arguments = ["--quick", "--shape", "OLMoE-1B-7B", "--device", "cpu", "--csv", str(path)]
    assert bench("bench_compile_time").main(arguments) == 0
    rows = read_csv(path, bench("bench_compile_time").CompileTimeRow)
    measured, estimated = ([float(row[name]) for row in rows] for name in ("seconds", "all_seconds"))
    steps = {"observing", "collecting Hessians", "measuring widths", "comparing", "quantizing"}
    assert steps < {row["step"] for row in rows}
    assert rows[-1]["step"] == "in all"
    assert measured[-1] == pytest.approx(sum(measured[:-1]))
    assert estimated[-1] == pytest.approx(sum(estimated[:-1]))
    assert "16 layers, estimated, s" in capsys.readouterr().out


def test_compile_time_bench_with_fewer_experts(tmp_path: Path) -> None:
    path, module = tmp_path / "time.csv", bench("bench_compile_time")
    arguments = ["--quick", "--shape", "OLMoE-1B-7B", "--device", "cpu", "--csv", str(path), "--experts"]
    assert module.main([*arguments, "2"]) == 0
    rows = {row["step"]: row for row in read_csv(path, module.CompileTimeRow)}
    assert rows["quantizing"]["model"] == "OLMoE-1B-7B, one layer with 2 of 4 experts"
    for step, factor in (("quantizing", 32), ("measuring widths", 32), ("observing", 16)):
        assert float(rows[step]["all_seconds"]) == pytest.approx(factor * float(rows[step]["seconds"]))
    with pytest.raises(ValueError, match=r"`experts` must lie between the 2 of a token and the 4 of .*, but is 1"):
        module.main([*arguments, "1"])


def test_the_estimated_time_counts_the_passes_of_every_window() -> None:
    module = bench("bench_compile_time")
    assert module.layers_per_window(2048, 1024, 64, 6 << 30) == 2
    assert module.layers_per_window(2048, 1024, 64, 1) == 1
    one = {module.OBSERVING: 2.0, module.HESSIANS: 5.0, module.COMPARING: 6.0, "quantizing": 7.0}
    together = module.estimate(one, layers=4, per_window=4, passes=2)  # kept, so collected once
    assert together == {step: 4 * seconds for step, seconds in one.items()}
    apart = module.estimate(one, layers=4, per_window=2, passes=2)
    assert apart[module.HESSIANS] == 2 * (4 * 3.0 + 2 * 4 * 2.0)
    assert apart[module.COMPARING] == 4 * 4.0 + 2 * 4 * 2.0


def test_guard_bench(tmp_path: Path) -> None:
    path = tmp_path / "guard.csv"
    assert bench("bench_guard").main(["--quick", "--device", "cpu", "--csv", str(path)]) == 0
    rows = read_csv(path, bench("bench_guard").GuardRow)
    assert [row["tokens"] for row in rows] == ["1", "4"]
    assert all(0 < float(row["histogram_share"]) and 0 < float(row["lock_us"]) for row in rows)


def test_detection_bench(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name, words in (("one", "red blue"), ("two", "12 + 30 = 42")):
        for part in ("calib", "eval"):
            (tmp_path / f"{name}.{part}.txt").write_text(f"{words}, {part}. " * 400)
    path = tmp_path / "detection.csv"
    arguments = ["--quick", "--device", "cpu", "--domains", str(tmp_path), "--csv", str(path)]
    assert bench("bench_detection").main(arguments) == 0
    rows = read_csv(path, bench("bench_detection").DetectionRow)
    assert [(row["steady"], row["changed"]) for row in rows] == [("one", "two"), ("two", "one")]
    assert all(row["checks"] == "12" and row["steady_tokens"] == "768" for row in rows)
    assert "| one " in capsys.readouterr().out
    with pytest.raises(FileNotFoundError, match="of two domains"):
        bench("bench_detection").texts(str(tmp_path / "nothing"), 10)


def test_gpu_check_passes_on_the_cpu(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    module = bench("gpu_check")
    every = module.checks
    monkeypatch.setattr(
        module, "checks", lambda *args: (c for c in every(*args) if not c.name.startswith("torch.compile"))
    )
    assert module.main(["--quick", "--device", "cpu"]) == 0
    assert "checks passed" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (lambda out: out * 1.05, "off by"),
        (lambda out: torch.full_like(out, torch.nan), "NaN or infinity"),
        (lambda out: out[:, 1:], "shape"),
    ],
)
def test_gpu_check_finds_errors(
    wrong: Any, message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    module = bench("gpu_check")
    right, first = module.layer, next(module.checks(True, CPU))
    monkeypatch.setattr(module, "layer", lambda *args: wrong(right(*args)))
    monkeypatch.setattr(module, "checks", lambda *_: [first])
    assert module.main(["--device", "cpu"]) == 1
    printed = capsys.readouterr().out
    assert "1 of 1 checks FAILED" in printed
    assert message in printed


def test_gpu_check_sees_a_stale_pool() -> None:
    replay, cases = bench("gpu_replay"), bench("gpu_cases")
    inputs = cases.build(cases.Case("", 4), CPU)
    stale = cases.layer(inputs)
    with pytest.raises(AssertionError, match="new pool contents: off by"):
        replay.worst_after_changes(inputs, lambda: stale)
    inputs = cases.build(cases.Case("", 4), CPU)
    assert replay.worst_after_changes(inputs, lambda: cases.layer(inputs)) < 1e-2


@settings(deadline=None, max_examples=8)
@given(
    odd=st.booleans(),
    routing=st.sampled_from(["uniform", "one", "foreign"]),
    bias=st.booleans(),
    tokens=st.integers(0, 5),
    directions=st.integers(0, 3),
)
def test_gpu_check_expects_what_the_oracle_says(
    odd: bool, routing: str, bias: bool, tokens: int, directions: int
) -> None:
    cases = bench("gpu_cases")
    size = {"hidden_size": 72, "intermediate_size": 40, "group_size": 32} if odd else {}
    case = cases.Case(
        "", tokens, dtype=torch.float32, pool=0.05, directions=directions, routing=routing, bias=bias, **size
    )
    one = cases.build(case, CPU)
    expected = packed_experts_reference(
        one.x, one.ids, one.weights, list(one.gate_up.tensors), one.gate_up_bias, list(one.down.tensors),
        one.down_bias, "silu", case.group_size,
    )  # fmt: skip
    torch.testing.assert_close(cases.expected_layer(one, "silu").float(), expected, rtol=1e-4, atol=1e-4)


@given(tokens=st.integers(1, 12), top_k=st.integers(1, 3), experts=st.integers(3, 40), seed=st.integers(0, 5))
@settings(deadline=None, max_examples=30)
def test_rotations_share_no_expert_and_keep_the_routing(tokens: int, top_k: int, experts: int, seed: int) -> None:
    workloads = bench("workloads")
    shape = workloads.LayerShape("", 128, 128, experts, top_k)
    ids = workloads.route(shape, tokens, "zipf", seed)
    assert all(row.unique().numel() == top_k for row in ids)
    turns = list(workloads.rotations(ids, experts))
    assert torch.equal(turns[0], ids)
    assert len(turns) == max(1, experts // ids.unique().numel())
    same = ids.view(-1, 1) == ids.view(1, -1)
    assert all(torch.equal(turn.view(-1, 1) == turn.view(1, -1), same) for turn in turns)
    hit = [set(turn.unique().tolist()) for turn in turns]
    assert len(set().union(*hit)) == sum(map(len, hit))


@pytest.mark.parametrize("pool_fraction", [0.0, 0.02])
def test_bytes_of_all_experts_are_those_of_the_buffers(pool_fraction: float) -> None:
    workloads = bench("workloads")
    packed = workloads.random_packed(workloads.widths(3, 6), 64, 256, CPU, pool_fraction=pool_fraction)
    assert packed.code_bits == 3
    assert packed.pool.used == packed.pool.capacity == round(pool_fraction * 6 * 256)
    read = workloads.packed_bytes(packed, range(6))
    assert read == packed.size_bytes - packed.table.nbytes - packed.pool.offset.nbytes
    deviation = packed.dequantize().std() * 256**0.5
    assert 0.8 < float(deviation) < 1.3


def test_shared_experts_are_appended_to_every_token() -> None:
    workloads = bench("workloads")
    shape = workloads.SHAPES["Qwen1.5-MoE-A2.7B"]
    ids, weights = workloads.with_shared(torch.zeros(3, 4, dtype=torch.int64), torch.zeros(3, 4), shape)
    assert ids[:, 4:].tolist() == [[60, 61, 62, 63]] * 3
    assert weights[:, 4:].tolist() == [[1.0] * 4] * 3


def test_other_projects_are_measured_where_they_are_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    int4, gpu = bench("int4"), torch.device("meta")
    assert int4.available(2, 64, 128, gpu) == {}

    class Layer(torch.nn.Linear):
        def __init__(self, bits: int, group_size: int, in_features: int, out_features: int, **_: Any) -> None:
            super().__init__(in_features, out_features, bias=False, dtype=torch.float16, device=gpu)
            self.size = (bits, group_size)

        def pack(self, codes: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor, bias: None) -> None:
            assert codes.shape == self.weight.shape
            assert scale.shape == zero.shape == (codes.numel() // self.size[1], 1)

    core = ModuleType("gemlite.core")
    core.__dict__.update(GemLiteLinear=Layer, DType=SimpleNamespace(FP16=1))
    package = ModuleType("gemlite")
    package.__spec__ = ModuleSpec("gemlite", None)
    monkeypatch.setitem(sys.modules, "gemlite", package)
    monkeypatch.setitem(sys.modules, "gemlite.core", core)
    linear = int4.available(2, 64, 128, gpu)["int4 gemlite"]
    assert linear(torch.empty(3, 128, dtype=linear.dtype, device=gpu), 1).shape == (3, 64)
    monkeypatch.delattr(core, "DType")
    with pytest.raises(RuntimeError, match="DType"):
        int4.available(2, 64, 128, gpu)["int4 gemlite"](torch.empty(3, 128), 0)


def test_aten_multiplies_with_what_was_converted() -> None:
    linear = bench("int4").AtenLinear(2, 64, 128)
    x = torch.eye(128, dtype=torch.bfloat16)
    weight = linear(x, 0).t().float() / linear.scale_and_zero[0, 0, 0, 0].float()
    assert weight.shape == (64, 128)
    assert set(weight.round().unique().tolist()) == set(range(-8, 8))


def test_failed_candidates_do_not_stop_the_others() -> None:
    harness = bench("harness")

    def fails() -> None:
        raise RuntimeError("no kernel\nfor this")

    def runs_out() -> None:
        raise torch.OutOfMemoryError("many words")

    results = harness.time_rounds({"a": [fails], "b": [runs_out], "c": [lambda: None]}, CPU, 0.0, min_rounds=2)
    assert results["a"] == harness.Failure("no kernel")
    assert results["b"] == harness.Failure("OOM")
    assert len(results["c"].samples) == 2


def test_rounds_run_every_candidate_once_in_changing_order(monkeypatch: pytest.MonkeyPatch) -> None:
    ran: list[str] = []
    calls = {name: [lambda name=name: ran.append(name)] for name in "abcd"}
    harness = bench("harness")
    monkeypatch.setattr(harness, "_SHORTEST_SAMPLE", 0.0)  # one call a sample
    harness.time_rounds(calls, CPU, 0.0, min_rounds=8)
    ran = ran[8:]  # two calls each to warm up
    rounds = [tuple(ran[i : i + 4]) for i in range(0, 32, 4)]
    assert all(sorted(one) == list("abcd") for one in rounds)
    assert len(set(rounds)) > 1


def test_speedups_compare_round_by_round() -> None:
    timing = bench("harness").Timing
    ours, theirs = timing((1.0, 2.0, 10.0), 0.0), timing((3.0, 6.0, 30.0), 0.0)
    assert ours.speedup_over(theirs) == 3
    assert (ours.best, ours.median) == (1, 2)
    assert timing((1.0, 2.0, 3.0), 0.0).spread == 0.5
    assert timing((1.0,), 0.0).spread == 0


def test_markdown_table_is_aligned() -> None:
    table = bench("harness").markdown_table(("name", "ms"), [("a", "1.5"), ("long name", "12")])
    assert table.splitlines() == [
        "| name      |  ms |",
        "|-----------|----:|",
        "| a         | 1.5 |",
        "| long name |  12 |",
    ]


def test_targets_take_the_worst_row_and_say_what_was_not_measured() -> None:
    targets, environment = bench("targets"), bench("environment").Environment.of(CPU)
    blank = {field.name: None for field in fields(targets.LayerRow)}
    row = targets.LayerRow(
        **blank | {"mode": "layer", "shape": "OLMoE-1B-7B", "tokens": 2048, "routing": "uniform", "bits": 3},
    )
    row = replace(row, candidate=targets.PACKED, pool=0.01, speedup=0.9, pool_cost=0.04, bytes_read=1 << 30)
    slow = replace(row, tokens=4096, speedup=0.7)
    lines = {target.text: target.line([row, slow], environment) for target in targets.TARGETS}
    prefill = lines["CPU, 2048 tokens or more, 3 bits, over bf16 F.linear"]
    assert prefill[1:] == (">= 0.80x", "0.70x", "OLMoE-1B-7B, 4096 tokens", "missed")
    assert lines["pool of 1 % of the channels, time over no pool"][-1] == "met"
    assert {line[-1] for text, line in lines.items() if text.startswith("H100")} == {"not measured here"}
    h100 = replace(environment, device="NVIDIA H100 80GB HBM3", device_type="cuda")
    fast = replace(row, tokens=16, speedup=3.2, roof_share=0.55)
    verdicts = [target.line([fast], h100)[-1] for target in targets.TARGETS[:3]]
    assert verdicts == ["met", "missed", "not measured here"]


def test_bad_arguments_are_refused() -> None:
    workloads = bench("workloads")
    with pytest.raises(ValueError, match="`device` must be cpu or cuda, but is 'meta'"):
        bench("environment").pick_device("meta")
    with pytest.raises(ValueError, match="`in_features` must be a multiple of 128, but is 100"):
        workloads.random_packed((2,), 8, 100, CPU)
    with pytest.raises(ValueError, match="`routing` must be one of uniform, zipf, but is 'even'"):
        workloads.route(workloads.SHAPES["tiny"], 2, "even")


STUB = """#!/usr/bin/env bash
case "$*" in
*is_available*) echo "$STUB_GPU" ;;
*jenkspy*) exit 1 ;;
gpu_check.py) exit 1 ;;
*) echo "ran $*" ;;
esac
"""


@pytest.mark.parametrize(("gpu", "steps", "code"), [("", [], 2), ("Stub GPU", [], 1), ("Stub GPU", ["generate"], 0)])
def test_gpu_script(gpu: str, steps: list[str], code: int, tmp_path: Path) -> None:
    (tmp_path / "benches").mkdir()
    for folder in ("moe_compiler", "kernels", "passes", "runtime"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "__init__.py").touch()
    script = shutil.copy(BENCHES / "gpu.sh", tmp_path / "benches")
    stub = tmp_path / "python"
    stub.write_text(STUB)
    stub.chmod(0o755)
    environment = {**os.environ, "PYTHON": str(stub), "STUB_GPU": gpu}
    result = subprocess.run([script, *steps], env=environment, capture_output=True, text=True)
    assert result.returncode == code, result.stdout + result.stderr
    if not gpu:
        assert "PyTorch sees no GPU" in result.stdout
        return
    log = (tmp_path / "benches" / "results" / "Stub-GPU" / "log.txt").read_text()
    assert "ran bench_generate.py" in log
    assert ("check: FAILED with exit code 1" in log) == (not steps)
    assert ("adapt: left out, it needs the packages" in log) == (not steps)


def test_what_runs_on_a_gpu_needs_no_extra_packages() -> None:
    known = modules() | {path.stem: path for path in BENCHES.glob("*.py")}
    reached, todo = set(), ["bench_generate", "bench_moe_layer", "gpu_check"]
    while todo:
        name = todo.pop()
        if name not in reached:
            reached.add(name)
            todo += imports(known[name]) if name in known else []
    assert "moe_compiler.passes.lower" in reached
    assert not {name.split(".")[0] for name in reached} & {"datasets", "jenkspy", "rich", "networkx", "scipy"}
