"""The pure parts of `benches/peers`: what is stored and counted, plans as rules, rows and their table. No installs."""

import importlib
import json
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import nn

from moe_compiler.passes.plan import LayerPlan, PrecisionPlan

BENCHES = Path(__file__).resolve().parent.parent / "benches"


def peers(name: str) -> ModuleType:
    """A module of `benches/peers` or `benches`, which are no packages: their scripts find each other by `sys.path`."""
    for folder in (BENCHES, BENCHES / "peers"):
        if str(folder) not in sys.path:
            sys.path.append(str(folder))
    return importlib.import_module(name)


def gptq_tensors(bits: int, n: int, k: int, group: int) -> dict[str, torch.Tensor]:
    """What GPTQ's format stores for one linear."""
    return {
        "qweight": torch.zeros(k * bits // 32, n, dtype=torch.int32),
        "qzeros": torch.zeros(k // group, n * bits // 32, dtype=torch.int32),
        "scales": torch.zeros(k // group, n, dtype=torch.float16),
        "g_idx": (torch.arange(k) // group).int(),
    }


@settings(deadline=None, max_examples=20)
@given(bits=st.sampled_from([2, 3, 4, 8]), group=st.sampled_from([32, 64, 128]), experts=st.integers(1, 3))
def test_effective_bits_are_codes_scales_and_zero_points(bits: int, group: int, experts: int) -> None:
    storage, n, k = peers("storage"), 64, 256
    tensors = [
        (f"model.layers.0.mlp.experts.{expert}.up_proj.{name}", tensor)
        for expert in range(experts)
        for name, tensor in gptq_tensors(bits, n, k, group).items()
    ]
    found = storage.count_storage(tensors, experts * n * k)
    assert found.effective_bits == pytest.approx(bits + (16 + bits) / group)
    assert found.derivable_bits == pytest.approx(32 / n)
    assert found.size_bytes + found.derivable_bytes == sum(t.numel() * t.element_size() for _, t in tensors)


def test_a_group_index_that_says_something_is_counted() -> None:
    storage = peers("storage")
    shuffled = torch.tensor([0, 1, 0, 1], dtype=torch.int32)
    assert not storage.is_trivial_group_index("experts.0.g_idx", shuffled)
    assert not storage.is_trivial_group_index("experts.0.scales", shuffled.sort().values)
    assert not storage.is_trivial_group_index("experts.0.g_idx", torch.tensor([0, 0, 1], dtype=torch.int32))
    assert storage.is_trivial_group_index("experts.0.g_idx", shuffled.sort().values)
    assert storage.count_storage([("experts.0.g_idx", shuffled)], 8).effective_bits == 16


@pytest.mark.parametrize("tensors", [[], [("experts.0.weight", torch.zeros(2))]])
def test_nothing_to_count_is_refused(tensors: list[tuple[str, torch.Tensor]]) -> None:
    with pytest.raises(ValueError, match="must have bytes and weights to count"):
        peers("storage").count_storage(tensors, 0)


class _Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(4, 3)
        self.experts = nn.Module()
        self.experts.up_proj = nn.Parameter(torch.zeros(3, 5, 4))
        self.experts.register_buffer("scale", torch.zeros(3, dtype=torch.float16))


def test_only_experts_count() -> None:
    storage, model = peers("storage"), nn.ModuleDict({"mlp": _Block()})
    assert storage.expert_weights(model) == 60
    assert [tuple(matrix.shape) for _, matrix in storage.expert_matrices(model)] == [(5, 4)] * 3
    assert [name for name, _ in storage.expert_tensors(model)] == ["mlp.experts.up_proj", "mlp.experts.scale"]
    assert storage.count_storage(storage.expert_tensors(model), 60).size_bytes == 60 * 4 + 3 * 2


def test_checkpoint_files_are_counted(tmp_path: Path) -> None:
    storage = peers("storage")
    with pytest.raises(FileNotFoundError, match="must hold safetensors files"):
        list(storage.checkpoint_expert_tensors(tmp_path))
    (tmp_path / "inner").mkdir()
    inside = {"model.mlp.experts.0.up_proj.qweight": torch.zeros(4, dtype=torch.int32)}
    save_file({**inside, "model.self_attn.q_proj.weight": torch.zeros(9)}, tmp_path / "inner" / "model.safetensors")
    assert [(name, t.dtype) for name, t in storage.checkpoint_expert_tensors(tmp_path)] == [(*inside, torch.int32)]


def test_tensor_subclasses_are_taken_apart() -> None:
    class Wrapped(torch.Tensor):
        def __tensor_flatten__(self) -> tuple[list[str], None]:
            return ["codes", "scale"], None

    wrapped = torch.zeros(2).as_subclass(Wrapped)
    wrapped.codes, wrapped.scale = torch.zeros(2, dtype=torch.uint8), torch.zeros(1)  # type: ignore[attr-defined]
    parts = peers("storage").tensor_parts("experts.w", wrapped)
    assert [(name, one.dtype) for name, one in parts] == [
        ("experts.w.codes", torch.uint8),
        ("experts.w.scale", torch.float32),
    ]


WIDTHS = st.lists(st.sampled_from([2, 4, 6, 8]), min_size=12, max_size=12)


@settings(deadline=None, max_examples=20)
@given(gate_up=WIDTHS, down=WIDTHS, default=st.sampled_from([2, 3, 4]))
def test_rules_give_every_linear_its_width(gate_up: list[int], down: list[int], default: int) -> None:
    rules = peers("plan_rules")
    layer = LayerPlan(
        "model.layers.1.mlp",
        {"gate_up_proj": tuple(gate_up), "down_proj": tuple(down)},
        {"gate_up_proj": (8, 8), "down_proj": (8, 8)},
        {"gate_up_proj": 0.2, "down_proj": 0.2},
    )
    plan = json.loads(json.dumps(PrecisionPlan("budget", {layer.path: layer}).to_dict()))
    widths = rules.plan_widths(plan)
    found = rules.dynamic_rules(widths, default)
    wanted = {"gate_proj": gate_up, "up_proj": gate_up, "down_proj": down}
    for linear, bits in wanted.items():
        for expert in range(12):
            path = f"model.layers.1.mlp.experts.{expert}.{linear}"
            hits = [rule["bits"] for pattern, rule in found.items() if re.match(pattern.removeprefix("+:"), path)]
            assert (hits or [default]) == [bits[expert]]
            assert not any(re.match(p.removeprefix("+:"), path.replace("layers.1", "layers.11")) for p in found)


def test_a_plan_may_be_a_plain_mapping(tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    path.write_text(
        json.dumps({"model.layers.0.mlp.experts.3.gate_up_proj": 2, "model.layers.0.mlp.experts.3.down_proj": 8})
    )
    start = "model.layers.0.mlp.experts.3."
    assert peers("plan_rules").read_plan(path) == {start + "gate_proj": 2, start + "up_proj": 2, start + "down_proj": 8}


@pytest.mark.parametrize(
    ("plan", "message"),
    [
        ([], "must be a JSON object"),
        ({}, "must name at least one linear"),
        ({"model.layers.0.mlp.experts.0.up_proj": 9}, "one of the widths"),
        ({"model.layers.0.mlp.experts.0.up_proj": 2.5}, "one of the widths"),
        ({"model.layers.0.mlp.gate": 4}, "must give paths like"),
        ({"layers": [{"path": "model.layers.0.mlp"}]}, "lacks the field 'bits'"),
    ],
)
def test_bad_plans_are_refused(plan: Any, message: str, tmp_path: Path) -> None:
    (tmp_path / "plan.json").write_text(json.dumps(plan))
    with pytest.raises(ValueError, match=message):
        peers("plan_rules").read_plan(tmp_path / "plan.json")


def test_peers_are_found_by_name() -> None:
    registry = peers("registry")
    assert list(registry.find_peers("hqq,gptqmodel-3")) == ["hqq", "gptqmodel-3"]
    assert registry.find_peers("all") == registry.PEERS
    for name in ("", "gptq-3"):
        with pytest.raises(ValueError, match="`peers` must be some of gptqmodel-4, gptqmodel-3"):
            registry.find_peers(name)
    for peer in registry.PEERS.values():
        requirements = (BENCHES / "peers" / "requirements" / f"{peer.environment}.txt").read_text()
        assert f"\n{peer.package}==" in requirements
        assert "def quantize(task: Task) -> Quantized:" in (BENCHES / "peers" / f"{peer.module}.py").read_text()


def test_tasks_and_outcomes_survive_files(tmp_path: Path) -> None:
    exchange = peers("exchange")
    windows = {"code": [torch.tensor([1, 2]), torch.tensor([3, 4])], "wiki": [torch.tensor([5, 6])]}
    task = exchange.Task("folder", 12, windows, {"code": []}, {"bits": 3}, 7, tmp_path)
    task.save(tmp_path / "task.pt")
    found = exchange.Task.load(tmp_path / "task.pt")
    assert (found.model, found.expert_weights, found.settings, found.seed, found.folder) == (
        "folder",
        12,
        {"bits": 3},
        7,
        tmp_path,
    )
    assert torch.equal(torch.stack(found.samples), torch.tensor([[1, 2], [3, 4], [5, 6]]))
    outcome = exchange.Outcome("tool 1.0", "ok", {"code_bits": 3.0}, {"code": [1.5]})
    outcome.save(tmp_path / "outcome.json")
    assert exchange.Outcome.load(tmp_path / "outcome.json") == outcome


def _row(name: str, **changes: Any) -> Any:
    return peers("accuracy_rows").Row(suite="peers", name=name, model="m", tool="tool 1.0", window=3, **changes)


def _task(folder: Path) -> Any:
    return peers("exchange").Task("m", 8, {}, {}, {}, 0, folder)


FAKE = """
import sys, json
open(sys.argv[4], "w").write(json.dumps({"tool": "p 2.0", "status": "ok", "figures": {"code_bits": 3.0}, "nll": {"code": [2.0]}}))
"""


@pytest.mark.parametrize(
    ("script", "status"),
    [
        (FAKE, "ok"),
        ("raise SystemExit('ValueError: no kernel\\n')", "exit code 1: ValueError: no kernel"),
        ("import time; time.sleep(60)", "stopped after 1 s"),
    ],
)
def test_every_end_of_a_peer_is_a_row(
    script: str, status: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runner, registry = peers("runner"), peers("registry")
    worker = tmp_path / "worker.py"
    worker.write_text(script)
    monkeypatch.setattr(runner, "WORKER", worker)
    monkeypatch.setattr(runner, "ensure_environment", lambda *_: sys.executable)
    peer = registry.Peer("p", "e", "peer_p", {"plan": registry.PLAN})
    seconds = 1 if status.startswith("stopped") else 60
    row = runner.run_peer(peer, _row("p-3"), _task(tmp_path), tmp_path, tmp_path / "plan.json", seconds)
    assert (row.name, row.status, row.settings) == ("p-3", status, {"plan": "plan.json"})
    assert (row.tool, row.code_bits, dict(row.nll)) == (
        ("p 2.0", 3.0, {"code": [2.0]}) if status == "ok" else ("p", None, {})
    )


def test_rows_name_no_folders(tmp_path: Path) -> None:
    runner = peers("runner")
    assert runner.model_name(str(tmp_path)) == tmp_path.name
    assert runner.model_name("allenai/OLMoE-1B-7B-0924") == "allenai/OLMoE-1B-7B-0924"


def test_a_failed_installation_is_a_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runner, environments = peers("runner"), peers("virtual_environments")

    def fail(command: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
        return subprocess.CompletedProcess(
            command, 1, "", "WARNING: slow\nERROR: No matching distribution found for p==9\nhint\n"
        )

    monkeypatch.setattr(environments.subprocess, "run", fail)
    row = runner.run_peer(peers("registry").PEERS["hqq"], _row("hqq"), _task(tmp_path), tmp_path / "e", None, 1)
    assert row.status == "InstallError: hqq cannot be installed: ERROR: No matching distribution found for p==9"
    assert not (tmp_path / "e" / "hqq" / "installed.txt").exists()


def test_an_environment_is_made_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    environments, commands = peers("virtual_environments"), []

    def succeed(command: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
        commands.append(command)
        if "venv" in command:
            (tmp_path / "hqq" / "bin").mkdir(parents=True)
            (tmp_path / "hqq" / "bin" / "python").touch()
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(environments.subprocess, "run", succeed)
    for _ in range(2):
        assert environments.ensure_environment("hqq", tmp_path) == tmp_path / "hqq" / "bin" / "python"
    assert len(commands) == 2
    (tmp_path / "hqq" / "installed.txt").write_text("hqq==0.1\n")
    environments.ensure_environment("hqq", tmp_path)
    assert len(commands) == 4
    with pytest.raises(FileNotFoundError, match=r"nothing\.txt"):
        environments.ensure_environment("nothing", tmp_path)


def test_the_table_says_what_failed_and_why() -> None:
    rows = [
        _row("original", code_bits=16.0, seen=("code",), nll={"code": [2.0, 4.0]}),
        _row("good", code_bits=3.0, effective_bits=3.148, size_bytes=2_000_000, compile_s=9.6, seen=("code",), note="sees",
             nll={"code": [2.02, 4.04]}),
        _row("bad", status="ImportError: no kernel"),
    ]  # fmt: skip
    table = peers("table").markdown_table(rows)
    assert "| good (1) | tool 1.0 | 3.00 | 3.15 | 2.00 | 10 | 1.50 ± " in table
    assert "| bad (2) | tool 1.0 | – | – | – | – | – | – |" in table
    assert table.endswith("\n\n1. sees\n2. ImportError: no kernel\n")
    assert replace(rows[0], note="").name in table
