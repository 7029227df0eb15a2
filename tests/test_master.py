"""Masters: the same original weights from host memory and from files, and what is said when they cannot be had."""

import copy
import json
import os
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from rule_cases import COLUMNS, EXPERTS, quantized_pair, whole_master
from safetensors.torch import load_file, save_file
from tiny import datasets, olmoe, qwen2_moe, tokens
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from moe_compiler.api import dynamo_compile
from moe_compiler.passes.capture import expert_weight
from moe_compiler.passes.experts import read_spec
from moe_compiler.runtime.checkpoint import Checkpoint
from moe_compiler.runtime.master import (
    CacheMaster,
    CheckpointMaster,
    LinearMaster,
    MemoryMaster,
    channel_error,
)
from moe_compiler.runtime.quality import expected_error
from moe_compiler.runtime.rules import hold, restore, worst_channels

PATH = "model.layers.0.mlp.experts"


def saved(model: Any, folder: Path, **options: Any) -> Any:
    """The model as it is loaded from files that `save_pretrained` wrote."""
    model.save_pretrained(folder, **options)
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def stacked_files(folder: Path, *, transposed: bool = False) -> None:
    """Rewrites the one file of a model: experts stacked under their module's own names."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    state = model.state_dict()
    if transposed:
        state = {k: v.transpose(1, 2) if v.dim() == 3 else v for k, v in state.items()}
    save_file({key: tensor.contiguous() for key, tensor in state.items()}, folder / "model.safetensors")


def linears(model: nn.Module) -> dict[str, Tensor]:
    """The weights `(E, N, K)` of the first layer's experts by linear."""
    experts = model.get_submodule(PATH)
    spec = read_spec(experts, PATH)
    return {one.name: expert_weight(experts, spec, one.name) for one in spec.projections}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("olmoe")
    olmoe().save_pretrained(path)
    return path


def test_the_cache_keeps_the_stated_share_with_the_first_channels_among_it() -> None:
    weight, packed, energy = quantized_pair()
    error = channel_error(weight, packed)
    energy[2] = 0  # an expert that the calibration data never used
    first = worst_channels(error, energy, 6)
    assert 2 not in (first // COLUMNS).tolist()
    master = CacheMaster.of(weight, error, first, 0.05)
    assert master.places.shape == (round(0.05 * EXPERTS * COLUMNS),)
    assert bool((master.places.diff() > 0).all())
    assert set(master.places.tolist()) >= set(first.tolist())
    assert 2 in (master.places // COLUMNS).tolist()
    assert master.size_bytes < whole_master(weight, packed).size_bytes
    assert CacheMaster.of(weight, error, first, 0.0).places.shape == (6,)
    assert int((master.kept_error > 0).sum()) == master.places.shape[0]


def test_a_cache_says_what_it_does_not_have() -> None:
    weight, packed, energy = quantized_pair()
    error = channel_error(weight, packed)
    master = CacheMaster.of(weight, error, worst_channels(error, energy, 6), 0.0)
    with pytest.raises(ValueError, match="not the whole weight of expert 3: compile with `master` 'memory' or"):
        master.weight(3)
    packed.pool.copy_(restore(whole_master(weight, packed), packed, energy.flip(1)))
    with pytest.raises(RuntimeError, match="the model's state was loaded from another compilation"):
        expected_error(master, packed, packed.pool, energy)
    empty = CacheMaster.of(weight, error, torch.zeros(0, dtype=torch.int64), 0.0)
    assert empty.columns(torch.zeros(0, dtype=torch.int64)).shape == (0, 24)
    with pytest.raises(RuntimeError, match="loaded from another compilation"):
        empty.columns(torch.zeros(1, dtype=torch.int64))


def test_all_masters_have_the_same_columns(folder: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    for name, weight in linears(model).items():
        error = torch.rand(weight.shape[0], weight.shape[2], generator=torch.Generator().manual_seed(0))
        masters: list[LinearMaster] = [
            CacheMaster.of(weight, error, torch.zeros(0, dtype=torch.int64), 0.1),
            MemoryMaster.of(weight, error),
            CheckpointMaster.of(weight, error, Checkpoint.of(model).find(PATH, name, weight)),
        ]
        places = masters[0].places.flip(0)
        expected = weight[places // weight.shape[2], :, places % weight.shape[2]].float()
        for master in masters:
            assert torch.equal(master.columns(places), expected)
            assert torch.equal(master.error, error)
            torch.testing.assert_close(master.column_norm, weight.float().norm(dim=1), rtol=1e-3, atol=1e-4)
        for master in masters[1:]:
            assert master.whole
            assert torch.equal(master.kept_error, error)
            assert torch.equal(master.weight(5), weight[5])
            assert torch.equal(master.places, torch.arange(error.numel()))
        assert masters[2].size_bytes == 8 * error.numel()
        assert masters[1].size_bytes == 8 * error.numel() + 2 * weight.numel()


FORMS: dict[str, Any] = {
    "one file, a tensor per expert": ({}, None),
    "several files": ({"max_shard_size": "400KB"}, None),
    "stacked": ({}, stacked_files),
    "stacked and transposed": ({}, lambda folder: stacked_files(folder, transposed=True)),
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("build", [olmoe, qwen2_moe])
def test_every_form_of_file_is_read(tmp_path: Path, form: str, build: Any) -> None:
    options, rewrite = FORMS[form]
    model = saved(build(), tmp_path, **options)
    if rewrite:
        rewrite(tmp_path)
    assert (len(list(tmp_path.glob("*.safetensors"))) > 1) == (form == "several files")
    checkpoint = Checkpoint.of(model)
    for name, weight in linears(model).items():
        source = checkpoint.find(PATH, name, weight)
        for expert in range(weight.shape[0]):
            assert torch.equal(source.read(expert), weight[expert])


def test_other_names_of_blocks_and_linears_are_found(folder: Path, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    names = {"mlp.experts": "block_sparse_moe.experts", "gate_proj": "w1", "down_proj": "w2", "up_proj": "w3"}
    renamed = {}
    for key, tensor in load_file(folder / "model.safetensors").items():
        for old, new in names.items():
            key = key.replace(old, new)
        renamed[key] = tensor
    save_file(renamed, tmp_path / "model.safetensors")
    model.config._name_or_path = model.name_or_path = str(tmp_path)
    for name, weight in linears(model).items():
        assert torch.equal(Checkpoint.of(model).find(PATH, name, weight).read(7), weight[7])


def test_a_compiled_model_adapts_from_its_files_as_from_memory(folder: Path) -> None:
    states, pools = {}, {}
    for master in ("checkpoint", "memory", "auto"):
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        dynamo_compile(model, datasets(), quantizer="rtn", target_bits=3.6, master=master, progress=False)
        kept = [one for layer in model.runtime.layers.values() for one in layer.masters.values()]
        kind = MemoryMaster if master == "memory" else CheckpointMaster
        assert all(isinstance(one, kind) for one in kept)
        states[master] = model.state_dict()
        model.runtime.adapt(tokens(4, 32, 9, high=12))
        pools[master] = {key: value for key, value in model.state_dict().items() if "_pool_" in key}
    for master in ("checkpoint", "auto"):
        assert all(torch.equal(value, states[master][key]) for key, value in states["memory"].items())
        assert all(torch.equal(value, pools[master][key]) for key, value in pools["memory"].items())


def test_auto_keeps_the_weights_where_there_are_no_files(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", logger="moe_compiler.layer")
    model = dynamo_compile(olmoe(), datasets(), quantizer="rtn", target_bits=3.6, progress=False)
    kept = [one for layer in model.runtime.layers.values() for one in layer.masters.values()]
    assert all(isinstance(one, MemoryMaster) for one in kept)
    assert "original weights are kept in host memory: there are no safetensors files of the model" in caplog.text


def compile_from_files(model: Any) -> Any:
    options: dict[str, Any] = {"quantizer": "rtn", "target_bits": 3.6, "progress": False}
    return dynamo_compile(model, datasets(), master="checkpoint", **options)


def test_a_model_without_its_files_is_refused_unchanged(folder: Path, tmp_path: Path) -> None:
    model = olmoe()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(
        ValueError, match=r"no safetensors files of the model: came from nowhere: use `master` 'memory'"
    ):
        compile_from_files(model)
    model.name_or_path = "nobody/nothing"
    with pytest.raises(ValueError, match="'nobody/nothing', which it came from, is no folder and is not in the local"):
        compile_from_files(model)
    model.name_or_path = str(tmp_path)
    with pytest.raises(ValueError, match=re.escape(f"the safetensors files in {tmp_path.resolve()} cannot be read")):
        compile_from_files(model)
    model.name_or_path = str(folder)
    with torch.no_grad():
        model.model.layers[0].mlp.experts.down_proj[5, 3, 2] += 1
    named = f"no tensor in {folder.resolve()} agrees with the weights of `{PATH}.down_proj` in memory, (8, 128, 128)"
    with pytest.raises(ValueError, match=re.escape(named)):
        compile_from_files(model)
    changed = {key for key, value in model.state_dict().items() if not torch.equal(value, before[key])}
    assert changed == {f"{PATH}.down_proj"}


BROKEN = {
    "nothing": b"",
    "a length alone": (10**9).to_bytes(8, "little"),
    "no JSON": (4).to_bytes(8, "little") + b"abcd",
    "a tensor that does not fit": (67).to_bytes(8, "little")
    + json.dumps({"a": {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]}}).encode().ljust(67),
    "a wrong header": (14).to_bytes(8, "little") + b'{"a": {"b":1}}',
}


@pytest.mark.parametrize("content", BROKEN)
def test_a_broken_file_is_refused(tmp_path: Path, content: str) -> None:
    (tmp_path / "model.safetensors").write_bytes(BROKEN[content])
    model = olmoe(num_hidden_layers=1)
    model.name_or_path = str(tmp_path)
    with pytest.raises(ValueError, match=r"cannot be read .*: use `master` 'memory'"):
        Checkpoint.of(model)


@pytest.mark.parametrize("what", ["touched", "cut", "gone"])
def test_a_file_that_changed_after_compiling_changes_nothing(tmp_path: Path, what: str) -> None:
    model = compile_from_files(saved(olmoe(num_hidden_layers=1), tmp_path))
    model.runtime.adapt(tokens(2, 32, 4), name="first")
    before = {key: value.clone() for key, value in model.state_dict().items()}
    file = tmp_path / "model.safetensors"
    if what == "gone":
        file.unlink()
    elif what == "cut":
        (tmp_path / "short").write_bytes(file.read_bytes()[:1000])
        (tmp_path / "short").replace(file)  # never in place: the model itself has the file mapped
    else:
        os.utime(file, ns=(1, 1))
    message = "cannot be read: No such file" if what == "gone" else "has changed since the model was compiled"
    with pytest.raises(RuntimeError, match=f"model.safetensors.*{message}"):
        model.runtime.adapt(tokens(4, 32, 9, high=12), name="second")
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert model.runtime.active == "first"


def test_what_is_held_is_the_original() -> None:
    weight, packed, energy = quantized_pair()
    master = whole_master(weight, packed)
    places = worst_channels(master.error, energy, 6)
    packed.pool.copy_(hold(master, packed, places))
    restored = packed.dequantize()[places // COLUMNS, :, places % COLUMNS]
    torch.testing.assert_close(restored, weight[places // COLUMNS, :, places % COLUMNS], rtol=0, atol=0.02)


def test_copies_share_a_master() -> None:
    weight, packed, _ = quantized_pair()
    master = whole_master(weight, packed)
    assert copy.deepcopy(master) is master
    assert copy.deepcopy({"linear": master})["linear"].original.data_ptr() == weight.data_ptr()
