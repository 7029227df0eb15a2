"""Keeping the input rows of the experts' linears while a model is observed."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.fx import GraphModule

from moe_compiler.kernels import ops
from moe_compiler.passes.base import MoEPass, run_passes
from moe_compiler.passes.calibrate import ObservedModel
from moe_compiler.passes.moments import RowMoments


class RowRecorder(nn.Module):
    """Keeps what one linear is given, in its own dtype, in host memory."""

    def __init__(self, num_experts: int) -> None:
        super().__init__()
        self.num_experts = num_experts
        self.batches: list[tuple[Tensor, Tensor, Tensor]] = []

    def forward(self, x: Tensor, expert_ids: Tensor, gate: Tensor) -> None:
        """Keeps `x` `(T, K)` or `(R, K)`, `expert_ids` `(R,)` and routing weights `(R,)`."""
        kept = x.detach().to("cpu", copy=True), expert_ids.to("cpu", copy=True), gate.float().to("cpu", copy=True)
        self.batches.append(kept)

    def moments(self) -> RowMoments:
        """The second moments of all rows so far, which are handed over: the recorder is empty afterwards."""
        rows, expert_ids, gate = (_joined(parts) for parts in zip(*self.batches, strict=True))
        self.batches.clear()
        return RowMoments(rows, expert_ids, gate, self.num_experts)


def _joined(parts: Sequence[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(list(parts))


class KeepRows(MoEPass):
    """Puts a recorder beside each observer of an observed experts graph.

    Before::

        observe_experts_(hidden_states, expert_ids, routing_weights, ...)

    After::

        rows_0 = self.rows_0(hidden_states, expert_ids, routing_weights)
        observe_experts_(hidden_states, expert_ids, routing_weights, ...)
    """

    def __init__(self, num_experts: int) -> None:
        super().__init__()
        self.num_experts = num_experts
        self.recorders: list[RowRecorder] = []

    def rewrite(self, graph_module: GraphModule) -> int:
        """Inserts the recorders, returns how many."""
        observers = [node for node in graph_module.graph.nodes if node.target == ops.observe_experts_]
        for number, node in enumerate(observers):
            recorder = RowRecorder(self.num_experts)
            self.recorders.append(recorder)
            graph_module.add_submodule(f"rows_{number}", recorder)
            with graph_module.graph.inserting_before(node):
                graph_module.graph.call_module(f"rows_{number}", tuple(node.args[:3]))
        return len(observers)


def keep_rows(observed: ObservedModel) -> dict[str, dict[str, RowRecorder]]:
    """Lets the observers of a model keep the rows they see, beside their sums.

    The rows of one block take `tokens · (H + k·I)` numbers in the model's dtype, in host memory.

    Returns:
        By block path and linear, what keeps them.
    """
    recorders = {}
    for path, observer in observed.observers.items():
        spec = observed.blocks[path].spec
        keep = KeepRows(spec.num_experts)
        assert isinstance(observer, GraphModule)
        run_passes(observer, [keep])
        names = (projection.name for projection in spec.projections)
        recorders[path] = dict(zip(names, keep.recorders, strict=True))
    return recorders
