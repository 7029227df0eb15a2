"""The second linear of the experts, fitted to what it is given behind the quantized first one."""

from dataclasses import replace
from typing import Any

import deepseek_v1
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import olmoe, qwen2_moe, tokens
from torch import Tensor

from moe_compiler import api, dynamo_compile
from moe_compiler.kernels.experts import PackedExpertLinear
from moe_compiler.passes.capture import MoEBlock, capture_moe_blocks, expert_weight
from moe_compiler.passes.hidden import HiddenMoments, hidden_moments, make_up
from moe_compiler.passes.rtn import quantize_rtn


def packed_first(block: MoEBlock, bits: int = 2) -> PackedExpertLinear:
    weight = expert_weight(block.experts, block.spec, block.spec.projections[0].name)
    return PackedExpertLinear.from_quantized(quantize_rtn(weight, [bits] * weight.shape[0]))


def experts_calls(model: Any, block: MoEBlock, ids: Tensor) -> tuple[Tensor, ...]:
    calls: list[tuple[Tensor, ...]] = []
    experts = model.get_submodule(block.spec.path)
    handle = experts.register_forward_pre_hook(lambda _, args: calls.append(args))
    with torch.no_grad():
        model(input_ids=ids, use_cache=False)
    handle.remove()
    return calls[0]


@pytest.mark.parametrize("build", [olmoe, qwen2_moe])
def test_moments_equal_a_float64_oracle(build: Any) -> None:
    model, ids = build(), tokens(4, 16)
    path, block = next(iter(capture_moe_blocks(model, ids).items()))
    first = packed_first(block)
    found = hidden_moments(model, {path: block}, {path: first}, {"a": list(ids)})[path]
    x, index, gates = experts_calls(model, block, ids)
    top_k = index.shape[1]
    expert_ids, gate = index.reshape(-1), gates.double().reshape(-1, 1)
    rows = x.double().repeat_interleave(top_k, 0)

    def hidden(weight: Tensor) -> Tensor:
        up, down = torch.einsum("rk,rnk->rn", rows, weight.double()[expert_ids]).chunk(2, -1)
        return F.silu(up) * down * gate

    original = hidden(expert_weight(block.experts, block.spec, "gate_up_proj"))
    given = hidden(first.dequantize())
    for expert in range(block.spec.num_experts):
        mine = expert_ids == expert
        hessian = given[mine].T @ given[mine]
        missed = (original - given)[mine].T @ given[mine]
        torch.testing.assert_close(found.hessian[expert].double(), hessian, rtol=1e-3, atol=1e-5)
        torch.testing.assert_close(found.missed[expert].double(), missed, rtol=1e-3, atol=1e-5)


def test_every_dataset_counts_the_same_whatever_its_size() -> None:
    model, ids = olmoe(), tokens(2, 16)
    blocks = capture_moe_blocks(model, ids)
    first = {path: packed_first(block) for path, block in blocks.items()}
    once = hidden_moments(model, blocks, first, {"a": list(ids[:1]), "b": list(ids[1:])})
    often = hidden_moments(model, blocks, first, {"a": [*ids[:1]] * 3, "b": list(ids[1:])})
    for path in blocks:
        torch.testing.assert_close(often[path].missed, 2 * once[path].missed, rtol=1e-4, atol=1e-5)


def test_the_model_is_left_as_it_was() -> None:
    model, ids = deepseek_v1.build(), tokens(2, 8)
    blocks = capture_moe_blocks(model, ids)
    names, expected = [name for name, _ in model.named_modules()], model(input_ids=ids).logits
    hidden_moments(model, blocks, {path: packed_first(block) for path, block in blocks.items()}, {"a": list(ids)})
    assert [name for name, _ in model.named_modules()] == names
    assert torch.equal(model(input_ids=ids).logits, expected)


def moments_of(seed: int, count: int, noise: float) -> tuple[Tensor, Tensor, Tensor, HiddenMoments]:
    """A weight `(1, 4, 6)`, inputs before and behind quantization `(count, 6)`, and their moments."""
    generator = torch.Generator().manual_seed(seed)
    weight, original = torch.randn(1, 4, 6, generator=generator), torch.randn(count, 6, generator=generator)
    given = original + noise * torch.randn(count, 6, generator=generator)
    return weight, original, given, HiddenMoments((given.T @ given)[None], ((original - given).T @ given)[None])


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 1000), count=st.integers(1, 60), noise=st.floats(0.01, 2), damping=st.floats(1e-3, 1))
def test_the_outputs_come_nearer_to_the_original_ones(seed: int, count: int, noise: float, damping: float) -> None:
    weight, original, given, moments = moments_of(seed, count, noise)
    better = make_up(weight, moments, torch.tensor([count]), damping)
    wanted = original @ weight[0].T
    before, after = (wanted - given @ one[0].T for one in (weight, better))
    assert after.norm() <= before.norm() * (1 + 1e-5)


def test_with_many_tokens_it_is_the_least_squares_fit() -> None:
    weight, original, given, moments = moments_of(0, 60, 0.5)
    scaled = HiddenMoments(moments.hessian * 1e4, moments.missed * 1e4)
    found = make_up(weight, scaled, torch.tensor([10**8]), damping=0.0)
    expected = torch.linalg.lstsq(given.double(), original.double() @ weight[0].double().T).solution.T
    torch.testing.assert_close(found[0].double(), expected, rtol=1e-4, atol=1e-5)


def test_nothing_changes_where_nothing_was_missed_or_seen() -> None:
    weight, _, _, moments = moments_of(1, 60, 0.5)
    nothing = torch.zeros_like(moments.hessian)
    assert torch.equal(make_up(weight, HiddenMoments(moments.hessian, nothing), torch.tensor([60])), weight)
    assert torch.equal(make_up(weight, HiddenMoments(nothing, nothing), torch.tensor([0])), weight)


def test_bad_moments_are_refused() -> None:
    weight, _, _, moments = moments_of(2, 10, 0.5)
    count = torch.tensor([10])
    with pytest.raises(ValueError, match=r"`moments` must have matrices of one shape, got \(1, 6, 6\) and \(1, 6, 5\)"):
        make_up(weight, replace(moments, missed=moments.missed[..., :5]), count)
    with pytest.raises(ValueError, match="`moments` must be finite, those of the missed inputs"):
        make_up(weight, replace(moments, missed=moments.missed * torch.nan), count)
    with pytest.raises(ValueError, match="`damping` must not be negative, got -1"):
        make_up(weight, moments, count, damping=-1)
    with pytest.raises(ValueError, match="`count` must have one number per expert"):
        make_up(weight, moments, torch.tensor([5, 5]))


def test_a_compiled_model_comes_nearer_to_the_original(monkeypatch: Any) -> None:
    data = {"a": list(tokens(24, 32, seed=5))}
    ids = torch.stack(data["a"])
    with torch.no_grad():
        expected = olmoe(num_hidden_layers=1)(input_ids=ids).logits
        fitted, plain = olmoe(num_hidden_layers=1), olmoe(num_hidden_layers=1)
        options: dict[str, Any] = {"strategy": "uniform", "uniform_bits": 2, "target_bits": None, "progress": False}
        dynamo_compile(fitted, data, **options)

        def as_it_was(*arguments: Any, **keywords: Any) -> dict[str, HiddenMoments]:
            found = hidden_moments(*arguments, **keywords)
            return {path: replace(one, missed=torch.zeros_like(one.missed)) for path, one in found.items()}

        monkeypatch.setattr(api, "hidden_moments", as_it_was)
        dynamo_compile(plain, data, **options)
        near, far = ((model(input_ids=ids).logits - expected).norm() for model in (fitted, plain))
    assert near < 0.97 * far
