"""Compiled models in transformers' own files: saved, loaded, generated from, switched, adapted and saved again."""

import copy
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import deepseek_v1
import pytest
import torch
from architectures import architecture_names, build, example_inputs
from compiled import logits, new_data, other_data
from safetensors.torch import load_file
from saved_cases import OPTIONS, compiled, edit, load, same, small, tensors
from tiny import datasets, qwen2_moe, tokens
from transformers import AutoModel
from transformers.quantizers import auto

from moe_compiler.api import dynamo_compile
from moe_compiler.coverage import CompileReport
from moe_compiler.runtime.master import CacheMaster, CheckpointMaster, DetachedMaster
from moe_compiler.saving import REPORT

GENERATE: dict[str, Any] = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A compiled model with two profiles besides its first."""
    compiled_model = compiled(tmp_path_factory.mktemp("base"))
    compiled_model.runtime.adapt(new_data(), name="support/chat")
    compiled_model.runtime.adapt(other_data(), name="Support chat", rule="restore")
    return compiled_model


@pytest.fixture(scope="module")
def folder(model: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("saved")
    model.save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def loaded(folder: Path) -> Any:
    return load(folder)


def test_a_loaded_model_is_the_saved_one(model: Any, loaded: Any) -> None:
    assert type(loaded) is type(model)
    assert same(tensors(loaded), tensors(model))
    assert torch.equal(logits(loaded), logits(model))
    x = tokens(2, 5, 7)
    assert torch.equal(loaded.generate(x, **GENERATE), model.generate(x, **GENERATE))
    assert isinstance(loaded.moe_report, CompileReport)
    assert loaded.moe_report.to_dict() == model.moe_report.to_dict()
    assert loaded.moe_report.analysis.graphs == model.moe_report.analysis.graphs
    assert loaded.moe_report.datasets == {"low": 256, "high": 256}
    assert list(loaded.moe_graphs) == list(model.moe_graphs)
    for path, graph in loaded.moe_graphs.items():
        assert graph is loaded.get_submodule(path)
        assert graph.code == model.moe_graphs[path].code
        assert graph.meta["stages"] == model.moe_graphs[path].meta["stages"]


def test_profiles_are_there_and_work(model: Any, loaded: Any) -> None:
    model, loaded = copy.deepcopy((model, loaded))
    assert list(loaded.runtime.profiles) == ["calibration", "support/chat", "Support chat"]
    assert loaded.runtime.active == "Support chat"
    for name, profile in model.runtime.profiles.items():
        other = loaded.runtime.profiles[name]
        assert (other.rule, other.tokens) == (profile.rule, profile.tokens)
        for runtime in (model.runtime, loaded.runtime):
            runtime.switch(name)
        assert torch.equal(logits(loaded), logits(model))
    for runtime in (model.runtime, loaded.runtime):
        runtime.revert()
    assert torch.equal(logits(loaded), logits(model))
    loaded.runtime.on_drift("switch", minimum_tokens=8)
    loaded.generate(new_data()[:2], **GENERATE)
    assert loaded.runtime.active == "support/chat"  # made for such data


def test_what_is_saved_again_is_the_same(folder: Path, loaded: Any, tmp_path: Path) -> None:
    loaded.save_pretrained(tmp_path)
    assert same(load_file(tmp_path / "model.safetensors"), load_file(folder / "model.safetensors"))
    for name in ("config.json", "generation_config.json", REPORT, "README.md"):
        assert (tmp_path / name).read_text() == (folder / name).read_text()
    for path in (folder / "profiles").iterdir():
        assert same(load_file(tmp_path / "profiles" / path.name), load_file(path))


def test_a_copy_of_a_loaded_model_stands_alone(loaded: Any, tmp_path: Path) -> None:
    copied = copy.deepcopy(loaded)
    expected = logits(loaded)
    copied.runtime.revert()
    assert not torch.equal(logits(copied), expected)
    assert torch.equal(logits(loaded), expected)
    copied.save_pretrained(tmp_path)
    again = load(tmp_path)
    assert again.runtime.active == "calibration"
    assert torch.equal(logits(again), logits(copied))


def test_adapting_a_loaded_model_finds_the_original_weights(model: Any, folder: Path) -> None:
    fresh, saved = load(folder), copy.deepcopy(model)
    assert fresh.runtime.is_detached
    report = fresh.runtime.adapt(new_data(3), name="more")
    assert not fresh.runtime.is_detached
    masters = fresh.runtime.layers["model.layers.0.mlp"].masters.values()
    assert all(isinstance(master, CheckpointMaster) for master in masters)
    assert report.layers == saved.runtime.adapt(new_data(3), name="more").layers
    assert torch.equal(logits(fresh), logits(saved))


def test_weights_that_have_moved_are_named(folder: Path, model: Any, tmp_path: Path) -> None:
    moved, gone = tmp_path / "moved", tmp_path / "gone"
    small().save_pretrained(moved)
    copied = copy.deepcopy(model)
    copied.runtime.base_model = str(gone)
    copied.config.quantization_config = _based_on(copied.config.quantization_config, str(gone))
    copied.save_pretrained(tmp_path / "saved")
    fresh = load(tmp_path / "saved")
    with pytest.raises(RuntimeError, match=rf"call `model.runtime.attach_master` .*{re.escape(str(gone))}"):
        fresh.runtime.adapt(new_data(3), name="more")
    assert "more" not in fresh.runtime.profiles
    with pytest.raises(RuntimeError, match="a saved model does not hold the original weights"):
        next(iter(fresh.runtime.layers["model.layers.0.mlp"].masters.values())).weight(0)
    other = small()
    with torch.no_grad():
        other.model.layers[0].mlp.experts.down_proj[5, 3] += 0.5
    other.save_pretrained(tmp_path / "other")
    with pytest.raises(ValueError, match=r"is not the one that was compiled: .*experts.down_proj"):
        fresh.runtime.attach_master(tmp_path / "other")
    with pytest.raises(ValueError, match="is no folder and is not in the local cache"):
        fresh.runtime.attach_master("nobody/nothing")
    with pytest.raises(ValueError, match="`source` must be a model's folder or its name on the hub, but is ''"):
        fresh.runtime.attach_master("")
    assert fresh.runtime.is_detached
    fresh.runtime.attach_master(moved)
    expected = model.runtime.layers["model.layers.0.mlp"].masters
    for name, master in fresh.runtime.layers["model.layers.0.mlp"].masters.items():
        assert torch.equal(master.weight(3), expected[name].weight(3))


def _based_on(config: Any, base: str) -> Any:

    return replace(config, compiled=replace(config.compiled, base_model=base))


def test_a_cache_is_saved_with_the_model(tmp_path: Path) -> None:
    cached = compiled(tmp_path / "base", pool="channels", master="cache")
    cached.save_pretrained(tmp_path / "saved")
    fresh = load(tmp_path / "saved")
    assert not fresh.runtime.is_detached
    assert all(isinstance(one, CacheMaster) for one in fresh.runtime.layers["model.layers.0.mlp"].masters.values())
    assert fresh.runtime.adapt(new_data()).layers == cached.runtime.adapt(new_data()).layers
    assert torch.equal(logits(fresh), logits(cached))


def test_other_dtypes_and_devices(folder: Path, loaded: Any) -> None:
    converted = load(folder, dtype=torch.bfloat16, device_map="cpu")
    assert converted.dtype == torch.bfloat16
    for name, tensor in loaded.state_dict().items():
        expected = tensor if ".experts." in name else tensor.to(torch.bfloat16)
        assert torch.equal(converted.state_dict()[name], expected), name
    distance = (logits(converted).float() - logits(loaded)).norm() / logits(loaded).norm()
    assert distance < 0.1  # some tokens may find another expert
    with pytest.raises(ValueError, match="`device_map` must not offload a compiled model"):
        load(folder, device_map={"model": "cpu", "lm_head": "disk"})


def test_a_loaded_model_is_refused_by_the_compiler(loaded: Any) -> None:
    assert loaded.quantization_method == "moe_compiler"
    with pytest.raises(ValueError, match="is compiled already"):
        dynamo_compile(loaded, datasets())
    stripped = copy.deepcopy(loaded)
    stripped.runtime = None
    with pytest.raises(ValueError, match="is quantized already, by moe_compiler"):
        dynamo_compile(stripped, datasets())


NAMES = ["deepseek_v1", "qwen2_moe", *(n for n in ("deepseek_v3", "mixtral", "gpt_oss") if n in architecture_names())]


@pytest.mark.parametrize("name", NAMES)
def test_every_form_of_experts_is_loaded_with_the_plug_in_alone(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = deepseek_v1.build() if name == "deepseek_v1" else build(name)
    ids = example_inputs(model, 3, 24)["input_ids"] % 90
    dynamo_compile(model, {"some": ids}, **OPTIONS)
    model.save_pretrained(tmp_path, max_shard_size="50KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 1
    with monkeypatch.context() as patch:  # transformers as it is without our import
        patch.delitem(auto.AUTO_QUANTIZATION_CONFIG_MAPPING, "moe_compiler")
        with pytest.raises(RuntimeError, match=r"ignore_mismatched_sizes"):
            type(model).from_pretrained(tmp_path)
    fresh, found = type(model).from_pretrained(tmp_path, output_loading_info=True)
    assert not any(found.values())
    assert same(tensors(fresh), tensors(model))
    with torch.no_grad():
        assert torch.equal(fresh(input_ids=ids).logits, model(input_ids=ids).logits)
    x = ids[:1, :4]
    assert torch.equal(fresh.generate(x, **GENERATE), model.generate(x, **GENERATE))
    assert {path: graph.code for path, graph in fresh.moe_graphs.items()} == {
        path: graph.code for path, graph in model.moe_graphs.items()
    }


def test_shared_experts_that_stay_linears_of_their_own(tmp_path: Path) -> None:
    sizes = {"hidden_size": 64, "moe_intermediate_size": 64}
    model = qwen2_moe(layers=1, shared_expert_intermediate_size=96, **sizes)  # no multiple of the routed experts' size
    dynamo_compile(model, datasets(), **OPTIONS)
    model.save_pretrained(tmp_path)
    fresh = load(tmp_path)
    assert same(tensors(fresh), tensors(model))
    assert torch.equal(logits(fresh), logits(model))
    assert "PackedLinear" in repr(fresh.model.layers[0].mlp.shared_expert)


def test_a_model_without_a_past(tmp_path: Path) -> None:
    model = dynamo_compile(small(), datasets(), **OPTIONS)
    model.save_pretrained(tmp_path)
    fresh = load(tmp_path)
    masters = fresh.runtime.layers["model.layers.0.mlp"].masters.values()
    assert all(isinstance(one, DetachedMaster) for one in masters)
    with pytest.raises(RuntimeError, match=r"of unknown name \(it is not known which model this one was compiled from"):
        fresh.runtime.adapt(new_data())


def test_another_class_of_the_model_is_refused(folder: Path) -> None:

    with pytest.raises(ValueError, match=r"has the MoE blocks model.layers.0.mlp, but a OlmoeModel has layers.0.mlp"):
        AutoModel.from_pretrained(folder)


def test_the_report_can_hold_perplexities(loaded: Any, tmp_path: Path) -> None:

    copied = copy.deepcopy(loaded)
    copied.moe_report = replace(copied.moe_report, perplexities={"wiki": (10.0, 10.5)})
    copied.save_pretrained(tmp_path)
    assert "| wiki | 10.000 | 10.500 | +5.00% |" in (tmp_path / "README.md").read_text()
    assert load(tmp_path).moe_report.perplexities == {"wiki": (10.0, 10.5)}
    edit(tmp_path / REPORT, lambda contents: contents["report"].pop("plan"))
    with pytest.raises(ValueError, match=r"moe_report.json cannot be read: the report lacks the field 'plan'"):
        load(tmp_path)
