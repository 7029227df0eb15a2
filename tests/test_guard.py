"""The drift guard: the histogram in the graph, the divergences, when it acts and when it keeps quiet."""

import copy
import gc
import logging
import threading
import time
import weakref
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from compiled import compiled_olmoe, logits, new_data, other_data
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import datasets, qwen2_moe, tokens
from torch import Tensor

from moe_compiler.api import dynamo_compile
from moe_compiler.kernels import ops
from moe_compiler.passes.record import HISTOGRAM, plain_block
from moe_compiler.runtime.detection import measure_detection
from moe_compiler.runtime.guard import WINDOW_TOKENS, DriftPolicy, DriftReport, LayerDrift, divergences
from moe_compiler.runtime.report import jensen_shannon

PATIENCE = 20.0


@pytest.fixture(scope="module")
def compiled() -> Any:
    model = compiled_olmoe(quantizer="rtn", rule="restore")
    model.runtime.adapt(new_data(), name="new")
    model.runtime.revert()
    model.runtime.adapt(other_data(), name="other")
    return model


@pytest.fixture
def model(compiled: Any) -> Iterator[Any]:
    compiled.runtime.revert()
    yield compiled
    compiled.runtime.on_drift(None)


@torch.no_grad()
def feed(model: Any, batches: int, seed: int = 100, **bounds: int) -> None:
    """Runs batches of 128 tokens, from part of the vocabulary."""
    for number in range(batches):
        model.model(input_ids=tokens(4, 32, seed + number, **bounds), use_cache=False)


def slow_histogram(before: Tensor, ids: Tensor, decay: float) -> Tensor:
    """The oracle: token by token."""
    histogram = before.double()
    for token in ids.tolist():
        histogram = histogram * decay
        for expert in token:
            histogram[min(expert, histogram.shape[0] - 1)] += 1 / len(token)
    return histogram


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 20), st.integers(1, 4), st.integers(1, 9), st.sampled_from([0.5, 0.99, 1.0]), st.integers(0, 99))
def test_the_histogram_decays_token_by_token(length: int, top_k: int, experts: int, decay: float, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, experts + 3, (length, top_k), generator=generator)
    histogram = torch.rand(experts + 1, generator=generator)
    expected = slow_histogram(histogram, ids, decay)
    ops.record_routing_(histogram, ids, decay)
    torch.testing.assert_close(histogram.double(), expected, rtol=1e-5, atol=1e-6)


def test_the_recorder_passes_opcheck() -> None:
    torch.library.opcheck(ops.record_routing_, (torch.zeros(5), torch.tensor([[1, 2], [7, 0]]), 0.9))
    with pytest.raises(RuntimeError, match="on cpu but the experts' weights are on meta"):
        ops.record_routing_(torch.zeros(5, device="meta"), torch.tensor([[1, 2]]), 0.9)


def test_a_model_counts_each_token_once_in_each_layer(model: Any) -> None:
    logits(model, (2, 9))
    logits(model, (1, 1))
    report = model.runtime.drift()
    assert [layer.path for layer in report.layers] == list(model.moe_graphs)
    assert all(18.5 < layer.tokens < 19 for layer in report.layers)
    histograms = model.runtime._pools.histograms()
    assert all(float(histogram[-1]) == 0 for histogram in histograms.values())
    assert not any(HISTOGRAM in name for name in model.state_dict())
    assert all(histogram.dtype == torch.float32 for histogram in histograms.values())


def test_the_histogram_is_that_of_the_router(model: Any) -> None:
    data = tokens(4, 16, 7)
    with torch.no_grad():
        routing = model(input_ids=data, use_cache=False, output_router_logits=True).router_logits
    for histogram, scores in zip(model.runtime._pools.histograms().values(), routing, strict=True):
        chosen = torch.bincount(scores.topk(2).indices.view(-1), minlength=8).double()
        assert float(jensen_shannon(histogram[:-1], chosen)) < 1e-3


def test_shared_experts_and_dtypes_do_not_disturb_it() -> None:
    model = dynamo_compile(qwen2_moe(layers=1), datasets(), quantizer="rtn", progress=False).to(torch.bfloat16)
    feed(model, 1)
    (layer,) = model.runtime.drift().layers
    (histogram,) = model.runtime._pools.histograms().values()
    assert histogram.shape == (6 + 1,)
    assert histogram.dtype == torch.float32
    assert 120 < layer.tokens <= 128
    assert histogram[-1] == 0


def test_adapting_leaves_the_ids_of_shared_experts_alone() -> None:
    model = dynamo_compile(qwen2_moe(layers=1), datasets(), quantizer="rtn", progress=False)
    buffers = {name: tensor.clone() for name, tensor in model.named_buffers()}
    assert any("shared_ids" in name for name in buffers)
    model.runtime.adapt(new_data(), rule="restore")
    model.runtime.revert()
    assert all(torch.equal(tensor, buffers[name]) for name, tensor in model.named_buffers())


def test_what_adapt_observes_does_not_count_and_a_change_starts_anew(model: Any) -> None:
    feed(model, 1)
    layer = next(iter(model.runtime.layers.values()))
    plain = plain_block(layer.block)
    code = plain.experts.code
    assert "record_routing" not in code
    assert "forward" not in code.replace("def forward", "")
    assert "record_routing" in layer.experts.code
    before = {path: histogram.clone() for path, histogram in model.runtime._pools.histograms().items()}
    with pytest.raises(FloatingPointError, match="stop here"):
        _adapt_that_fails(model)
    after = model.runtime._pools.histograms()
    assert all(torch.equal(histogram, before[path]) for path, histogram in after.items())
    model.runtime.switch("new")
    report = model.runtime.drift()
    assert report.tokens == 0
    assert report.nearest is None
    assert str(report) == "drift: no tokens since profile 'new' took effect"


def _adapt_that_fails(model: Any) -> None:
    """Observes, then stops."""
    with pytest.MonkeyPatch.context() as patch:

        def stop(*_: Any, **__: Any) -> None:
            raise FloatingPointError("stop here")

        patch.setattr("moe_compiler.runtime.runtime.choose_layer", stop)
        model.runtime.adapt(new_data(), name="never")


def test_divergences_are_those_of_the_layers_own_experts() -> None:
    histograms = {"a": torch.tensor([3.0, 1.0, 4.0]), "b": torch.tensor([1.0, 2.0, 3.0, 0.0]), "c": torch.zeros(2)}
    profile = {"a": torch.tensor([1.0, 1.0]), "b": torch.tensor([1.0, 2.0, 3.0]), "c": torch.ones(1)}
    a, b, c = divergences(histograms, {"p": {path: one.double() for path, one in profile.items()}})
    assert a.divergence["p"] == pytest.approx(float(jensen_shannon(torch.tensor([3.0, 1.0]), profile["a"])))
    assert (a.tokens, b.tokens, c.tokens) == (8, 6, 0)
    assert b.divergence["p"] == pytest.approx(0, abs=1e-12)
    assert c.divergence == {}


def test_reports_print_and_become_json(model: Any) -> None:
    feed(model, 2, high=12)
    report = model.runtime.drift()
    text = str(report)
    assert "active 'calibration', nearest 'new'; drifted: no" in text
    assert "model.layers.1.mlp" in text
    assert text.splitlines()[-1].startswith("mean")
    values = report.to_dict()
    assert values["nearest"] == "new"
    assert values["divergence"]["new"] == pytest.approx(report.divergence["new"])
    assert values["layers"][0]["divergence"].keys() == {"calibration", "new", "other"}


def drift(active: float, other: float, count: float = 1000) -> DriftReport:
    return DriftReport("here", (LayerDrift("block", count, {"here": active, "there": other}),))


def test_a_policy_needs_margin_tokens_and_a_known_profile() -> None:
    policy = DriftPolicy("report", margin=0.05, threshold=0.3, minimum_tokens=500)
    assert policy.drifted(drift(0.2, 0.14))
    assert not policy.drifted(drift(0.2, 0.16))
    assert not policy.drifted(drift(0.2, 0.0, count=499))
    assert policy.drifted(drift(0.31, 0.31))  # known to no profile
    assert not replace(policy, action="switch").drifted(drift(0.31, 0.31))
    assert not replace(policy, threshold=None).drifted(drift(0.31, 0.31))
    assert policy.drifted(drift(0.2, 0.16), margin=0.5)
    assert not policy.drifted(replace(drift(0.2, 0.0), active="removed"))
    assert not policy.drifted(DriftReport("here", ()))


def test_a_change_is_detected_within_a_window_and_a_steady_stream_raises_no_alarm(model: Any) -> None:
    runtime, policy = model.runtime, DriftPolicy("switch")
    runtime.switch("new")
    steady = [tokens(4, 32, seed, high=12) for seed in range(128)]  # 8 windows
    changed = [tokens(4, 32, 1000 + seed, low=80) for seed in range(32)]
    found = measure_detection(runtime, policy, steady, changed)
    assert found.false_alarms == 0
    assert found.checks == 128
    assert found.steady_tokens == 8 * WINDOW_TOKENS
    assert found.largest_gap < policy.margin / 2
    assert found.detected_after is not None
    assert found.detected_after <= WINDOW_TOKENS
    assert found.nearest == "other"
    assert "0 false alarms in 128 checks over 16,384 tokens" in str(found)
    assert found.to_dict()["nearest"] == "other"
    same = measure_detection(runtime, policy, steady[:4], steady[4:12])
    assert same.detected_after is None
    assert "change not detected, nearest profile 'new'" in str(same)


def test_switch_follows_the_data_there_and_back(model: Any) -> None:
    runtime = model.runtime
    runtime.on_drift("switch")
    for bounds, expected in (({"high": 12}, "new"), ({"low": 80}, "other"), ({"high": 12}, "new"), ({}, "calibration")):
        switches = 0
        for batch in range(24):
            feed(model, 1, seed=batch, **bounds)
            report = runtime.check()
            assert report.drifted is (report.switched_to is not None)
            switches += report.drifted
        assert runtime.active == expected
        assert 1 <= switches <= 2  # a mixture of two domains may look like the calibration data at first


def test_minimum_tokens_hold_after_every_change(model: Any) -> None:
    runtime = model.runtime
    runtime.on_drift("switch", minimum_tokens=300)
    feed(model, 2, high=12)
    assert runtime.check().switched_to is None
    feed(model, 1, high=12)
    assert runtime.check().switched_to == "new"
    feed(model, 2, low=80)
    assert runtime.check().switched_to is None
    feed(model, 1, low=80)
    assert runtime.check().switched_to == "other"


def test_a_callable_is_called_once_per_change_and_may_adapt(model: Any) -> None:
    runtime, calls = model.runtime, []

    def on_change(report: DriftReport) -> None:
        calls.append((report.active, report.nearest))

    runtime.on_drift(on_change)
    feed(model, 5, high=12)
    assert runtime.check().drifted
    assert runtime.check().drifted
    feed(model, 5, seed=200, high=12)
    runtime.check()
    assert calls == [("calibration", "new")]
    runtime.on_drift(lambda report: runtime.switch(report.nearest))
    runtime.check()
    assert runtime.active == "new"
    assert not runtime.check().drifted


def test_report_logs_once(model: Any, caplog: pytest.LogCaptureFixture) -> None:
    model.runtime.on_drift("report")
    feed(model, 5, high=12)
    with caplog.at_level(logging.WARNING, logger="moe_compiler.runtime"):
        model.runtime.check()
        model.runtime.check()
    assert [record.message.splitlines()[0][:12] for record in caplog.records] == ["drift over 5"]


def test_data_that_no_profile_knows_pass_the_threshold(model: Any) -> None:
    runtime, calls = model.runtime, []
    runtime.on_drift(calls.append, margin=1.0, threshold=0.05)
    feed(model, 6)
    assert not runtime.check().drifted
    feed(model, 16, low=40, high=44)
    assert runtime.check().drifted
    assert len(calls) == 1


def test_generate_looks_for_drift_and_an_error_there_does_not_lose_its_tokens(
    model: Any, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(_: DriftReport) -> None:
        raise RuntimeError("the callback failed")

    prompt = tokens(2, 100, 3, high=12)
    model.runtime.on_drift(fail, minimum_tokens=100)
    with caplog.at_level(logging.ERROR, logger="moe_compiler.runtime"):
        out = model.generate(prompt, max_new_tokens=2, do_sample=False)
    assert out.shape == (2, 102)
    assert [record.message for record in caplog.records] == ["the check for drift failed"]
    model.runtime.on_drift("switch", minimum_tokens=100)
    model.generate(prompt, max_new_tokens=2, do_sample=False)
    assert model.runtime.active == "new"


def test_a_background_thread_looks_and_ends(model: Any) -> None:
    runtime = model.runtime
    runtime.on_drift("switch", every=0.01)
    feed(model, 6, high=12)
    deadline = time.monotonic() + PATIENCE
    while runtime.active != "new":
        assert time.monotonic() < deadline
        time.sleep(0.005)
    runtime.on_drift(None)
    assert not any(thread.name == "drift guard" for thread in threading.enumerate())


def test_the_thread_keeps_no_model_alive_and_copies_have_none(model: Any) -> None:
    copied = copy.deepcopy(model)
    copied.runtime.on_drift("report", every=0.01)
    again = copy.deepcopy(copied)
    assert again.runtime._watch is None
    assert again.runtime._policy == copied.runtime._policy
    gone = weakref.ref(copied.runtime)
    del copied
    gc.collect()
    deadline = time.monotonic() + PATIENCE
    while gone() is not None or any(thread.name == "drift guard" for thread in threading.enumerate()):
        assert time.monotonic() < deadline
        gc.collect()
        time.sleep(0.005)
