"""CUDA graphs and compiled modules follow what changes in place: pools, tokens, routing. Part of `gpu_check.py`."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from gpu_cases import TOLERANCE, Case, Inputs, build, distance, expected_layer, layer, other_pool
from torch import Tensor, nn
from torch._dynamo.utils import counters

from moe_compiler.kernels import ops
from moe_compiler.kernels.packed import PackedTensors


def changes(inputs: Inputs) -> Iterator[str]:
    """Changes the contents of the inputs in place, one kind after the other."""
    yield "as captured"
    for linear in (inputs.gate_up, inputs.down):
        linear.pool.copy_(other_pool(linear.pool, linear.in_features, seed=1))
    yield "new pool contents"
    inputs.x.copy_(torch.randn(inputs.x.shape).to(inputs.x))
    yield "new tokens"
    inputs.ids.copy_((inputs.ids + 3) % inputs.gate_up.num_experts)
    yield "new routing"
    for linear in (inputs.gate_up, inputs.down):
        linear.pool.offset.zero_()
    yield "pool emptied"


def worst_after_changes(inputs: Inputs, run: Callable[[], Tensor]) -> float:
    """The largest error of `run` over all changes.

    Raises:
        AssertionError: names the change after which the result is wrong.
    """
    worst = 0.0
    for change in changes(inputs):
        found = distance(run(), expected_layer(inputs, "silu"))
        assert found <= TOLERANCE[inputs.x.dtype], f"{change}: off by {found:.2e}"
        worst = max(worst, found)
    return worst


@torch.no_grad()
def check_graph(case: Case, device: torch.device) -> float:
    """Captures the operator in a CUDA graph, then replays it after changes in place."""
    inputs = build(case, device)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        layer(inputs)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = layer(inputs)

    def replay() -> Tensor:
        out.fill_(torch.nan)
        graph.replay()
        return out

    return worst_after_changes(inputs, replay)


class LayerModule(nn.Module):
    """The packed layer as a module whose buffers are its weights and pools, as in a lowered model."""

    def __init__(self, inputs: Inputs) -> None:
        super().__init__()
        self.group_size = inputs.gate_up.group_size
        for name, packed in (("gate_up", inputs.gate_up), ("down", inputs.down)):
            for field, tensor in packed.tensors._asdict().items():
                self.register_buffer(f"{name}_{field}", tensor)

    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        """The layer."""
        gate_up, down = (
            [getattr(self, f"{name}_{field}") for field in PackedTensors._fields] for name in ("gate_up", "down")
        )
        out: Tensor = ops.packed_experts(x, ids, weights, gate_up, None, down, None, "silu", self.group_size)
        return out


@torch.no_grad()
def check_compiled(case: Case, device: torch.device) -> float:
    """`torch.compile(mode="reduce-overhead", fullgraph=True)`: replays follow changes, and nothing recompiles."""
    torch._dynamo.reset()
    counters.clear()
    inputs = build(case, device)
    compiled = torch.compile(LayerModule(inputs), mode="reduce-overhead", fullgraph=True)

    def run() -> Tensor:
        torch.compiler.cudagraph_mark_step_begin()
        result: Tensor = compiled(inputs.x, inputs.ids, inputs.weights)
        return result.clone()

    for _ in range(3):
        run()
    with torch.compiler.set_stance("fail_on_recompile"):
        worst = worst_after_changes(inputs, run)
    skipped = counters["inductor"]["cudagraph_skips"]
    assert device.type != "cuda" or not skipped, f"Inductor left CUDA graphs out {skipped} times"
    return worst
