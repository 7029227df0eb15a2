"""What quantizing the first linear of the experts does to the inputs of the second, and how the second makes up for it.

Symbols: `E` experts, `N` output features, `K` input channels of the second linear, `h` its input in the original model,
`ĥ` the same behind the quantized first linear, `g` the routing weight, `R` (token, expert) pairs.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from moe_compiler.kernels import ops
from moe_compiler.kernels.cpu import rows_by_expert
from moe_compiler.kernels.experts import PackedExpertLinear
from moe_compiler.passes.base import NoProgress, Progress, run_passes
from moe_compiler.passes.calibrate import Dataset, batches, dataset_shares
from moe_compiler.passes.capture import MoEBlock, trace_experts
from moe_compiler.passes.graph import MoEGraph
from moe_compiler.passes.hessian import blend_hessians
from moe_compiler.passes.lower import LowerExperts
from moe_compiler.passes.observe import ObserveExperts
from moe_compiler.passes.shadow import shadow


@dataclass(frozen=True, eq=False)
class HiddenMoments:
    """Second moments of the inputs of the experts' second linear, with the first one quantized.

    Attributes:
        hessian: `(E, K, K)` float32, the sum of `g²·ĥ·ĥᵀ`.
        missed: `(E, K, K)` float32, the sum of `g²·(h − ĥ)·ĥᵀ`.
    """

    hessian: Tensor
    missed: Tensor


class HiddenObserver(nn.Module):
    """Sums the moments of `HiddenMoments` over the calls, and returns its first argument.

    Args:
        block: the captured block, its experts still the model's own.
        first: their first linear, packed.
    """

    def __init__(self, block: MoEBlock, first: PackedExpertLinear) -> None:
        super().__init__()
        last = block.spec.projections[-1]
        shape = (block.spec.num_experts, last.in_features, last.in_features)
        self.original = _hidden_graph(block)
        self.quantized = _hidden_graph(block)
        run_passes(self.quantized, [LowerExperts({block.spec.projections[0].name: first})])
        self.moments = HiddenMoments(*(torch.zeros(shape, device=first.planes.device) for _ in range(2)))
        self.share = 1.0

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """Add a batch, every pair times `share`; arguments as of experts."""
        wanted = self.original(hidden_states, top_k_index, top_k_weights)
        given = self.quantized(hidden_states, top_k_index, top_k_weights)
        gate = top_k_weights.reshape(-1, 1).float()
        for expert, rows in rows_by_expert(top_k_index.reshape(-1), self.moments.hessian.shape[0]):
            x = given[rows].float() * gate[rows]
            missed = wanted[rows].float() * gate[rows] - x
            self.moments.hessian[expert].addmm_(x.t(), x, alpha=self.share)
            self.moments.missed[expert].addmm_(missed.t(), x, alpha=self.share)
        return hidden_states


@torch.no_grad()
def hidden_moments(
    model: nn.Module,
    blocks: Mapping[str, MoEBlock],
    first: Mapping[str, PackedExpertLinear],
    datasets: Mapping[str, Dataset],
    *,
    tokens_per_batch: int = 4096,
    progress: Progress | None = None,
) -> dict[str, HiddenMoments]:
    """Run the datasets and compare the inputs of each block's second linear with and without a quantized first one.

    Every dataset weighs the same, as in `moe_compiler.passes.calibrate.collect_hessians`.

    Args:
        model: the model; it is left as it is.
        blocks: a window of its blocks, none of them lowered, small enough for `8·E·K²` bytes each.
        first: by block path, the packed first linear of its experts.
        datasets: samples by dataset.
        tokens_per_batch: upper bound of the tokens in one forward pass.
        progress: shows how far the run is.

    Returns:
        The moments by block path.
    """
    graphs, observers = {}, {}
    for path, block in blocks.items():
        observers[path] = HiddenObserver(block, first[path])
        graphs[path] = MoEGraph(block.graph, copy.deepcopy(block.graph.graph), type(block.graph).__name__)
        run_passes(graphs[path], [ObserveExperts(block.experts_node, observers[path])])
    observed = shadow(model, graphs)
    body = getattr(observed, "base_model", observed)
    device = next(model.parameters()).device
    for name, share in dataset_shares(datasets, dict.fromkeys(datasets, 1.0)).items():
        for observer in observers.values():
            observer.share = share
        tokens = sum(sample.numel() for sample in datasets[name])
        with (progress or NoProgress()).task(f"comparing {name}", tokens, "tokens") as advance:
            for batch in batches(datasets[name], tokens_per_batch):
                body(input_ids=batch.to(device), use_cache=False)
                advance(batch.numel())
    return {path: observer.moments for path, observer in observers.items()}


@torch.no_grad()
def make_up(weight: Tensor, moments: HiddenMoments, count: Tensor, damping: float = 0.05) -> Tensor:
    """Return weights of the second linear that come near to its original outputs from the inputs it will have.

    Ridge regression around the original weights: the `W*` that minimises `Σ g²·‖W·h − W*·ĥ‖² + b·‖W* − W‖²` is
    `W + W·M·(H + b·I)⁻¹`, with `H` and `M` the sums `hessian` and `missed`. Quantizing it under `H` then lowers the
    error against the original outputs (method: the asymmetric target of GPTAQ, arXiv 2504.02692). Our decisions: GPTAQ
    takes the inputs behind all quantized layers, this stays within the experts of a layer, which served new domains
    better; `H` is blended with the layer's pooled Hessian as in `blend_hessians`, and `M` with zero in the same shares,
    so that an expert moves the less the fewer tokens it saw.

    Args:
        weight: `(E, N, K)`, any floating dtype; not modified.
        moments: of the same linear.
        count: `(E,)` tokens routed to each expert.
        damping: `b` as a fraction of the mean of the Hessian's diagonal.

    Returns:
        `(E, N, K)` float32.

    Raises:
        ValueError: `damping` is negative, a shape is wrong, or the moments are not finite.
    """
    if not damping >= 0:
        raise ValueError(f"`damping` must not be negative, got {damping}")
    if moments.missed.shape != moments.hessian.shape:
        raise ValueError(
            f"`moments` must have matrices of one shape, got {tuple(moments.hessian.shape)} and "
            f"{tuple(moments.missed.shape)}"
        )
    if not bool(torch.isfinite(moments.missed).all()):
        raise ValueError("`moments` must be finite, those of the missed inputs hold NaN or infinite values")
    K = weight.shape[-1]
    blended = blend_hessians(moments.hessian, count).hessian
    own = (count / (count + float(K))).to(blended)
    result = weight.detach().float().clone()
    for expert in range(weight.shape[0]):
        ridge = blended[expert].double()
        diagonal = ridge.diagonal()
        diagonal += damping * diagonal.mean()
        change = torch.linalg.solve(ridge, moments.missed[expert].double().t() * own[expert].double())
        result[expert] += result[expert] @ change.t().float()
    return result


def _hidden_graph(block: MoEBlock) -> MoEGraph:
    """The experts' graph up to the input of the last linear, `(R, K)`."""
    graph_module = trace_experts(block.experts, block.spec)
    graph = graph_module.graph
    last = [node for node in graph.nodes if node.target == ops.expert_linear][-1]
    graph.output_node().args = (last.args[0],)
    graph.eliminate_dead_code()
    graph_module.recompile()
    return graph_module
