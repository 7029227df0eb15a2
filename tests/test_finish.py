"""Observing by the fused operator changes nothing that is seen, and is the model's own computation."""

from typing import Any

import pytest
import torch
from compiled import compiled_olmoe, new_data
from tiny import datasets, qwen2_moe

from moe_compiler.api import dynamo_compile
from moe_compiler.passes.calibrate import ObservedModel
from moe_compiler.passes.finish import finish_from_observers
from moe_compiler.passes.record import plain_block


def with_shared_experts() -> Any:
    return dynamo_compile(qwen2_moe(layers=2), datasets(), quantizer="rtn", progress=False)


@pytest.mark.parametrize("build", [lambda: compiled_olmoe(quantizer="rtn"), with_shared_experts])
def test_what_is_seen_stays_the_same(build: Any) -> None:
    model = build()
    plain = {path: plain_block(layer.block) for path, layer in model.runtime.layers.items()}
    before = {name: tensor.clone() for name, tensor in model.named_buffers()}
    seen = []
    for finish in (False, True):
        observed = ObservedModel.of(model, plain)
        changed = finish_from_observers(observed) if finish else 0
        seen.append(observed.observe(list(new_data())))
    has_shared = any(layer.experts.shared_packed() for layer in model.runtime.layers.values())
    assert changed == (0 if has_shared else len(plain))
    for path, first in seen[0].items():
        second = seen[1][path]
        assert torch.equal(first.count, second.count)
        for linear, sums in first.linears.items():
            torch.testing.assert_close(second.linears[linear].sq_sum, sums.sq_sum, rtol=1e-4, atol=0)
    ids = new_data()[0][None]
    torch.testing.assert_close(observed.model(ids).logits, model(ids).logits, rtol=1e-4, atol=1e-5)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.named_buffers() if "routing" not in name)
