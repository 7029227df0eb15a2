"""Profiles: what they hold, their files, and everything that can be wrong with a file."""

import errno
import json
import os
import struct
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from compiled import compiled_olmoe, logits, new_data, other_data, state, unchanged
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_compiler.runtime import profile as profile_module
from moe_compiler.runtime.profile import fingerprint, write_profile

HEADER = "moe_compiler.profile"


@pytest.fixture(scope="module")
def compiled() -> Any:
    model = compiled_olmoe(quantizer="rtn", rule="restore")
    model.runtime.adapt(new_data(), name="new")
    model.runtime.revert()
    model.runtime.adapt(other_data(), name="other")
    return model


@pytest.fixture
def model(compiled: Any) -> Any:
    compiled.runtime.revert()
    for name in compiled.runtime.profiles.keys() - {"calibration", "new", "other"}:
        compiled.runtime.remove(name)
    return compiled


@pytest.fixture(scope="module")
def saved(compiled: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("profiles") / "new.safetensors"
    compiled.runtime.save("new", path)
    return path


def test_profiles_hold_what_adapt_found(model: Any) -> None:
    profile = model.runtime.profiles["new"]
    assert list(model.runtime.profiles) == ["calibration", "new", "other"]
    assert (profile.name, profile.rule, profile.tokens) == ("new", "restore", new_data().numel())
    assert profile.pools.keys() == model.runtime.profiles["calibration"].pools.keys()
    assert all(int(histogram.sum()) == 2 * new_data().numel() for histogram in profile.histograms.values())
    assert "profile 'new': rule 'restore' on 192 tokens" in str(profile)
    assert profile.size_bytes == sum(pool.size_bytes for pool in profile.pools.values())
    with pytest.raises(TypeError, match="does not support item assignment"):
        model.runtime.profiles["mine"] = profile


def test_switch_and_revert_are_exact(model: Any) -> None:
    before, expected = state(model), {}
    for name in ("new", "other"):
        model.runtime.switch(name)
        assert model.runtime.active == name
        expected[name] = state(model)
        assert not unchanged(model, before)
    model.runtime.switch("new")
    assert unchanged(model, expected["new"])
    model.runtime.revert()
    assert unchanged(model, before)


def test_a_profile_survives_its_file(model: Any, saved: Path) -> None:
    model.runtime.switch("new")
    expected = state(model)
    model.runtime.revert()
    loaded = model.runtime.load(saved, name="loaded")
    assert model.runtime.active == "calibration"
    known = model.runtime.profiles["new"]
    assert (loaded.name, loaded.rule, loaded.tokens) == ("loaded", known.rule, known.tokens)
    assert all(torch.equal(loaded.histograms[path], known.histograms[path]) for path in known.histograms)
    model.runtime.switch("loaded")
    assert unchanged(model, expected)
    model.runtime.revert()
    model.runtime.remove("loaded")
    assert "loaded" not in model.runtime.profiles


def test_two_saves_give_the_same_bytes(model: Any, saved: Path, tmp_path: Path) -> None:
    model.runtime.save("new", str(tmp_path / "again"))
    assert (tmp_path / "again").read_bytes() == saved.read_bytes()
    assert [path.name for path in tmp_path.iterdir()] == ["again"]


def test_the_file_is_plain_safetensors(saved: Path) -> None:
    tensors = safetensors.torch.load_file(saved)
    assert tensors["model.layers.0.mlp.down_proj.value"].dtype == torch.int8
    assert tensors["model.layers.0.mlp.routing_histogram"].shape == (8,)


def test_the_fingerprint_is_that_of_the_base(model: Any) -> None:
    packed = model.runtime._pools.packed()
    first = model.runtime._pools.fingerprint()
    model.runtime.switch("new")
    assert model.runtime._pools.fingerprint() == first == fingerprint(packed)
    key = next(iter(packed))
    with torch.no_grad():
        packed[key].scale[0, 0, 0] *= 2
        assert model.runtime._pools.fingerprint() != first
        packed[key].scale[0, 0, 0] /= 2
    assert model.runtime._pools.fingerprint() == first


def test_a_file_of_another_compilation_is_refused(model: Any, saved: Path) -> None:
    other = compiled_olmoe(quantizer="rtn", rule="restore", group_size=64)
    with pytest.raises(ValueError, match=r"new\.safetensors cannot be loaded: it was made for another model"):
        other.runtime.load(saved)
    assert list(other.runtime.profiles) == ["calibration"]


def split(data: bytes) -> tuple[dict[str, Any], bytes]:
    size = struct.unpack("<Q", data[:8])[0]
    return json.loads(data[8 : 8 + size]), data[8 + size :]


def joined(header: dict[str, Any], body: bytes) -> bytes:
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + body


def sealed(values: Any) -> str:
    return json.dumps(values | {"blake2b": profile_module._digest(values)}) if isinstance(values, dict) else "[1]"


def with_header(change: Callable[[dict[str, Any]], Any], honest: bool = True) -> Callable[[bytes], bytes]:
    """Changes the JSON header of the profile; `honest` updates its digest, as only a forger would."""

    def damage(data: bytes) -> bytes:
        outer, body = split(data)
        values = json.loads(outer["__metadata__"][HEADER])
        digest = values.pop("blake2b")
        values = change(values) or values
        outer["__metadata__"][HEADER] = sealed(values) if honest else json.dumps(values | {"blake2b": digest})
        return joined(outer, body)

    return damage


def with_tensor(name: str, change: Callable[[torch.Tensor], torch.Tensor | None]) -> Callable[[bytes], bytes]:
    """Replaces a tensor, hash and all, by what `change` makes of it; takes it out where that is `None`."""

    def damage(data: bytes) -> bytes:
        outer, _ = split(data)
        values = json.loads(outer["__metadata__"][HEADER])
        tensors = safetensors.torch.load(data)
        new = change(tensors.pop(name))
        values["hashes"].pop(name)
        if new is not None:
            tensors[name] = new
            values["hashes"][name] = profile_module._hash(new)
        values.pop("blake2b")
        return safetensors.torch.save(tensors, {HEADER: sealed(values)})

    return damage


def without_metadata(data: bytes) -> bytes:
    return safetensors.torch.save(safetensors.torch.load(data))


def without_tensor_in_body(data: bytes) -> bytes:
    outer, _ = split(data)
    tensors = safetensors.torch.load(data)
    tensors.pop(FIRST + ".scale")
    return safetensors.torch.save(tensors, outer["__metadata__"])


FIRST = "model.layers.0.mlp.gate_up_proj"
ROUTING = "model.layers.0.mlp.routing_histogram"
DAMAGES: dict[str, tuple[Callable[[bytes], bytes], str]] = {
    "empty": (lambda data: b"", "it is not a safetensors file, or was cut off"),
    "cut in the header": (lambda data: data[:50], "it is not a safetensors file, or was cut off"),
    "cut at the end": (lambda data: data[:-1], "it is not a safetensors file, or was cut off"),
    "longer": (lambda data: data + b"x", "it is not a safetensors file, or was cut off"),
    "a pickle": (lambda data: b"\x80\x04K\x01.", "it is not a safetensors file"),
    "text": (lambda data: b"hello, this is a text and no profile at all", "it is not a safetensors file"),
    "a model's file": (without_metadata, "it is a safetensors file, but not a profile"),
    "a bit in a tensor": (lambda data: data[:-9] + bytes([data[-9] ^ 1]) + data[-8:], "was changed or damaged"),
    "the header": (with_header(lambda h: h | {"name": "x"}, honest=False), "its header was changed or damaged"),
    "a newer format": (with_header(lambda h: h | {"format_version": 2}), "its `format_version` must be 1, but is 2"),
    "another layout": (with_header(lambda h: h | {"layout_version": 7}), "its `layout_version` must be 1, but is 7"),
    "no object": (with_header(lambda h: [1]), "its header was changed or damaged"),
    "no name": (with_header(lambda h: h.pop("name") and h), "its header must hold a str `name`, but holds None"),
    "an empty name": (with_header(lambda h: h | {"name": ""}), "`name` must be a text that is not empty"),
    "a reserved name": (with_header(lambda h: h | {"name": "calibration"}), "there is a profile 'calibration'"),
    "bad tokens": (with_header(lambda h: h | {"tokens": "3"}), "its header must hold a int `tokens`, but holds '3'"),
    "another model": (with_header(lambda h: h | {"fingerprint": "0"}), "it was made for another model"),
    "a hash too many": (with_header(lambda h: h["hashes"].update(x="0")), "differ in the tensor `x`"),
    "a tensor too few": (without_tensor_in_body, "differ in the tensor `model.layers.0.mlp.gate_up_proj.scale`"),
    "no scale": (with_tensor(FIRST + ".scale", lambda t: None), "it holds no tensor `.*gate_up_proj.scale`"),
    "another shape": (with_tensor(FIRST + ".value", lambda t: t[:-1]), r"gate_up_proj: `value` must be \(\d+, 256\)"),
    "another dtype": (with_tensor(FIRST + ".value", lambda t: t.short()), "torch.int8, but is .* torch.int16"),
    "index outside": (with_tensor(FIRST + ".index", lambda t: t + 999), r"`index` must lie in \[0, \d+\)"),
    "index negative": (with_tensor(FIRST + ".index", lambda t: t - 999), r"`index` must lie in \[0, \d+\)"),
    "offset outside": (with_tensor(FIRST + ".offset", lambda t: t * 9), "`offset` must ascend from 0 to at most"),
    "offset unsorted": (with_tensor(FIRST + ".offset", lambda t: t.flip(0)), "`offset` must ascend from 0"),
    "scale NaN": (with_tensor(FIRST + ".scale", lambda t: t * torch.nan), "`scale` must be finite"),
    "histogram short": (with_tensor(ROUTING, lambda t: t[:-1]), r"must be \(8,\) float64"),
    "histogram zero": (with_tensor(ROUTING, lambda t: t * 0), "must be finite, not negative and not all zero"),
    "histogram NaN": (with_tensor(ROUTING, lambda t: t * torch.nan), "must be finite, not negative and not all zero"),
    "histogram missing": (with_tensor(ROUTING, lambda t: None), "it holds no tensor `.*routing_histogram`"),
}


@pytest.mark.parametrize("kind", DAMAGES)
def test_a_bad_file_is_refused_and_changes_nothing(model: Any, saved: Path, tmp_path: Path, kind: str) -> None:
    damage, message = DAMAGES[kind]
    path, before = tmp_path / "bad.safetensors", state(model)
    path.write_bytes(damage(saved.read_bytes()))
    with pytest.raises(ValueError, match=message) as raised:
        model.runtime.load(path)
    assert str(path) in str(raised.value) or "reserved" in kind
    assert list(model.runtime.profiles) == ["calibration", "new", "other"]
    assert unchanged(model, before)


@settings(deadline=None, max_examples=60)
@given(st.data())
def test_no_single_changed_byte_is_overlooked(compiled: Any, saved: Path, data: st.DataObject) -> None:
    content = bytearray(saved.read_bytes())
    place = data.draw(st.integers(0, len(content) - 1))
    content[place] ^= data.draw(st.integers(1, 255))
    path = saved.with_name("flipped")
    path.write_bytes(content)
    try:
        loaded = compiled.runtime.load(path, name="flipped")
    except ValueError as error:
        assert "flipped cannot be loaded" in str(error)  # noqa: PT017
    else:  # white space in the outer header carries no meaning
        compiled.runtime.remove("flipped")
        known = compiled.runtime.profiles["new"]
        for key, pool in known.pools.items():
            theirs = loaded.pools[key].tensors()
            assert all(torch.equal(tensor, theirs[name]) for name, tensor in pool.tensors().items())


@pytest.mark.parametrize("step", ["open", "fsync", "replace"])
def test_a_full_disk_leaves_the_old_file(
    model: Any, saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    target = tmp_path / "profile"
    target.write_bytes(saved.read_bytes())

    def full(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    if step == "open":
        monkeypatch.setattr(Path, "open", full)
    else:
        monkeypatch.setattr(os, step, full)
    with pytest.raises(OSError, match="No space left on device"):
        model.runtime.save("other", target)
    monkeypatch.undo()
    assert target.read_bytes() == saved.read_bytes()
    assert [path.name for path in tmp_path.iterdir()] == ["profile"]


CHILD = """
import os, sys
from pathlib import Path
import torch
from moe_compiler.kernels.pool import ChannelPool
from moe_compiler.runtime.profile import Profile, write_profile

pool = ChannelPool.empty(2, 4, 8, 16)
profile = Profile("new", "restore", 5, {("block", "down_proj"): pool}, {"block": torch.ones(2, dtype=torch.float64)})
setattr(os, sys.argv[2], lambda *_, **__: os._exit(9))
write_profile(profile, sys.argv[1], "0")
"""


@pytest.mark.parametrize("step", ["fsync", "replace"])
def test_a_killed_process_leaves_the_old_file(tmp_path: Path, step: str) -> None:
    target = tmp_path / "profile"
    target.write_bytes(b"old")
    done = subprocess.run([sys.executable, "-P", "-c", CHILD, str(target), step], check=False)
    assert done.returncode == 9
    assert target.read_bytes() == b"old"


def test_saving_removes_what_killed_processes_left(model: Any, tmp_path: Path) -> None:
    hour = 3600
    for name, age in ((".profile.0a.tmp", 2 * hour), (".profile.0b.tmp", hour / 2), (".other.0a.tmp", 2 * hour)):
        (tmp_path / name).write_bytes(b"part of a profile")
        os.utime(tmp_path / name, (time.time() - age,) * 2)
    model.runtime.save("other", tmp_path / "profile")
    assert sorted(path.name for path in tmp_path.iterdir()) == [".other.0a.tmp", ".profile.0b.tmp", "profile"]


def test_files_have_the_usual_permissions(model: Any, tmp_path: Path) -> None:
    ordinary = tmp_path / "ordinary"
    ordinary.write_bytes(b"")
    model.runtime.save("new", tmp_path / "profile")
    assert (tmp_path / "profile").stat().st_mode == ordinary.stat().st_mode


def test_logits_follow_profiles(model: Any) -> None:
    outs = []
    for name in model.runtime.profiles:
        model.runtime.switch(name)
        outs.append(logits(model))
    assert not any(torch.equal(outs[i], outs[j]) for i in range(3) for j in range(i))


def test_a_profile_of_the_same_name_is_replaced_by_adapt_and_refused_by_load(model: Any, saved: Path) -> None:
    with pytest.raises(ValueError, match="there is a profile 'new': give another or `remove` that one"):
        model.runtime.load(saved)
    model.runtime.adapt(other_data(), name="again")
    first = model.runtime.profiles["again"]
    model.runtime.adapt(new_data(), name="again")
    assert model.runtime.profiles["again"] is not first
    write_profile(first, saved.with_name("first"), model.runtime._pools.fingerprint())
    assert model.runtime.load(saved.with_name("first"), name="first").tokens == first.tokens
