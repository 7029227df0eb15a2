"""Experts as an `nn.ModuleList` behind a dispatch method: exact in the block graph, canonical in the experts graph."""

import copy
from pathlib import Path

import deepseek_v1
import pytest
import torch
from deepseek_v1 import DeepseekMLP, DeepseekMoE, DeepseekV1Config
from torch import Tensor, nn

from moe_compiler.passes.capture import (
    capture_moe_blocks,
    expert_bias,
    expert_weight,
    trace_experts,
)

SHAPES = ((2, 5), (3, 7), (1, 1))
CONFIG = DeepseekV1Config()


class RowsMoE(DeepseekMoE):
    """The dispatch of DeepSeek-V2's published code: index and weights stay `(T, k)`."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        index, weights, _ = self.gate(hidden_states)
        flat = hidden_states.view(-1, hidden_states.shape[-1])
        return self.moe_infer(flat, index, weights).view(*hidden_states.shape)

    def moe_infer(self, x: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        for token, (experts, scales) in enumerate(zip(index.tolist(), weights, strict=True)):
            for expert, scale in zip(experts, scales, strict=True):
                out[token] += scale * self.experts[expert](x[token])
        return out


class FlatWeightsMoE(RowsMoE):
    def forward(self, hidden_states: Tensor) -> Tensor:
        index, weights, _ = self.gate(hidden_states)
        flat = hidden_states.view(-1, hidden_states.shape[-1])
        return self.dispatch(flat, index.view(-1), weights.view(-1)).view(*hidden_states.shape)

    def dispatch(self, x: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        assert index.dim() == weights.dim() == 1
        return self.moe_infer(x, index.view(len(x), -1), weights.view(len(x), -1))


class LoopInForward(DeepseekMoE):
    """The form of Mixtral in transformers 4."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        _, weights, _ = self.gate(hidden_states)
        return sum(expert(hidden_states) * weights[0, 0] for expert in self.experts)


class TwoMethods(DeepseekMoE):
    def forward(self, hidden_states: Tensor) -> Tensor:
        return self.moe_infer(hidden_states, *self.gate(hidden_states)[:2]) + self.second(hidden_states)

    def second(self, x: Tensor) -> Tensor:
        return self.experts[0](x)


class NeedsTheGate(RowsMoE):
    def moe_infer(self, x: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        return super().moe_infer(x, index, weights * self.gate.weight.mean())


class IgnoresTheWeights(RowsMoE):
    def moe_infer(self, x: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        return super().moe_infer(x, index, torch.ones_like(weights))


class OtherArguments(RowsMoE):
    def forward(self, hidden_states: Tensor) -> Tensor:
        index, weights, _ = self.gate(hidden_states)
        return self.moe_infer(hidden_states[0], index, weights, 3)  # type: ignore[call-arg]


class PlainExpert(nn.Module):
    """Names of Mixtral's checkpoints, with biases and a function as activation."""

    def __init__(self, hidden_size: int, intermediate_size: int) -> None:
        super().__init__()
        self.w1 = nn.Linear(hidden_size, intermediate_size)
        self.w2 = nn.Linear(intermediate_size, hidden_size)
        self.w3 = nn.Linear(hidden_size, intermediate_size)
        self.act = torch.nn.functional.gelu

    def forward(self, x: Tensor) -> Tensor:
        return self.w2(self.act(self.w1(x)) * self.w3(x))


def wrapped(block: nn.Module) -> nn.Module:
    for parameter in block.parameters():
        nn.init.normal_(parameter, 0.0, 0.15)
    return nn.ModuleDict({"mlp": block}).eval()


def ids(shape: tuple[int, int]) -> Tensor:
    return torch.randint(3, CONFIG.vocab_size, shape)


def test_captured_graphs_are_exact() -> None:
    model = deepseek_v1.build()
    reference = copy.deepcopy(model)
    blocks = capture_moe_blocks(model, ids((1, 4)))
    assert list(blocks) == ["layers.1.mlp", "layers.2.mlp"]
    for path, block in blocks.items():
        assert block.spec.kind == "list"
        assert block.shared_linears == tuple(f"shared_experts.{n}_proj" for n in ("gate", "up", "down"))
        assert list(block.graph.state_dict()) == list(model.get_submodule(path).state_dict())
        model.set_submodule(path, block.graph)
    copied = copy.deepcopy(model)
    for shape in SHAPES:
        x = ids(shape)
        expected = reference(x).logits
        assert torch.equal(model(x).logits, expected)
        assert torch.equal(copied(x).logits, expected)
    options = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None}
    x = ids((2, 5))
    assert torch.equal(model.generate(x, **options), reference.generate(x, **options))


def test_checkpoints_stay_the_same(tmp_path: Path) -> None:
    model = deepseek_v1.build()
    x = ids((2, 5))
    expected = model(x).logits
    for path, block in capture_moe_blocks(model).items():
        model.set_submodule(path, block.graph)
    model.save_pretrained(tmp_path)
    loaded = deepseek_v1.DeepseekV1ForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(loaded(x).logits, expected)


@pytest.mark.parametrize("block_class", [DeepseekMoE, RowsMoE, FlatWeightsMoE])
def test_every_form_of_index_and_weights_becomes_the_same_contract(block_class: type[DeepseekMoE]) -> None:
    model = wrapped(block_class(CONFIG))
    original = model["mlp"]
    (block,) = capture_moe_blocks(model).values()
    for shape in SHAPES:
        x = torch.randn(*shape, CONFIG.hidden_size)
        assert torch.equal(block.graph(x), original(x))
    seen = []
    block.experts.register_forward_pre_hook(lambda _, args: seen.append([a.shape for a in args]))
    block.graph(torch.randn(2, 5, CONFIG.hidden_size))
    assert seen == [[(10, 64), (10, 3), (10, 3)]]
    block.graph.set_submodule("experts", trace_experts(block.experts, block.spec))
    x = torch.randn(2, 5, CONFIG.hidden_size)
    torch.testing.assert_close(block.graph(x), original(x), rtol=1e-4, atol=1e-5)


def test_weights_of_a_list() -> None:
    block = DeepseekMoE(CONFIG)
    block.experts = nn.ModuleList(PlainExpert(64, 32) for _ in range(5))
    block.gate.weight = nn.Parameter(block.gate.weight[:5])
    (captured,) = capture_moe_blocks(wrapped(block)).values()
    spec = captured.spec
    assert (spec.num_experts, spec.has_bias) == (5, True)
    weight = expert_weight(captured.experts, spec, "gate_up_proj")
    assert torch.equal(weight[3], torch.cat([block.experts[3].w1.weight, block.experts[3].w3.weight]))
    assert torch.equal(expert_weight(block.experts, spec, "down_proj")[4], block.experts[4].w2.weight)
    bias = expert_bias(captured.experts, spec, "gate_up_proj")
    assert bias is not None
    assert torch.equal(bias[2], torch.cat([block.experts[2].w1.bias, block.experts[2].w3.bias]))


def test_stacking_keeps_no_copy() -> None:
    (block,) = capture_moe_blocks(wrapped(DeepseekMoE(CONFIG))).values()
    graph = trace_experts(block.experts, block.spec)
    own = {p.data_ptr() for p in block.experts.parameters()}
    assert {p.data_ptr() for p in graph.parameters()} == own


def test_a_model_on_the_meta_device_gives_the_same_graphs() -> None:
    model = deepseek_v1.build()
    blocks = capture_moe_blocks(model)
    on_meta = capture_moe_blocks(copy.deepcopy(model).to("meta"))
    assert {p: b.graph.code for p, b in on_meta.items()} == {p: b.graph.code for p, b in blocks.items()}


@pytest.mark.parametrize(
    ("block_class", "reason"),
    [
        (LoopInForward, "must leave the loop over them to one other method, but it loops over `experts` itself"),
        (TwoMethods, "to one other method, but there are several: moe_infer, second"),
        (NeedsTheGate, r"fails on .*has no attribute 'gate'"),
        (IgnoresTheWeights, "does not compute the common formula"),
        (OtherArguments, "positional arguments"),
    ],
)
def test_other_dispatch_is_refused(block_class: type[DeepseekMoE], reason: str) -> None:
    with pytest.raises(ValueError, match=rf"`mlp` \({block_class.__name__}\): .*{reason}"):
        capture_moe_blocks(wrapped(block_class(CONFIG)))


def test_experts_of_different_sizes_are_refused() -> None:
    block = DeepseekMoE(CONFIG)
    block.experts[1] = DeepseekMLP(64, 16)
    with pytest.raises(ValueError, match=r"`mlp.experts` \(ModuleList\): .*ModuleList of DeepseekMLP"):
        capture_moe_blocks(wrapped(block))


def test_an_expert_without_a_known_activation_is_refused() -> None:
    block = DeepseekMoE(CONFIG)
    for expert in block.experts:
        expert.nonlinearity = expert._modules.pop("act_fn")
    with pytest.raises(ValueError, match=r"no activation under any of the names act_fn|no attribute 'act_fn'"):
        capture_moe_blocks(wrapped(block))
