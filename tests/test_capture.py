"""Every MoE architecture of transformers is captured exactly, or refused with the reason."""

import copy
import functools
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import architectures
import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from moe_compiler.kernels import ops
from moe_compiler.passes.capture import (
    MoEBlock,
    capture_moe_blocks,
    expert_bias,
    expert_weight,
    trace_experts,
)

SHAPES = ((2, 5), (3, 7), (1, 1))
NAMES = architectures.architecture_names()


@dataclass(frozen=True)
class Captured:
    model: PreTrainedModel
    blocks: dict[str, MoEBlock]

    @torch.no_grad()
    def logits(self, model: PreTrainedModel | None = None) -> list[Tensor]:
        model = model or self.model
        return [architectures.logits(model(**architectures.example_inputs(model, *s))) for s in SHAPES]

    @contextmanager
    def swapped(self) -> Iterator[PreTrainedModel]:
        """The model with the captured graphs in place of its blocks."""
        originals = {path: self.model.get_submodule(path) for path in self.blocks}
        for path, block in self.blocks.items():
            self.model.set_submodule(path, block.graph)
        yield self.model
        for path, original in originals.items():
            self.model.set_submodule(path, original)


@functools.cache
def captured(name: str) -> Captured:
    model = architectures.build(name)
    return Captured(model, capture_moe_blocks(model, architectures.example_inputs(model, 2, 5)))


def routing(block: MoEBlock, tokens: int, top_k: int = 2) -> tuple[Tensor, Tensor, Tensor]:
    experts = block.spec.num_experts
    index = torch.stack([torch.randperm(experts)[:top_k] for _ in range(tokens)])
    return torch.randn(tokens, block.spec.hidden_size), index, torch.rand(tokens, top_k)


def relative_error(actual: Tensor, expected: Tensor) -> float:
    return float((actual - expected).abs().max() / expected.abs().max())


@pytest.mark.parametrize("name", NAMES)
def test_captured_graphs_are_exact(name: str) -> None:
    one = captured(name)
    expected = one.logits()
    with one.swapped() as model:
        actual = one.logits()
        copied = one.logits(copy.deepcopy(model))
    for reference, swapped, copy_of_swapped in zip(expected, actual, copied, strict=True):
        assert torch.equal(swapped, reference)
        assert torch.equal(copy_of_swapped, reference)


@pytest.mark.parametrize("name", NAMES)
def test_capturing_changes_nothing_and_keeps_the_keys(name: str) -> None:
    one = captured(name)
    before = {path: type(module) for path, module in one.model.named_modules()}
    keys = list(one.model.state_dict())
    again = capture_moe_blocks(one.model)
    assert {path: type(module) for path, module in one.model.named_modules()} == before
    assert {path: block.graph.code for path, block in again.items()} == {
        path: block.graph.code for path, block in one.blocks.items()
    }
    # Without a block of their own, experts become the child of the graph in their place.
    bare = {f"{path}.": f"{path}.experts." for path, b in one.blocks.items() if path == b.spec.path}
    for path, inside in bare.items():
        keys = [key.replace(path, inside) for key in keys]
    with one.swapped() as model:
        assert list(model.state_dict()) == keys


@pytest.mark.parametrize("name", NAMES)
def test_experts_graph_equals_the_experts(name: str) -> None:
    for block in captured(name).blocks.values():
        graph = trace_experts(block.experts, block.spec)
        linears = [node for node in graph.graph.nodes if node.target == ops.expert_linear]
        assert [node.name for node in linears] == [p.name[: -len("_proj")] for p in block.spec.projections]
        assert list(graph.state_dict()) == list(block.experts.state_dict())
        assert graph.spec == block.spec
        for tokens in (6, 1):
            inputs = routing(block, tokens)
            assert relative_error(graph(*inputs), block.experts(*inputs)) < 1e-4


@pytest.mark.parametrize("name", NAMES)
def test_spec_describes_the_weights(name: str) -> None:
    for block in captured(name).blocks.values():
        spec = block.spec
        assert spec.hidden_size != spec.intermediate_size  # or the test could not tell a transposed weight
        for projection in spec.projections:
            weight = expert_weight(block.experts, spec, projection.name)
            stored = block.experts.get_parameter(projection.name)
            shape = (spec.num_experts, projection.out_features, projection.in_features)
            assert weight.shape == shape
            assert weight.data_ptr() == stored.data_ptr()
            bias = expert_bias(block.experts, spec, projection.name)
            assert (bias is not None) == spec.has_bias
            assert bias is None or bias.shape == shape[:2]


def test_shared_linears_are_those_of_the_shared_experts() -> None:
    for name, expected in (
        ("qwen2_moe", ("shared_expert.gate_proj", "shared_expert.up_proj", "shared_expert.down_proj")),
        ("nemotron_h", ("shared_experts.up_proj", "shared_experts.down_proj")),
        ("muse_spark", ()),
        ("olmoe", ()),
    ):
        if name in NAMES:
            assert {block.shared_linears for block in captured(name).blocks.values()} == {expected}


@pytest.mark.parametrize("name", architectures.refused_names())
def test_unsupported_architectures_are_refused(name: str) -> None:
    model = architectures.build(name)
    reason = architectures.REFUSED.get(name, "it has no stacked 3-D weights")
    match = rf"`model` \({type(model).__name__}\) has a MoE block .* `[\w.]+` \(\w+\): .*{reason}"
    with pytest.raises(ValueError, match=match):
        capture_moe_blocks(model)


def test_a_model_on_the_meta_device_gives_the_same_graphs() -> None:
    for name in ("olmoe", "deepseek_v4", "gemma4", "step3p7", "zaya"):
        if name in NAMES:
            one = captured(name)
            blocks = capture_moe_blocks(copy.deepcopy(one.model).to("meta"))
            assert {p: b.graph.code for p, b in blocks.items()} == {p: b.graph.code for p, b in one.blocks.items()}
            assert [b.spec for b in blocks.values()] == [b.spec for b in one.blocks.values()]


def test_generate() -> None:
    one = captured("olmoe")
    ids = architectures.example_inputs(one.model, 2, 5)["input_ids"]
    options = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None}
    expected = one.model.generate(ids, **options)
    with one.swapped() as model:
        assert torch.equal(model.generate(ids, **options), expected)
        assert torch.equal(model.generate(ids, cache_implementation="static", **options), expected)


def test_router_logits_are_still_recorded() -> None:
    one = captured("olmoe")
    inputs = architectures.example_inputs(one.model, 2, 5)
    expected = one.model(**inputs, output_router_logits=True).router_logits
    with one.swapped() as model:
        actual = model(**inputs, output_router_logits=True).router_logits
    assert len(actual) == len(one.blocks)
    assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))


def test_a_model_in_training_is_captured_as_in_eval_mode() -> None:
    model = architectures.build("mixtral").train()
    for block in model.model.layers:
        block.mlp.jitter_noise = 0.5
    blocks = capture_moe_blocks(model, architectures.example_inputs(model, 1, 4))
    assert all(module.training for module in model.modules())
    assert all("uniform_" not in block.graph.code for block in blocks.values())


def test_the_same_module_in_two_places_is_refused() -> None:
    model = architectures.build("olmoe")
    model.model.layers[1].mlp = model.model.layers[0].mlp
    with pytest.raises(ValueError, match=r"used at several places: model.layers.0.mlp, model.layers.1.mlp"):
        capture_moe_blocks(model)


def test_an_unsupported_block_beside_supported_ones_is_refused() -> None:
    both = nn.ModuleDict({"left": architectures.build("olmoe"), "right": architectures.build("llama4")})
    with pytest.raises(ValueError, match=r"`right\.model\.layers\.0\.feed_forward\.experts` .*1 more module"):
        capture_moe_blocks(both)


def test_a_dense_model_is_refused() -> None:
    config = LlamaConfig(
        vocab_size=16,
        hidden_size=8,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=1,
        bos_token_id=1,
    )
    with pytest.raises(ValueError, match="no MoE block found in LlamaForCausalLM"):
        capture_moe_blocks(LlamaForCausalLM(config))


def test_an_unknown_projection_is_refused() -> None:
    block = next(iter(captured("olmoe").blocks.values()))
    with pytest.raises(ValueError, match="`name` must be one of the linears gate_up_proj and down_proj"):
        expert_weight(block.experts, block.spec, "up_proj")


def test_ids_of_other_ranks_add_nothing() -> None:
    block = next(iter(captured("olmoe").blocks.values()))
    graph = trace_experts(block.experts, block.spec)
    hidden_states, index, weights = routing(block, 4)
    expected = graph(hidden_states, index[:, :1], weights[:, :1])
    index[:, 1] = block.spec.num_experts
    assert relative_error(graph(hidden_states, index, weights), expected) < 1e-6


def test_no_tokens() -> None:
    block = next(iter(captured("olmoe").blocks.values()))
    graph = trace_experts(block.experts, block.spec)
    assert graph(*(x[:0] for x in routing(block, 4))).shape == (0, block.spec.hidden_size)
