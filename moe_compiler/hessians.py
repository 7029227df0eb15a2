"""Hessians of the experts' linears, a window of layers at a time, within a bound on memory."""

from __future__ import annotations

import gc
from collections.abc import Iterator, Mapping

from torch import Tensor, nn

from moe_compiler.config import CompileConfig
from moe_compiler.passes.base import Progress
from moe_compiler.passes.calibrate import Dataset, collect_hessians
from moe_compiler.passes.capture import MoEBlock

Hessians = Mapping[str, Tensor]
"""By linear, `(E, K, K)` float32."""


class HessianWindows:
    """The Hessians of the experts' linears, window by window; a window that holds every layer is kept."""

    def __init__(
        self,
        model: nn.Module,
        blocks: Mapping[str, MoEBlock],
        datasets: Mapping[str, Dataset],
        config: CompileConfig,
        progress: Progress,
    ) -> None:
        self.model, self.blocks, self.datasets = model, blocks, datasets
        self.config, self.progress = config, progress
        self._kept: dict[str, dict[str, Tensor]] | None = None

    def windows(self) -> Iterator[dict[str, MoEBlock]]:
        """Consecutive blocks whose Hessians, twice, fit `hessian_memory_bytes`; at least one block each."""
        window: dict[str, MoEBlock] = {}
        used = 0
        for path, block in self.blocks.items():
            need = sum(8 * block.spec.num_experts * p.in_features**2 for p in block.spec.projections)
            if window and used + need > self.config.hessian_memory_bytes:
                yield window
                window, used = {}, 0
            window[path] = block
            used += need
        yield window

    def collect(self, window: dict[str, MoEBlock]) -> Mapping[str, Hessians]:
        """The Hessians of a window's blocks, by block path, every dataset weighing the same."""
        if self._kept is not None:
            return self._kept
        found = collect_hessians(
            self.model,
            window,
            self.datasets,
            dict.fromkeys(self.datasets, 1.0),
            tokens_per_batch=self.config.tokens_per_batch,
            progress=self.progress,
        )
        gc.collect()  # graphs and modules refer to each other: the observers' buffers go only now
        if len(window) == len(self.blocks):
            self._kept = found
        return found

    def forget(self) -> None:
        """Let go of what is kept: the next `collect` runs the datasets again."""
        self._kept = None
