"""Bad calls of the run time: one clear error each, and nothing changed."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from compiled import compiled_olmoe, new_data, state, unchanged
from tiny import tokens

from moe_compiler.runtime.guard import WINDOW_TOKENS


@pytest.fixture(scope="module")
def compiled() -> Any:
    model = compiled_olmoe(layers=1, quantizer="rtn", rule="restore", pool="channels", master="cache")
    model.runtime.adapt(new_data(), name="new")
    model.runtime.revert()
    return model


GOOD = tokens(1, 8)
NAME = "`name` must be a text that is not empty, but is"
KNOWN = "`name` must be one of the profiles 'calibration', 'new', but is"
TIMEOUT = "`timeout` must be a number of seconds, 0 or more, but is"
TOKENS = rf"`minimum_tokens` must be a number in \[1, {WINDOW_TOKENS * 0.9:g}\], but is"
PATH = "`path` must be the path of a file, but is"

ADAPT: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"samples": GOOD, "rule": "swap"}, ValueError, "`rule` must be one of 'restore', 'cluster', .*but is 'swap'"),
    ({"samples": GOOD, "rule": 3}, ValueError, "`rule` must be one of 'restore', 'cluster', .*but is 3"),
    ({"samples": GOOD, "rule": "lowrank"}, ValueError, "rule 'lowrank' needs the whole original weights"),
    ({"samples": GOOD, "rule": "compensate"}, ValueError, "rule 'compensate' needs the whole original weights"),
    ({"samples": GOOD, "name": ""}, ValueError, f"{NAME} ''"),
    ({"samples": GOOD, "name": 3}, ValueError, f"{NAME} 3"),
    ({"samples": GOOD, "name": None}, ValueError, f"{NAME} None"),
    ({"samples": GOOD, "name": "calibration"}, ValueError, "`name` must not be 'calibration'"),
    ({"samples": GOOD, "timeout": -1}, ValueError, f"{TIMEOUT} -1"),
    ({"samples": GOOD, "timeout": math.nan}, ValueError, f"{TIMEOUT} nan"),
    ({"samples": GOOD, "timeout": math.inf}, ValueError, f"{TIMEOUT} inf"),
    ({"samples": GOOD, "timeout": "1"}, ValueError, f"{TIMEOUT} '1'"),
    ({"samples": GOOD, "timeout": None}, ValueError, f"{TIMEOUT} None"),
    ({"samples": []}, ValueError, "dataset 'adapted' must hold at least one sample"),
    ({"samples": torch.zeros(0, 4, dtype=torch.int64)}, ValueError, "must hold at least one sample"),
    ({"samples": tokens(2, 1)}, ValueError, "every sample must have at least 2 tokens, but sample 0"),
    ({"samples": ["text"]}, ValueError, "`tokenizer` is needed because dataset 'adapted' holds text"),
    ({"samples": torch.full((1, 4), 96)}, ValueError, "holds 96"),
    ({"samples": torch.full((1, 4), -1)}, ValueError, "holds -1"),
    ({"samples": torch.ones(2, 4)}, TypeError, "must hold integers, but is torch.float32"),
    ({"samples": torch.ones(2, 2, 2, dtype=torch.int64)}, ValueError, r"must be 1-D, but has shape \(2, 2\)"),
    ({"samples": None}, TypeError, "must be text, token ids or an iterable of them, but is NoneType"),
    ({"samples": 7}, TypeError, "must be text, token ids or an iterable of them, but is int"),
    ({"samples": {"input_ids": GOOD}}, TypeError, "is a dict with input_ids: give one of its values"),
    ({"samples": ["text", [1, 2]]}, TypeError, "must hold either text or token ids, but holds both"),
]

CALLS: list[tuple[str, tuple[Any, ...], dict[str, Any], type[Exception], str]] = [
    *(("adapt", (), arguments, error, message) for arguments, error, message in ADAPT),
    ("switch", ("old",), {}, ValueError, f"{KNOWN} 'old'"),
    ("switch", ("",), {}, ValueError, f"{KNOWN} ''"),
    ("switch", (None,), {}, ValueError, f"{KNOWN} None"),
    ("switch", (["new"],), {}, ValueError, rf"{KNOWN} \['new'\]"),
    ("switch", ("new",), {"timeout": -0.5}, ValueError, f"{TIMEOUT} -0.5"),
    ("switch", ("new",), {"timeout": True}, ValueError, f"{TIMEOUT} True"),
    ("revert", (), {"timeout": []}, ValueError, rf"{TIMEOUT} \[\]"),
    ("save", ("old", "x"), {}, ValueError, f"{KNOWN} 'old'"),
    ("save", (3, "x"), {}, ValueError, f"{KNOWN} 3"),
    ("save", ("new", ""), {}, ValueError, f"{PATH} ''"),
    ("save", ("new", 7), {}, ValueError, f"{PATH} 7"),
    ("save", ("new", None), {}, ValueError, f"{PATH} None"),
    ("save", ("new", "{tmp}"), {}, IsADirectoryError, "`path` must be a file, but .* is a folder"),
    ("save", ("new", "{tmp}/no/file"), {}, FileNotFoundError, "`path` must lie in a folder that exists, but .*no does"),
    ("load", ("{tmp}/none",), {}, FileNotFoundError, "`path` must be a profile's file, but .*none does not exist"),
    ("load", ("{tmp}",), {}, FileNotFoundError, "`path` must be a profile's file, but .* does not exist or is none"),
    ("load", (b"",), {}, ValueError, f"{PATH} b''"),
    ("load", (3.5,), {}, ValueError, f"{PATH} 3.5"),
    ("load", ("{tmp}/none",), {"name": ""}, ValueError, f"{NAME} ''"),
    ("load", ("{tmp}/none",), {"name": 5}, ValueError, f"{NAME} 5"),
    ("load", ("{tmp}/none",), {"name": "calibration"}, ValueError, "`name` must not be 'calibration'"),
    ("remove", ("old",), {}, ValueError, f"{KNOWN} 'old'"),
    ("remove", (0,), {}, ValueError, f"{KNOWN} 0"),
    ("remove", ("calibration",), {}, ValueError, "'calibration' cannot be removed, it is what compiling made"),
    ("on_drift", ("swap",), {}, ValueError, "`policy` must be 'report', 'switch' or a callable, but is 'swap'"),
    ("on_drift", (5,), {}, ValueError, "`policy` must be 'report', 'switch' or a callable, but is 5"),
    ("on_drift", (["switch"],), {}, ValueError, "`policy` must be 'report', 'switch' or a callable"),
    ("on_drift", ("switch",), {"margin": -0.1}, ValueError, r"`margin` must be a number in \[0, 1\], but is -0.1"),
    ("on_drift", ("switch",), {"margin": "big"}, ValueError, r"`margin` must be a number in \[0, 1\], but is 'big'"),
    ("on_drift", ("switch",), {"margin": None}, ValueError, r"`margin` must be a number in \[0, 1\], but is None"),
    ("on_drift", ("report",), {"threshold": 1.5}, ValueError, r"`threshold` must be a number in \[0, 1\], but is 1.5"),
    ("on_drift", ("report",), {"threshold": math.nan}, ValueError, r"`threshold` must be a number in \[0, 1\]"),
    ("on_drift", ("switch",), {"minimum_tokens": 0}, ValueError, f"{TOKENS} 0"),
    ("on_drift", ("switch",), {"minimum_tokens": WINDOW_TOKENS}, ValueError, f"{TOKENS} {WINDOW_TOKENS}"),
    ("on_drift", ("switch",), {"minimum_tokens": True}, ValueError, f"{TOKENS} True"),
    ("on_drift", ("switch",), {"timeout": -1}, ValueError, r"`timeout` must be a number in \[0, .*\], but is -1"),
    ("on_drift", ("switch",), {"every": 0}, ValueError, "`every` must be a positive number of seconds, but is 0"),
    ("on_drift", ("switch",), {"every": -2.0}, ValueError, "`every` must be a positive number of seconds, but is -2.0"),
    ("on_drift", ("switch",), {"every": "1"}, ValueError, "`every` must be a positive number of seconds, but is '1'"),
    ("on_drift", ("switch",), {"every": math.inf}, ValueError, "`every` must be a positive number of seconds"),
]


@pytest.mark.parametrize("number", range(len(CALLS)), ids=[f"{call[0]}-{call[4][:30]}" for call in CALLS])
def test_a_bad_call_is_refused_and_changes_nothing(compiled: Any, tmp_path: Path, number: int) -> None:
    method, arguments, options, error, message = CALLS[number]
    placed = [one.format(tmp=tmp_path) if isinstance(one, str) else one for one in arguments]
    before, profiles, policy = state(compiled), dict(compiled.runtime.profiles), compiled.runtime._policy
    with pytest.raises(error, match=message):
        getattr(compiled.runtime, method)(*placed, **options)
    assert unchanged(compiled, before)
    assert dict(compiled.runtime.profiles) == profiles
    assert compiled.runtime.active == "calibration"
    assert compiled.runtime._policy is policy
    assert not list(tmp_path.iterdir())


def test_the_active_profile_cannot_be_removed(compiled: Any) -> None:
    compiled.runtime.switch("new")
    with pytest.raises(ValueError, match="'new' cannot be removed, it is in the pools: switch to another first"):
        compiled.runtime.remove("new")
    compiled.runtime.revert()


@pytest.mark.parametrize("method", ["switch", "adapt", "remove", "revert", "load"])
def test_nothing_can_change_inside_hold(compiled: Any, tmp_path: Path, method: str) -> None:
    runtime = compiled.runtime
    runtime.save("new", tmp_path / "file")
    calls = {
        "switch": lambda: runtime.switch("new"),
        "adapt": lambda: runtime.adapt(new_data()),
        "remove": lambda: runtime.remove("new"),
        "revert": lambda: runtime.revert(),
        "load": lambda: runtime.load(tmp_path / "file", name="held"),
    }
    with runtime.hold(), pytest.raises(RuntimeError, match="the state cannot change inside"):
        calls[method]()
    assert list(runtime.profiles) == ["calibration", "new"]
