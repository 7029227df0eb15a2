"""The sensitivity of layers: what an error of the experts' outputs costs, by one backward pass."""

from collections.abc import Mapping

import pytest
import tiny
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moe_compiler import dynamo_compile
from moe_compiler.passes.capture import MoEBlock, capture_moe_blocks
from moe_compiler.passes.sensitivity import layer_sensitivity

DATA = [*tiny.tokens(3, 24, seed=3)]


def products(model: nn.Module, blocks: Mapping[str, MoEBlock], sample: Tensor) -> list[float]:
    """The oracle: gradients by adding zeros to the experts' outputs."""
    zeros, outputs, handles = {}, {}, []
    for path, block in blocks.items():

        def hook(_: nn.Module, __: object, output: Tensor, path: str = path) -> Tensor:
            zeros[path] = torch.zeros_like(output, requires_grad=True)
            outputs[path] = output.detach()
            return output + zeros[path]

        handles.append(block.experts.register_forward_hook(hook))
    logits = model(input_ids=sample[None], use_cache=False).logits[0, :-1]
    loss = F.cross_entropy(logits, sample[1:], reduction="sum")
    gradients = torch.autograd.grad(loss, list(zeros.values()))
    for handle in handles:
        handle.remove()
    pairs = zip(gradients, outputs.values(), strict=True)
    return [float((g.square().sum(-1) * y.square().sum(-1)).sum()) / sample.numel() for g, y in pairs]


def test_it_is_the_mean_product_of_squared_gradients_and_outputs() -> None:
    model = tiny.olmoe(num_hidden_layers=3)
    blocks = capture_moe_blocks(model)
    found = list(layer_sensitivity(model, blocks, {"a": DATA[:1]}).values())
    expected = products(model, blocks, DATA[0])
    mean = sum(expected) / 3
    assert found == pytest.approx([one / mean for one in expected], rel=1e-3)


def test_every_dataset_counts_the_same_whatever_its_size() -> None:
    model = tiny.olmoe()
    blocks = capture_moe_blocks(model)
    once = layer_sensitivity(model, blocks, {"a": DATA[:1], "b": DATA[1:2]})
    often = layer_sensitivity(model, blocks, {"a": DATA[:1] * 5, "b": DATA[1:2]})
    assert list(once.values()) == pytest.approx(list(often.values()), rel=1e-4)


def test_the_model_is_left_as_it_was() -> None:
    model = tiny.olmoe()
    trained = [parameter.requires_grad for parameter in model.parameters()]
    with torch.no_grad():
        layer_sensitivity(model, capture_moe_blocks(model), {"a": DATA}, tokens=24)
    assert [parameter.requires_grad for parameter in model.parameters()] == trained
    assert all(parameter.grad is None for parameter in model.parameters())
    assert not any(module._forward_hooks for module in model.modules())


def test_the_budget_gives_sensitive_layers_more_bits() -> None:
    model = tiny.olmoe()
    with torch.no_grad():
        model.model.layers[1].mlp.experts.down_proj.mul_(1e-2)  # the second layer hardly matters now
    data = {"a": tiny.tokens(8, 32, seed=4)}
    compiled = dynamo_compile(model, data, strategy="budget", target_bits=4.3, progress=False)
    first, second = (
        sum(sum(bits) for bits in layer.bits.values()) for layer in compiled.moe_report.plan.layers.values()
    )
    assert first > second
