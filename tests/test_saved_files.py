"""The files of a saved model: what is in them, what is said of damaged ones, and what a crash leaves."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from compiled import logits
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from saved_cases import compiled, edit, load
from transformers import AutoModelForCausalLM

from moe_compiler import loading, saving
from moe_compiler.coverage import CompileReport
from moe_compiler.passes.absorb import SharedExperts
from moe_compiler.passes.capture import BlockCall
from moe_compiler.saved_format import BlockFormat, LinearFormat, SavedFormat
from moe_compiler.saving import ANALYSIS, PROFILES, REPORT, RUNTIME

WEIGHTS = "model.safetensors"
WIDTHS = st.lists(st.sampled_from([2, 4, 6, 8]), max_size=4).map(tuple)
SIZES = st.integers(0, 99)
NAMES = st.sampled_from(["", "mlp", "model.layers.10.mlp", "é"])
LINEARS = st.builds(LinearFormat, WIDTHS, WIDTHS, SIZES, SIZES)
CALLS = st.builds(BlockCall, st.dictionaries(NAMES, SIZES, max_size=2), st.frozensets(NAMES, max_size=2))
ABSORBED = st.none() | st.builds(SharedExperts, NAMES, st.none() | NAMES, SIZES)
BLOCKS = st.builds(
    BlockFormat,
    st.dictionaries(NAMES, LINEARS, max_size=2),
    ABSORBED,
    st.dictionaries(NAMES, SIZES, max_size=2),
    CALLS,
)
FORMATS = st.builds(
    SavedFormat, st.dictionaries(NAMES, BLOCKS, min_size=1, max_size=2), NAMES, st.none() | NAMES, NAMES
)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return compiled(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def saved(model: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("saved")
    model.save_pretrained(path)
    return path


@pytest.fixture
def folder(saved: Path, tmp_path: Path) -> Path:
    """A folder of one's own with the saved model."""
    return Path(shutil.copytree(saved, tmp_path / "copy"))


@settings(deadline=None, max_examples=30)
@given(FORMATS)
def test_the_format_survives_json(saved_format: SavedFormat) -> None:
    again = SavedFormat.from_dict(json.loads(json.dumps(saved_format.to_dict(), sort_keys=True)))
    assert again == saved_format
    assert again.fingerprint == saved_format.fingerprint


def test_the_report_survives_json(model: Any) -> None:
    report: CompileReport = model.moe_report
    written = json.loads(json.dumps(report.to_dict()))
    again = CompileReport.from_dict(written)
    assert again.to_dict() == written
    assert (again.config, again.coverage, again.analysis) == (report.config, report.coverage, None)
    with pytest.raises(ValueError, match="the report lacks the field 'config'"):
        CompileReport.from_dict({})
    with pytest.raises(ValueError, match="the report is damaged"):
        CompileReport.from_dict(report.to_dict() | {"coverage": [{"path": 1}]})


def test_what_is_in_the_folder(model: Any, saved: Path) -> None:
    found = {str(path.relative_to(saved)) for path in saved.rglob("*") if path.is_file()}
    profile = f"{PROFILES}/calibration.safetensors"
    expected = {"config.json", "generation_config.json", WEIGHTS, RUNTIME, REPORT, ANALYSIS, "README.md", profile}
    assert found == expected
    state = model.state_dict()
    for name in (WEIGHTS, RUNTIME, ANALYSIS, profile):  # safetensors all of them: JSON and numbers, nothing to unpickle
        with safe_open(saved / name, framework="pt") as file:
            assert file.keys()
            if name == WEIGHTS:
                assert set(file.keys()) == state.keys()
                assert file.metadata()["format"] == "pt"
    card = (saved / "README.md").read_text()
    for part in ("base_model:", "| routed experts | 98,304 |", "| low | 256 | – |", "from_pretrained(folder)"):
        assert (part in card) == (part != "base_model:"), part  # the base is a folder, no name on the hub


def _set(*path: str, value: Any) -> Callable[[Any], None]:
    def change(contents: Any) -> None:
        for key in path[:-1]:
            contents = contents[key]
        contents[path[-1]] = value

    return change


COMPILED = ("quantization_config", "compiled")
BLOCK = (*COMPILED, "blocks", "model.layers.0.mlp")
GARBLED: dict[str, tuple[Any, str]] = {
    "a newer version": (_set(*COMPILED, "format_version", value=99), "`format_version` must be 1, but is 99"),
    "an unknown field": (_set("quantization_config", "magic", value=1), "`magic` is not a field that this version"),
    "a bad choice": (_set("quantization_config", "group_size", value=7), "`group_size` must be one of 32, 64, 128"),
    "no packed weights": (_set(*COMPILED, value=None), "must describe the packed weights in its field `compiled`"),
    "a text": (_set(*COMPILED, value="x"), "`compiled` must be an object, but is 'x'"),
    "no blocks": (_set(*COMPILED, "blocks", value={}), "`blocks` must hold at least one MoE block"),
    "damaged blocks": (_set(*COMPILED, "blocks", value=[1]), "`compiled` is damaged"),
    "a missing field": (lambda c: c[COMPILED[0]][COMPILED[1]].pop("base_model"), "lacks the field 'base_model'"),
    "too few widths": (_set(*BLOCK, "linears", "down_proj", "bits", value="2"), "must have widths for 8 experts"),
    "another width": (_set(*BLOCK, "linears", "down_proj", "bits", value="23222222"), "must hold widths in"),
    "other linears": (_set(*BLOCK, "linears", value={}), "must have the linears gate_up_proj, down_proj, but config"),
    "another fingerprint": (_set(*COMPILED, "fingerprint", value="0"), "belong to different models"),
}


@pytest.mark.parametrize("case", GARBLED)
def test_a_garbled_config_is_refused(folder: Path, case: str) -> None:
    change, message = GARBLED[case]
    edit(folder / "config.json", change)
    with pytest.raises(ValueError, match=message):
        load(folder)


def _cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-7])


FILES: dict[str, tuple[str, Callable[[Path], None], type[Exception], str]] = {
    "weights cut": (WEIGHTS, _cut, ValueError, "model.safetensors is not a whole safetensors file"),
    "run time cut": (RUNTIME, _cut, ValueError, "moe_runtime.safetensors cannot be read"),
    "run time gone": (RUNTIME, os.remove, FileNotFoundError, "the saved model is not complete: .*moe_runtime"),
    "report gone": (REPORT, os.remove, FileNotFoundError, "the saved model is not complete: .*moe_report.json"),
    "report cut": (REPORT, _cut, ValueError, "moe_report.json cannot be read"),
    "profile cut": (f"{PROFILES}/calibration.safetensors", _cut, ValueError, "profile .* cannot be loaded"),
    "analysis gone": (ANALYSIS, os.remove, FileNotFoundError, "the saved model is not complete: .*moe_analysis"),
}


def test_a_report_that_points_elsewhere_is_refused(folder: Path) -> None:
    edit(folder / REPORT, _set("profiles", "calibration", value="../calibration.safetensors"))
    with pytest.raises(ValueError, match=r"its `profiles` must be files in profiles/, but are \.\./calibration"):
        load(folder)


@pytest.mark.parametrize("case", FILES)
def test_a_damaged_file_is_named(folder: Path, case: str) -> None:
    name, damage, kind, message = FILES[case]
    damage(folder / name)
    with pytest.raises(kind, match=message):
        load(folder)


def test_a_crash_leaves_the_old_model_or_none(model: Any, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = logits(model)

    def fail(*_: Any, **__: Any) -> None:
        raise OSError("no space left")

    with monkeypatch.context() as patch:
        patch.setattr(saving, "write_layers", fail)
        with pytest.raises(OSError, match="no space left"):
            model.save_pretrained(folder)
    assert torch.equal(logits(load(folder)), expected)
    with monkeypatch.context() as patch:
        rename, moved = os.replace, []

        def fail_after_two(source: Any, target: Any) -> None:
            if len(moved) == 2:
                fail()
            moved.append(target)
            rename(source, target)

        patch.setattr(saving.os, "replace", fail_after_two)
        with pytest.raises(OSError, match="no space left"):
            model.save_pretrained(folder)
    assert not (folder / "config.json").exists()
    with pytest.raises((OSError, ValueError), match=r"config.json|model_type"):
        load(folder)
    model.save_pretrained(folder)
    assert torch.equal(logits(load(folder)), expected)


def test_an_older_model_in_the_folder_is_replaced_whole(model: Any, saved: Path, tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text("mine")
    (tmp_path / saving._STAGING).mkdir()
    (tmp_path / saving._STAGING / "left over").touch()
    model.save_pretrained(tmp_path, max_shard_size="200KB")
    assert (tmp_path / "model.safetensors.index.json").is_file()
    assert torch.equal(logits(load(tmp_path)), logits(model))
    model.save_pretrained(tmp_path)
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {path.name for path in saved.iterdir()}
    assert (tmp_path / "README.md").read_text() == "mine"


def test_bad_arguments(model: Any, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match=r"`save_directory` must be a folder, but .*file is a file"):
        model.save_pretrained(tmp_path / "file")
    with pytest.raises(ValueError, match=r"must not be .*, the folder of the model that was compiled"):
        model.save_pretrained(model.runtime.base_model)
    with pytest.raises(ValueError, match="`state_dict` is not supported for a compiled model"):
        model.save_pretrained(tmp_path / "new", state_dict={"a": torch.zeros(1)})
    with pytest.raises(TypeError, match="save_directory"):
        model.save_pretrained()
    model.save_pretrained(tmp_path / "new", is_main_process=False)
    assert not (tmp_path / "new").exists()


def test_pushing_goes_the_way_of_transformers(model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    monkeypatch.setattr(model, "push_to_hub", lambda *args, **kwargs: calls.append((args, kwargs)), raising=False)
    model.save_pretrained(tmp_path / "name", push_to_hub=True, token="t", private=True)
    model.save_pretrained(tmp_path / "name", push_to_hub=True, repo_id="me/it")
    assert calls == [(("name",), {"token": "t", "private": True}), (("me/it",), {})]


def test_files_of_the_hub(saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    snapshot = tmp_path / "models--me--it" / "snapshots" / "0123456789abcdef0123456789abcdef01234567"
    asked = []
    for name in ("config.json", WEIGHTS):
        snapshot.mkdir(parents=True, exist_ok=True)
        shutil.copy(saved / name, snapshot / name)

    def download(repository: str, name: str, *, revision: str, cache_dir: str) -> str:
        assert (repository, revision, cache_dir) == ("me/it", snapshot.name, str(tmp_path))
        asked.append(name)
        return str(saved / name)

    monkeypatch.setattr(loading, "hf_hub_download", download)
    one = loading.Loading(None, {}, [snapshot / WEIGHTS], "me/it")  # type: ignore[arg-type]
    assert one.file(WEIGHTS) == snapshot / WEIGHTS
    assert one.file(REPORT) == saved / REPORT
    inside = loading.Loading(None, {}, [snapshot / "sub" / WEIGHTS], "me/it")  # type: ignore[arg-type]
    with pytest.raises(FileNotFoundError, match="does not exist"):
        loading.Loading(None, {}, [saved / WEIGHTS], "me/it").file("other")  # type: ignore[arg-type]
    monkeypatch.setattr(loading, "hf_hub_download", lambda *args, **kwargs: asked.append(args[1]) or str(saved))
    inside.file(REPORT)
    assert asked == [REPORT, f"sub/{REPORT}"]


PLAIN = """
import sys, warnings
warnings.simplefilter("ignore")
from transformers import AutoModelForCausalLM
try:
    AutoModelForCausalLM.from_pretrained(sys.argv[1])
    print("loaded without the plug-in")
except RuntimeError as error:
    print("refused", "size" in str(error) or "mismatch" in str(error))
import moe_compiler
print("triton" in sys.modules, AutoModelForCausalLM.from_pretrained(sys.argv[1]).runtime.active)
"""


def test_a_plain_transformers_fails_loudly(saved: Path) -> None:
    output = subprocess.run(
        [sys.executable, "-c", PLAIN, str(saved)], capture_output=True, text=True, check=True, timeout=300
    ).stdout
    assert output.splitlines()[0] == "refused True"
    assert output.splitlines()[1].endswith("calibration")
    assert isinstance(AutoModelForCausalLM, type)
