"""No change of the pools recompiles a compiled graph, and the graph follows every change."""

import copy
from typing import Any

import pytest
import torch
from compiled import OPTIONS, compiled_olmoe, logits, new_data, other_data
from tiny import datasets, olmoe, qwen2_moe, tokens
from torch import Tensor
from torch._dynamo.utils import counters

from moe_compiler.api import dynamo_compile


def test_a_hundred_changes_recompile_nothing_and_give_what_a_fresh_compile_gives() -> None:
    model = dynamo_compile(qwen2_moe(layers=1), datasets(), rule="restore", **OPTIONS)
    torch._dynamo.reset()
    counters.clear()
    forward = torch.compile(model, fullgraph=True, dynamic=True)
    shapes = ((2, 9), (3, 17), (4, 33))
    for shape in shapes:
        logits(forward, shape)
    graphs = counters["stats"]["unique_graphs"]
    outputs: dict[tuple[str, tuple[int, int]], Tensor] = {}
    names = ("a", "b", "calibration")
    with torch.compiler.set_stance("fail_on_recompile"):
        for name in names[:2]:
            model.runtime.adapt(tokens(2, 16, ord(name)), name=name)
        for step in range(96):
            model.runtime.switch(names[step % 3]) if step % 4 else model.runtime.revert()
            if step % 8 == 7:
                logits(forward, shapes[step % 3])
        for name in names:
            model.runtime.switch(name)
            for shape in shapes:
                outputs[name, shape] = logits(forward, shape)
                torch.testing.assert_close(outputs[name, shape], logits(model, shape), rtol=1e-4, atol=1e-5)
    assert counters["stats"]["unique_graphs"] == graphs
    assert not torch.equal(outputs["a", (2, 9)], outputs["calibration", (2, 9)])
    torch._dynamo.reset()
    fresh = torch.compile(model, fullgraph=True, dynamic=True, backend="aot_eager")
    for shape in shapes:  # `calibration` is in the pools
        torch.testing.assert_close(logits(fresh, shape), outputs["calibration", shape], rtol=1e-4, atol=1e-5)
    model.runtime.switch("a")
    torch.testing.assert_close(logits(fresh, (2, 9)), outputs["a", (2, 9)], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_generate_through_inductor_follows_without_recompiling(cache: str) -> None:
    model = compiled_olmoe(layers=1, quantizer="rtn", rule="restore")
    fresh = copy.deepcopy(model)
    lengths, names = (4, 6), ("new", "calibration")

    def generate(of: Any, length: int) -> tuple[Tensor, Tensor]:
        out = of.generate(
            tokens(1, length, 3),
            max_new_tokens=3,
            do_sample=False,
            cache_implementation=cache,
            output_logits=True,
            return_dict_in_generate=True,
        )
        return out.sequences, torch.cat(out.logits)

    torch._dynamo.reset()
    counters.clear()
    model.forward = torch.compile(model.forward, fullgraph=True, dynamic=True)
    for length in lengths:
        generate(model, length)
    graphs = counters["stats"]["unique_graphs"]
    outputs = {}
    with torch.compiler.set_stance("fail_on_recompile"):
        model.runtime.adapt(new_data(), name="new")
        for name in (*names, *names):
            model.runtime.switch(name)
            for length in lengths:
                outputs[name, length] = generate(model, length)
        model.runtime.adapt(other_data(), name="other")
        other = generate(model, 6)
    assert counters["stats"]["unique_graphs"] == graphs
    assert len({tuple(scores.flatten().tolist()) for _, scores in (*outputs.values(), other)}) == 5
    fresh.runtime.adapt(new_data(), name="new")
    torch._dynamo.reset()
    fresh.forward = torch.compile(fresh.forward, fullgraph=True, dynamic=True, backend="aot_eager")
    for (name, length), (sequences, scores) in outputs.items():
        fresh.runtime.switch(name)
        again = generate(fresh, length)
        assert torch.equal(again[0], sequences)
        torch.testing.assert_close(again[1], scores, rtol=1e-4, atol=1e-5)


def test_model_compile_in_place_follows_adapt() -> None:
    model = compiled_olmoe(layers=1, quantizer="rtn", rule="restore")
    model.compile(fullgraph=True, dynamic=True, backend="eager")
    torch._dynamo.reset()
    before = logits(model)
    with torch.compiler.set_stance("fail_on_recompile"):
        model.runtime.adapt(new_data())
        assert not torch.equal(logits(model), before)
        model.runtime.revert()
        assert torch.equal(logits(model), before)


def test_a_compiled_forward_of_the_body_does_not_disturb_adapt() -> None:
    model = dynamo_compile(olmoe(num_hidden_layers=1), datasets(), **OPTIONS)
    body = model.model  # what adapt runs
    body.forward = torch.compile(body.forward, dynamic=True, backend="eager")
    before = logits(model)
    with torch.compiler.set_stance("fail_on_recompile"):
        model.runtime.adapt(new_data())
        assert not torch.equal(logits(model), before)
        model.runtime.revert()
        assert torch.equal(logits(model), before)
