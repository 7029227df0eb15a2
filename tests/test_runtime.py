"""Adapting in place: what moves, what stays, nothing half done."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from compiled import OPTIONS, compiled_olmoe, logits, new_data, other_data, state, unchanged
from tiny import datasets, qwen2_moe, tokens
from transformers import StaticCache

from moe_compiler.api import dynamo_compile
from moe_compiler.kernels.pool import ChannelPool
from moe_compiler.progress import RichProgress
from moe_compiler.runtime import pools as pools_module
from moe_compiler.runtime import runtime as runtime_module
from moe_compiler.runtime.report import jensen_shannon, moved_slots


@pytest.fixture(scope="module")
def compiled() -> Any:
    return compiled_olmoe()


@pytest.fixture
def model(compiled: Any) -> Any:
    compiled.runtime.revert()
    return compiled


@pytest.mark.parametrize("rule", ["restore", "cluster"])
def test_only_the_pools_contents_change(model: Any, rule: str) -> None:
    before, addresses = state(model), {name: t.data_ptr() for name, t in model.state_dict().items()}
    report = model.runtime.adapt(new_data(), rule=rule, name="new")
    changed = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
    assert changed
    assert all("_pool_" in name for name in changed)
    assert addresses == {name: t.data_ptr() for name, t in model.state_dict().items()}
    assert model.runtime.active == "new"
    assert sum(change.moved for layer in report.layers for change in layer.linears) > 0


def test_revert_restores_the_compiled_state_bit_for_bit(model: Any) -> None:
    before, expected = state(model), logits(model)
    model.runtime.adapt(new_data())
    model.runtime.adapt(other_data())
    assert not unchanged(model, before)
    model.runtime.revert()
    assert unchanged(model, before)
    assert torch.equal(logits(model), expected)
    assert model.runtime.active == "calibration"


def test_the_report_says_what_changed_and_is_relative_to_the_active_profile(model: Any) -> None:
    first = model.runtime.adapt(new_data(), rule="restore", name="new")
    changes = [change for layer in first.layers for change in layer.linears]
    assert all(change.error_after <= change.error_before * 1.0001 for change in changes)
    assert sum(c.error_after for c in changes) < 0.99 * sum(c.error_before for c in changes)
    assert all(change.used <= change.capacity for change in changes)
    assert first.tokens == new_data().numel()
    assert set(first.seconds) == {"observe", "choose", "swap"}
    assert all(seconds > 0 for seconds in first.seconds.values())
    text = str(first)
    assert "adapted to 'new' by rule 'restore' on 192 tokens" in text
    assert "before: 'calibration'" in text
    assert "model.layers.1.mlp" in text
    assert first.to_dict()["layers"][0]["linears"][0]["linear"] == "gate_up_proj"
    again = model.runtime.adapt(new_data(), rule="restore", name="again")
    assert again.previous == "new"
    assert again.layers[0].linears[0].moved == 0  # later linears see what the first adaptation changed
    assert again.layers[0].divergence == 0
    assert first.layers[0].divergence > 0.1
    profiles = model.runtime.profiles
    path = first.layers[1].path
    divergence = jensen_shannon(profiles["new"].histograms[path], profiles["calibration"].histograms[path])
    assert first.layers[1].divergence == pytest.approx(float(divergence))


def test_progress_shows_every_step_and_no_two_bars_at_once(model: Any) -> None:
    shown: list[str] = []

    class Steps:
        def __init__(self) -> None:
            self.open = 0

        def task(self, description: str, total: int, unit: str = "") -> Any:
            shown.append(description)
            return self

        def __enter__(self) -> Callable[..., None]:
            self.open += 1
            assert self.open == 1
            return lambda count=1: None

        def __exit__(self, *_: object) -> None:
            self.open -= 1

    kept, model.runtime._progress = model.runtime._progress, Steps()
    try:
        model.runtime.adapt(new_data(), name="new")
    finally:
        model.runtime._progress = kept
    assert shown == ["observing new", "filling pools, layer 1 of 2", "filling pools, layer 2 of 2"]


STEPS: dict[str, tuple[Any, str]] = {
    "copying the blocks": (runtime_module, "plain_block"),
    "the second model": (runtime_module, "shadow"),
    "observing": (runtime_module, "observe_layers"),
    "choosing slots": (runtime_module, "choose_layer"),
    "checking contents": (runtime_module, "check_contents"),
    "moving contents": (runtime_module, "moved"),
    "preparing the swap": (pools_module, "moved"),
    "keeping the old contents": (ChannelPool, "clone"),
    "copying contents": (ChannelPool, "copy_"),
    "making the profile": (runtime_module, "Profile"),
}
ERRORS = (MemoryError("no memory left"), torch.OutOfMemoryError("no memory left"), KeyboardInterrupt("no memory left"))


@pytest.mark.parametrize("call", [1, 2])
@pytest.mark.parametrize("step", STEPS)
def test_a_failure_at_any_step_changes_nothing(
    model: Any, monkeypatch: pytest.MonkeyPatch, step: str, call: int
) -> None:
    model.runtime.adapt(other_data(), name="first")
    before, profiles = state(model), dict(model.runtime.profiles)
    where, name = STEPS[step]
    real, calls = getattr(where, name), []
    error = ERRORS[len(step) % len(ERRORS)]

    def fail_once(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        if len(calls) == call:
            raise error
        return real(*args, **kwargs)

    monkeypatch.setattr(where, name, fail_once)
    if call == 2 and step in ("the second model", "observing", "making the profile"):
        model.runtime.adapt(new_data(), name="whole")  # they are called once
        calls[:] = [1]
        before, profiles = state(model), dict(model.runtime.profiles)
    with pytest.raises(type(error), match="no memory left"):
        model.runtime.adapt(new_data(), name="second")
    assert unchanged(model, before)
    assert model.runtime.active == ("whole" if "whole" in profiles else "first")
    assert dict(model.runtime.profiles) == profiles
    monkeypatch.undo()
    model.runtime.adapt(new_data(), name="second")
    assert model.runtime.active == "second"
    for added in model.runtime.profiles.keys() - {"calibration", "second"}:
        model.runtime.remove(added)


def test_a_swap_that_fails_in_the_middle_is_undone(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model.runtime.adapt(new_data(), name="new")
    model.runtime.revert()
    before, real, calls = state(model), ChannelPool.copy_, []

    def fail_third(self: ChannelPool, other: ChannelPool) -> None:
        calls.append(1)
        if len(calls) == 3:
            raise RuntimeError("the device is gone")
        real(self, other)

    monkeypatch.setattr(ChannelPool, "copy_", fail_third)
    with pytest.raises(RuntimeError, match="the device is gone"):
        model.runtime.switch("new")
    assert len(calls) == 3 + 4
    assert unchanged(model, before)
    assert model.runtime.active == "calibration"


def test_activations_that_are_not_finite_change_nothing() -> None:
    model = compiled_olmoe(quantizer="rtn", rule="restore")
    with torch.no_grad():
        model.model.embed_tokens.weight[77] = torch.nan
    before = state(model)
    with pytest.raises(FloatingPointError, match="held NaN or infinity on dataset 'bad'"):
        model.runtime.adapt(torch.full((2, 8), 77), name="bad")
    kept = {
        name: tensor for name, tensor in model.state_dict().items() if "embed" not in name and "lm_head" not in name
    }
    assert all(torch.equal(tensor, before[name]) for name, tensor in kept.items())
    assert list(model.runtime.profiles) == ["calibration"]


def test_a_copy_adapts_on_its_own(model: Any) -> None:
    expected = logits(model)
    kept, model.runtime._progress = model.runtime._progress, RichProgress()  # as it is unless progress=False
    copied = copy.deepcopy(model)
    model.runtime._progress = kept
    assert copied.runtime.model is copied
    copied.runtime.adapt(new_data())
    assert torch.equal(logits(model), expected)
    assert not torch.equal(logits(copied), expected)
    copied.runtime.revert()
    assert torch.equal(logits(copied), expected)


def test_a_model_with_shared_experts_adapts_again_and_again() -> None:
    model = dynamo_compile(qwen2_moe(), datasets(), quantizer="rtn", rule="restore", **OPTIONS)
    expected = logits(model)
    for data in (new_data(), other_data()):
        model.runtime.adapt(data)
        ids = [buffer.tolist() for name, buffer in model.named_buffers() if name.endswith("shared_ids")]
        assert ids == [[6], [6]]
        assert torch.isfinite(logits(model)).all()
        assert not torch.equal(logits(model), expected)
    model.runtime.revert()
    assert torch.equal(logits(model), expected)


def test_jensen_shannon_is_a_divergence() -> None:
    p, q = torch.tensor([1.0, 0.0, 3.0]), torch.tensor([0.0, 5.0, 0.0])
    assert float(jensen_shannon(p, 7 * p)) == pytest.approx(0, abs=1e-12)
    assert float(jensen_shannon(p, q)) == pytest.approx(1)
    half, one = torch.tensor([1.0, 1.0]), torch.tensor([1.0, 0.0])
    assert float(jensen_shannon(half, one)) == pytest.approx(0.311278, abs=1e-6)
    assert jensen_shannon(torch.stack([p, q]), torch.stack([p, q])).tolist() == pytest.approx([0, 0], abs=1e-12)


def test_moved_slots_counts_new_keys() -> None:
    assert moved_slots(torch.tensor([1, 2, 3]), torch.tensor([3, 4, 5])) == 2


def test_static_caches_see_a_change_between_steps(model: Any) -> None:
    prompt = tokens(1, 6, 3)
    cache = StaticCache(config=model.config, max_cache_len=8)
    with torch.no_grad():
        first = model(input_ids=prompt, past_key_values=cache, use_cache=True).logits
        model.runtime.adapt(new_data(), name="new")
        second = model(input_ids=prompt[:, -1:], past_key_values=cache, use_cache=True).logits
    assert first.shape[1] == 6
    assert torch.isfinite(second).all()
