"""The calibration loop: runs datasets through a model with observers and returns what they saw."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from moe_compiler.passes.base import NoProgress, Progress
from moe_compiler.passes.capture import MoEBlock
from moe_compiler.passes.graph import MoEGraph
from moe_compiler.passes.observe import observed_block, read_statistics, reset_statistics
from moe_compiler.passes.shadow import shadow
from moe_compiler.passes.statistics import BlockStatistics

Dataset = Sequence[Tensor]
"""Token ids of one dataset: 1-D int64 tensors, any lengths of at least 2."""


def batches(dataset: Dataset, tokens_per_batch: int) -> Iterator[Tensor]:
    """Yields `(B, S)` batches of samples of one length, in order; no sample is padded, cut or mixed."""
    pending: list[Tensor] = []
    for sample in dataset:
        if pending and (sample.shape != pending[0].shape or (len(pending) + 1) * sample.shape[0] > tokens_per_batch):
            yield torch.stack(pending)
            pending = []
        pending.append(sample)
    if pending:
        yield torch.stack(pending)


@dataclass(frozen=True)
class ObservedModel:
    """A shadow of a model whose MoE blocks are observed.

    Attributes:
        model: the shadow; running it updates the observers.
        observers: by block path, the observer of its experts.
        blocks: by block path, the captured block.
    """

    model: nn.Module
    observers: Mapping[str, MoEGraph]
    blocks: Mapping[str, MoEBlock]

    @classmethod
    def of(cls, model: nn.Module, blocks: Mapping[str, MoEBlock], *, hessian: bool = False) -> ObservedModel:
        """Observes `blocks` of `model`, which itself is left untouched.

        Args:
            model: the model the blocks were captured from.
            blocks: which of its blocks to observe, by path.
            hessian: whether to collect Hessians, `4·E·K²` bytes per linear.
        """
        graphs, observers = {}, {}
        for path, block in blocks.items():
            graphs[path], observers[path] = observed_block(block, hessian=hessian)
        return cls(shadow(model, graphs), observers, dict(blocks))

    @torch.no_grad()
    def observe(
        self,
        dataset: Dataset,
        *,
        name: str = "data",
        token_weights: Tensor | None = None,
        tokens_per_batch: int = 4096,
        progress: Progress | None = None,
    ) -> dict[str, BlockStatistics]:
        """Runs one dataset and returns the statistics of each block, from zero.

        Hessians are the observers' own buffers: the next call overwrites them.

        Args:
            dataset: samples of token ids.
            name: what to call the dataset in messages.
            token_weights: `(V,)`, the weight `w` of each token of the vocabulary; 1 for all if `None`.
            tokens_per_batch: upper bound of the tokens in one forward pass.
            progress: shows how far the run is.

        Raises:
            FloatingPointError: an activation was NaN or infinite; names the block and the dataset.
            RuntimeError: a block was not called at all.
        """
        for observer in self.observers.values():
            reset_statistics(observer)
        device = next(self.model.parameters()).device
        tokens = sum(sample.numel() for sample in dataset)
        body = getattr(self.model, "base_model", self.model)  # the language-model head is of no interest here
        with (progress or NoProgress()).task(f"observing {name}", tokens, "tokens") as advance:
            for batch in batches(dataset, tokens_per_batch):
                if token_weights is not None:
                    self._weigh(token_weights[batch.reshape(-1)].double().to(device))
                body(input_ids=batch.to(device), use_cache=False)
                advance(batch.numel())
        self._weigh(torch.ones(1, dtype=torch.float64, device=device))
        seen = {path: read_statistics(observer, self.blocks[path].spec) for path, observer in self.observers.items()}
        for path, statistics in seen.items():
            for linear, sums in statistics.linears.items():
                if not bool(torch.isfinite(sums.sq_sum).all()):
                    raise FloatingPointError(
                        f"activations must be finite, but the inputs of `{linear}` in MoE block `{path}` held NaN "
                        f"or infinity on dataset {name!r}: check the model's weights and dtype"
                    )
        return seen

    def _weigh(self, token_weight: Tensor) -> None:
        for observer in self.observers.values():
            observer.token_weight = token_weight


def observe_datasets(
    model: nn.Module,
    blocks: Mapping[str, MoEBlock],
    datasets: Mapping[str, Dataset],
    *,
    token_weights: Mapping[str, Tensor] | None = None,
    tokens_per_batch: int = 4096,
    progress: Progress | None = None,
) -> dict[str, dict[str, BlockStatistics]]:
    """Statistics of every block on every dataset: block path to dataset to `BlockStatistics`.

    One forward pass over each dataset for all blocks together; no Hessians (see `collect_hessians`).
    """
    observed = ObservedModel.of(model, blocks)
    result: dict[str, dict[str, BlockStatistics]] = {path: {} for path in blocks}
    for name, dataset in datasets.items():
        seen = observed.observe(
            dataset,
            name=name,
            token_weights=None if token_weights is None else token_weights[name],
            tokens_per_batch=tokens_per_batch,
            progress=progress,
        )
        for path, statistics in seen.items():
            result[path][name] = statistics
    return result


def dataset_shares(datasets: Mapping[str, Dataset], weights: Mapping[str, float]) -> dict[str, float]:
    """What each token of a dataset counts, `ω_d·n·T / T_d`: `ω` sums to 1, `T` is the mean of the `n` numbers `T_d`."""
    tokens = {name: sum(sample.numel() for sample in dataset) for name, dataset in datasets.items()}
    per_weight = sum(tokens.values()) / sum(weights.values())
    return {name: weights[name] * per_weight / count for name, count in tokens.items()}


def collect_hessians(
    model: nn.Module,
    blocks: Mapping[str, MoEBlock],
    datasets: Mapping[str, Dataset],
    weights: Mapping[str, float],
    *,
    tokens_per_batch: int = 4096,
    progress: Progress | None = None,
) -> dict[str, dict[str, Tensor]]:
    """The Hessians of the experts' linears in `blocks`, blended over datasets.

    `H_e = Σ_d ω_d · (Σ g² x xᵀ)_d · (T / T_d)`, with `T` the mean number of tokens of a dataset, so that a larger
    dataset does not count for more than its weight says and the size stays that of a sum over tokens.

    Args:
        model: the model.
        blocks: a window of its blocks, small enough for two Hessians each of `4·E·K²` bytes per linear.
        datasets: samples by dataset.
        weights: `ω` by dataset; normalised to sum to 1.
        tokens_per_batch: upper bound of the tokens in one forward pass.
        progress: shows how far the run is.

    Returns:
        Block path to linear to `(E, K, K)` float32.
    """
    observed = ObservedModel.of(model, blocks, hessian=True)
    total: dict[str, dict[str, Tensor]] = {}
    for name, share in dataset_shares(datasets, weights).items():
        if share == 0:
            continue
        seen = observed.observe(datasets[name], name=name, tokens_per_batch=tokens_per_batch, progress=progress)
        for path, statistics in seen.items():
            sums = total.setdefault(path, {})
            for linear, values in statistics.linears.items():
                assert values.hessian is not None
                if linear in sums:
                    sums[linear].add_(values.hessian, alpha=share)
                else:
                    sums[linear] = values.hessian * share
    return total
