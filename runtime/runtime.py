"""`model.runtime`: adapting a compiled model to new data, in place, while it serves."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from moe_compiler.kernels.experts import PackedExpertLinear
from moe_compiler.kernels.pool import ChannelPool
from moe_compiler.passes.base import Progress
from moe_compiler.passes.calibrate import Dataset, ObservedModel
from moe_compiler.runtime.adaptation import RULES, RuntimeLayer, choose_layer
from moe_compiler.runtime.report import AdaptReport

CALIBRATION = "calibration"

Pools = Mapping[tuple[str, str], ChannelPool]
"""Pool contents by MoE block path and linear."""


class Runtime:
    """Adapts a compiled model to new data and takes it back.

    All that changes is the contents of the channel pools' buffers; shapes, dtypes, strides and addresses stay, so a
    compiled graph of the model keeps running and follows the change without a recompilation.

    Attributes:
        layers: what is known of each lowered MoE block, by path.
        active: the name of the contents in the pools: `"calibration"` or that of the last adaptation.
    """

    def __init__(
        self,
        model: nn.Module,
        layers: Mapping[str, RuntimeLayer],
        *,
        rule: str,
        widths: Sequence[int],
        tokens_per_batch: int,
        load: Callable[..., Dataset],
        progress: Progress | None = None,
    ) -> None:
        self.model = model
        self.layers = dict(layers)
        self.rule = rule
        self.widths = tuple(widths)
        self.tokens_per_batch = tokens_per_batch
        self.active = CALIBRATION
        self._load = load
        self._progress = progress
        self._calibration = {key: packed.pool.clone() for key, packed in self._packed().items()}

    @torch.no_grad()
    def adapt(
        self, samples: Any, *, rule: str | None = None, name: str = "adapted", tokenizer: Any = None
    ) -> AdaptReport:
        """Fills the channel pools for new data, in place.

        The samples run once through the quantized model (through a second model object over the same tensors, so the
        serving model and what was compiled from it are not touched); the new contents are computed aside and checked,
        and only then copied into the pools. If anything fails, the pools keep what they had.

        Args:
            samples: the new data: texts, token ids or a `datasets.Dataset`, a few thousand tokens.
            rule: `"restore"`: restore the channels with the largest expected error on the new data; `"cluster"`: the
                paper's rule, requantize cached channels to the width of their expert's new cluster, up or down; it may
                leave a larger error than it found, which the report shows. The default was chosen at compile time.
                Both can only draw on the columns that the master keeps.
            name: what to call the adaptation.
            tokenizer: needed where `samples` is text and none was given to `dynamo_compile`.

        Returns:
            What changed, per layer, and the time of each step.

        Raises:
            ValueError: unknown rule, or bad samples (see `moe_compiler.data.load_samples`).
            FloatingPointError: activations or new contents were not finite.
        """
        rule = self.rule if rule is None else rule
        if rule not in RULES:
            raise ValueError(f"`rule` must be one of {', '.join(map(repr, RULES))}, but is {rule!r}")
        if not isinstance(name, str) or not name:
            raise ValueError(f"`name` must be a text that is not empty, but is {name!r}")
        dataset = self._load(samples, name=name, tokenizer=tokenizer)
        start = time.perf_counter()
        blocks = {path: layer.block for path, layer in self.layers.items()}
        observed = ObservedModel.of(self.model, blocks)
        seen = observed.observe(dataset, name=name, tokens_per_batch=self.tokens_per_batch, progress=self._progress)
        observed_at = time.perf_counter()
        pools: dict[tuple[str, str], ChannelPool] = {}
        changes = []
        for path, layer in self.layers.items():
            contents, change = choose_layer(layer, seen[path], rule, name, self.widths)
            pools |= {(path, linear): pool for linear, pool in contents.items()}
            changes.append(change)
        chosen_at = time.perf_counter()
        self._swap(pools, name)
        return AdaptReport(
            name=name,
            rule=rule,
            tokens=sum(sample.numel() for sample in dataset),
            layers=tuple(changes),
            seconds={
                "observe": observed_at - start,
                "choose": chosen_at - observed_at,
                "swap": time.perf_counter() - chosen_at,
            },
        )

    def revert(self) -> None:
        """Puts the contents back that the pools had when the model was compiled, bit for bit."""
        self._swap(self._calibration, CALIBRATION)

    def _packed(self) -> dict[tuple[str, str], PackedExpertLinear]:
        return {
            (path, name): packed
            for path, layer in self.layers.items()
            for name, packed in layer.experts.all_packed().items()
        }

    @torch.no_grad()
    def _swap(self, pools: Pools, name: str) -> None:
        for key, packed in self._packed().items():
            packed.pool.copy_(pools[key])
        self.active = name
