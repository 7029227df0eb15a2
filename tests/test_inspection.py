"""`explain`: the graphs, the widths, the pool and the coverage, in words that a reader can check."""

import io
from typing import Any

import pytest
from rich.console import Console
from tiny import datasets, olmoe, qwen2_moe

from moe_compiler import dynamo_compile, explain
from moe_compiler.inspection import readable
from moe_compiler.passes.lower import LoweredExperts


@pytest.fixture(scope="module")
def model() -> Any:
    return dynamo_compile(qwen2_moe(layers=4), datasets(), target_bits=4.0, progress=False)


def printed(model: Any, **options: Any) -> str:
    stream = io.StringIO()
    explain(model, console=Console(file=stream, width=160), **options)
    return stream.getvalue()


def test_every_layer_shows_its_graphs_before_and_after(model: Any) -> None:
    text = printed(model)
    assert text.count("captured:") == 1 + 3  # drawn once, then referred to
    assert text.count("captured: as in model.layers.0.mlp") == 3
    assert text.count("lowered:") == 3 + 1  # the first and the last layer also begin and end the forward pass
    assert text.count("lowered: as in model.layers.1.mlp") == 1
    captured, observed, lowered = (text.index(f"{stage}:\n") for stage in ("captured", "observed", "lowered"))
    assert captured < observed < lowered
    assert "experts_observer" not in text[captured:observed]
    assert "ops.observe_experts_(" in text[observed:lowered]
    assert "ops.packed_experts(" in text[lowered:]
    assert "ops.expert_linear(" not in text[lowered:]


def test_the_widths_and_the_pool_are_those_of_the_buffers(model: Any) -> None:
    text = printed(model, graphs=False)
    for layer in model.runtime.layers.values():
        for packed in layer.experts.all_packed().values():
            assert "".join(map(str, packed.bits)) in text
            assert f"{packed.pool.used} of {packed.pool.capacity} slots" in text
            assert f"{packed.effective_bits:.2f}" in text
    assert "captured" not in text


def test_every_linear_of_a_block_is_covered(model: Any) -> None:
    entries = {entry.path: entry for entry in model.moe_report.coverage}
    for path, graph in model.moe_graphs.items():
        for name, module in graph.named_modules():
            if isinstance(module, LoweredExperts):
                assert entries[f"{path}.{name}.down_proj"].lowered
        assert not entries[f"{path}.gate"].lowered
        assert entries[f"{path}.gate"].reason == "not an expert"
        assert entries[f"{path}.shared_expert_gate"].kind == "other"
        for name in ("gate_up_proj", "down_proj"):
            assert entries[f"{path}.shared_expert.{name}"].kind == "shared experts"
            assert entries[f"{path}.shared_expert.{name}"].code_bits == 8
    text = printed(model, graphs=False)
    assert "model.layers.*.mlp.experts.gate_up_proj" in text
    assert "left alone: not an expert" in text
    assert "down_proj of the shared experts: run as 1 more that every token takes, INT8" in text
    assert f"{model.moe_report.effective_bits:.3f} effective bits per weight" in text


def test_one_layer_can_be_chosen(model: Any) -> None:
    text = printed(model, layers=["model.layers.1.mlp"], graphs=False)
    assert "model.layers.1.mlp ─" in text
    assert "model.layers.0.mlp ─" not in text


def test_readable_code_has_no_noise(model: Any) -> None:
    code = readable(model.moe_graphs["model.layers.0.mlp"])
    assert "= None" not in code
    assert "torch.ops" not in code
    assert "class experts(nn.Module):" in code


def test_bad_arguments_are_refused(model: Any) -> None:
    with pytest.raises(
        TypeError, match=r"`model` must have been compiled by dynamo_compile, but this OlmoeForCausalLM was not"
    ):
        explain(olmoe())
    with pytest.raises(
        ValueError, match=r"`layers` must be among the MoE blocks model.layers.0.mlp.*, but has 'layers.0'"
    ):
        explain(model, layers=["layers.0"])
