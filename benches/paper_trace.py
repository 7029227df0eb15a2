"""Which tokens go to which experts of the original model: MoQa's data-model mapping (arXiv 2503.21135v1, 3.2)."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from scipy.stats import spearmanr
from torch import Tensor, nn

from moe_compiler.passes.calibrate import batches
from moe_compiler.passes.capture import capture_moe_blocks
from moe_compiler.passes.significance import token_weights

TOKENS_PER_BATCH = 4096


@dataclass(frozen=True, eq=False)
class DatasetTrace:
    """One MoE block on one data set.

    Attributes:
        rate: `(E,)` float64, the share of the tokens that the expert is given.
        significance: `(E,)` float64, MoQa's `S_E`: the same with the tokens' weights (eq. 5).
        ranks: by expert, the rank of each token that it was given, 1 for the most frequent of the data set.
    """

    rate: Tensor
    significance: Tensor
    ranks: Sequence[Tensor]

    @property
    def rank_correlation(self) -> float:
        """Spearman's, between the activation rate and the median rank of an expert's tokens; 0 where there is none."""
        used = [expert for expert, ranks in enumerate(self.ranks) if ranks.numel()]
        rates = [float(self.rate[expert]) for expert in used]
        medians = [float(self.ranks[expert].double().median()) for expert in used]
        return float(spearmanr(rates, medians).statistic) if min(len(set(rates)), len(set(medians))) > 1 else 0.0


@dataclass(frozen=True, eq=False)
class Traces:
    """One data set.

    Attributes:
        layers: by path of the MoE block.
    """

    layers: Mapping[str, DatasetTrace]


@torch.no_grad()
def trace(model: Any, datasets: Mapping[str, Sequence[Tensor]], alpha: float = 0.3) -> dict[str, Traces]:
    """Runs the data sets through a copy of the model and notes the experts of every token.

    Args:
        model: the original; it stays as it is.
        datasets: windows of token ids by name.
        alpha: exponent of the tokens' weights (eq. 2).

    Raises:
        ValueError: the model has no MoE block that can be captured.
    """
    copied = copy.deepcopy(model)
    device = next(copied.parameters()).device
    first = next(iter(datasets.values()))[0]
    blocks = capture_moe_blocks(copied, first[None, :8].to(device))
    found = {}
    for name, windows in datasets.items():
        chosen: dict[str, list[Tensor]] = {path: [] for path in blocks}
        with ExitStack() as hooks:
            for path, block in blocks.items():
                hooks.callback(block.experts.register_forward_pre_hook(_note(chosen[path]), with_kwargs=True).remove)
            for batch in batches(windows, TOKENS_PER_BATCH):
                copied(input_ids=batch.to(device), use_cache=False)
        tokens = torch.cat([batch.reshape(-1) for batch in batches(windows, TOKENS_PER_BATCH)])
        found[name] = Traces(
            {
                path: _trace(tokens, torch.cat(chosen[path]), block.spec.num_experts, alpha)
                for path, block in blocks.items()
            }
        )
    return found


def _note(chosen: list[Tensor]) -> Any:
    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        chosen.append((kwargs["top_k_index"] if "top_k_index" in kwargs else args[1]).cpu())

    return hook


def _trace(tokens: Tensor, experts: Tensor, num_experts: int, alpha: float) -> DatasetTrace:
    """From the tokens `(T,)` and their experts `(T, k)`."""
    counts = torch.bincount(tokens)
    rank = torch.empty_like(counts)
    rank[counts.argsort(descending=True, stable=True)] = torch.arange(1, len(counts) + 1)
    weight = token_weights(counts, alpha)[tokens]
    flat = experts.reshape(-1).long()
    repeated = weight.repeat_interleave(experts.shape[1])
    mass = torch.zeros(num_experts, dtype=torch.float64).index_add_(0, flat, repeated)
    given = tokens.repeat_interleave(experts.shape[1])
    return DatasetTrace(
        rate=torch.bincount(flat, minlength=num_experts).double() / len(tokens),
        significance=mass / weight.sum(),
        ranks=[rank[given[flat == expert]] for expert in range(num_experts)],
    )
