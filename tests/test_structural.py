"""Experts with stacked weights that no library decorates, and blocks with optional arguments."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moe_compiler.passes.capture import MoEBlock, capture_moe_blocks, expert_weight, trace_experts

EXPERTS, HIDDEN, INTERMEDIATE, TOP_K = 4, 8, 6, 2


class Experts(nn.Module):
    """Weights `(E, N, K)`, the default gate."""

    def __init__(self, transposed: bool = False, bias: bool = False, gated: bool = True) -> None:
        super().__init__()
        self.transposed = transposed
        self.gated = gated
        self.act_fn = nn.SiLU()
        up = "gate_up_proj" if gated else "up_proj"
        for name, n, k in (
            (up, (1 + gated) * INTERMEDIATE, HIDDEN),
            ("down_proj", HIDDEN, INTERMEDIATE),
        ):
            shape = (EXPERTS, k, n) if transposed else (EXPERTS, n, k)
            self.register_parameter(name, nn.Parameter(torch.randn(shape)))
            if bias:
                self.register_parameter(f"{name}_bias", nn.Parameter(torch.randn(EXPERTS, n)))

    def linear(self, name: str, expert: int, x: Tensor) -> Tensor:
        weight = self.get_parameter(name)[expert]
        bias = getattr(self, f"{name}_bias", None)
        return F.linear(x, weight.T if self.transposed else weight, None if bias is None else bias[expert])

    def activate(self, x: Tensor) -> Tensor:
        gate, up = x.chunk(2, dim=-1)
        return self.act_fn(gate) * up

    def forward(self, hidden_states: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        out = torch.zeros_like(hidden_states)
        for token, (experts, scales) in enumerate(zip(index.tolist(), weights, strict=True)):
            for expert, scale in zip(experts, scales, strict=True):
                x = hidden_states[token]
                if self.gated:
                    x = self.activate(self.linear("gate_up_proj", expert, x))
                else:
                    x = self.act_fn(self.linear("up_proj", expert, x))
                out[token] += scale * self.linear("down_proj", expert, x)
        return out


class SwappedHalves(Experts):
    def activate(self, x: Tensor) -> Tensor:
        up, gate = x.chunk(2, dim=-1)
        return self.act_fn(gate) * up


class Failing(Experts):
    def forward(self, hidden_states: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        raise RuntimeError("needs a GPU")


class Block(nn.Module):
    """A router and experts; `scale` and `shift` are optional."""

    def __init__(self, experts: nn.Module) -> None:
        super().__init__()
        self.gate = nn.Linear(HIDDEN, EXPERTS)
        self.experts = experts

    def forward(self, x: Tensor, scale: Tensor | None = None) -> Tensor:
        batch, sequence, features = x.shape
        flat = x.view(-1, features)
        weights, index = self.gate(flat).softmax(-1).topk(TOP_K)
        out = self.experts(flat, index, weights).view(batch, sequence, features)
        if scale is not None:
            out = out * scale
        return out


class ByKeyword(Block):
    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        weights, index = self.gate(x).softmax(-1).topk(TOP_K)
        return self.experts(weights=weights, hidden_states=x, index=index)


class CallsTwice(Block):
    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        weights, index = self.gate(x).softmax(-1).topk(TOP_K)
        return self.experts(x, index, weights) + self.experts(x, index, weights)


class WithoutIndex(Block):
    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        return self.experts(x, None, self.gate(x))


class DependsOnValues(Block):
    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        if x.sum() > 0:
            x = -x
        return self.experts(x, x, x)


class Model(nn.Module):
    def __init__(self, block: nn.Module, scale: float | None = None) -> None:
        super().__init__()
        self.embed = nn.Embedding(16, HIDDEN)
        self.mlp = block
        self.scale = scale

    def forward(self, input_ids: Tensor) -> Tensor:
        x = self.embed(input_ids)
        return self.mlp(x) if self.scale is None else self.mlp(x, scale=torch.tensor(self.scale))


def capture_one(model: nn.Module, example: Tensor | None = None) -> MoEBlock:
    (block,) = capture_moe_blocks(model, example).values()
    return block


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_stacked_experts_are_recognised_by_their_weights(transposed: bool, bias: bool) -> None:
    experts = Experts(transposed, bias)
    block = capture_one(Model(Block(experts)))
    assert (block.path, block.spec.path) == ("mlp", "mlp.experts")
    spec = block.spec
    assert (spec.kind, spec.is_transposed, spec.has_bias) == ("structural", transposed, bias)
    assert (spec.num_experts, spec.hidden_size, spec.intermediate_size) == (EXPERTS, HIDDEN, INTERMEDIATE)
    assert expert_weight(experts, spec, "down_proj").shape == (EXPERTS, HIDDEN, INTERMEDIATE)


def test_experts_without_a_gate() -> None:
    block = capture_one(Model(Block(Experts(gated=False))))
    assert [p.name for p in block.spec.projections] == ["up_proj", "down_proj"]
    x, index, weights = torch.randn(5, HIDDEN), torch.randint(EXPERTS, (5, TOP_K)), torch.rand(5, TOP_K)
    expected = block.experts(x, index, weights)
    torch.testing.assert_close(trace_experts(block.experts, block.spec)(x, index, weights), expected)


def test_another_formula_is_refused() -> None:
    match = r"`mlp` \(Block\): it does not compute the common formula .* differ by"
    with pytest.raises(ValueError, match=match):
        capture_moe_blocks(Model(Block(SwappedHalves())))


def test_experts_that_fail_are_refused() -> None:
    with pytest.raises(ValueError, match=r"it fails on \(hidden states, .*needs a GPU"):
        capture_moe_blocks(Model(Block(Failing())))


def test_arguments_by_keyword_are_brought_in_order() -> None:
    block = capture_one(Model(ByKeyword(Experts())), torch.tensor([1, 2, 3]))
    (node,) = (n for n in block.graph.graph.nodes if n.name == block.experts_node)
    assert not node.kwargs
    assert [str(arg) for arg in node.args] == ["x", "top_k_index", "top_k_weights"]


@pytest.mark.parametrize(
    ("block", "reason"),
    [
        (CallsTwice, "must call `experts` once, but does so 2 times"),
        (WithoutIndex, r"must call `experts` with \(hidden states, expert index, routing weights\)"),
        (DependsOnValues, "control flow"),
    ],
)
def test_blocks_that_cannot_be_captured_are_refused(block: type[Block], reason: str) -> None:
    with pytest.raises(ValueError, match=rf"`model` \(Model\) .* `mlp` \({block.__name__}\): .*{reason}"):
        capture_moe_blocks(Model(block(Experts())))


def test_optional_arguments_follow_the_example() -> None:
    plain, scaled = Model(Block(Experts())), Model(Block(Experts()), scale=2.0)
    ids = torch.tensor([[1, 2, 3]])
    x = plain.embed(ids)
    without = capture_one(plain, ids)
    assert torch.equal(without.graph(x), plain.mlp(x))
    with pytest.raises(AssertionError, match="scale has been specialized to have value None"):
        without.graph(x, scale=torch.tensor(2.0))
    given = capture_one(scaled, ids)
    assert torch.equal(given.graph(x, scale=torch.tensor(3.0)), scaled.mlp(x, torch.tensor(3.0)))


def test_an_example_with_keywords() -> None:
    block = capture_one(Model(Block(Experts())), {"input_ids": torch.tensor([[1, 2]])})
    assert block.experts_target == "experts"


def test_experts_beside_attention_are_captured_alone() -> None:
    class Layer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.self_attn = nn.Identity()
            self.experts = Experts()

    block = capture_one(nn.Sequential(Layer()))
    assert (block.path, block.spec.path, block.experts_target) == ("0.experts", "0.experts", "experts")
    x, index, weights = torch.randn(3, HIDDEN), torch.randint(EXPERTS, (3, TOP_K)), torch.rand(3, TOP_K)
    assert torch.equal(block.graph(x, index, weights), block.experts(x, index, weights))
