"""Router calibration: routers refitted so that the quantized model routes its tokens as the original did.

Quantized experts shift what the routers of later layers see, and with it the choice of experts (EAC-MoE, arXiv
2508.01625, calibrates routers against that). A router is one linear map, so the refit is a ridge regression: no bits,
no gradient steps.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from moe_compiler.passes.calibrate import Dataset
from moe_compiler.passes.capture import MoEBlock

RIDGE = 1e-3
"""Of the mean of the diagonal of the inputs' second moments: what keeps a refitted router near the original."""


@dataclass(frozen=True)
class RouterChange:
    """How far a router's logits were from the original's on the calibration tokens, root mean square, in logits."""

    before: float
    after: float


class RouterCalibration:
    """What the routers of a model were given before its experts were quantized, to refit them afterwards.

    Args:
        model: the model, not yet quantized. It is run once on at most `max_tokens` tokens.
        blocks: its captured blocks, by path.
        datasets: samples by dataset; every dataset gives as many tokens as far as it has them.
        max_tokens: of all datasets together, in one batch. Memory: `2·T·H` bytes per block in a 16-bit model.
    """

    @torch.no_grad()
    def __init__(
        self, model: nn.Module, blocks: Mapping[str, MoEBlock], datasets: Mapping[str, Dataset], max_tokens: int
    ) -> None:
        self.model = model
        self.routers = {path: router for path, block in blocks.items() if (router := find_router(block)) is not None}
        self.batch = mixed_batch(datasets, max_tokens)
        self._inputs: dict[str, Tensor] = {}
        with self._before_routers(self._record):
            self._run()

    @torch.no_grad()
    def refit(self) -> dict[str, RouterChange]:
        """Refit every router in place, in the order in which the model calls them.

        Each is fitted to the inputs that reach it through the quantized layers and refitted routers before it:
        `W ← argmin ‖X_q·Wᵀ − X·W₀ᵀ‖² + r·‖W − W₀‖²` with `X` the original's inputs and `X_q` the quantized model's
        on the same tokens (method: ridge regression, `RIDGE`; our decision).

        Returns:
            By block path, the distance of the logits before and after.

        Raises:
            FloatingPointError: a router's input is not finite; the routers before it are refitted already.
        """
        changes: dict[str, RouterChange] = {}

        def fit(path: str, router: nn.Module, rows: Tensor) -> None:
            changes[path] = fit_router(router, self._inputs[path].to(rows.device), rows, path)

        with self._before_routers(fit):
            self._run()
        return changes

    def _record(self, path: str, router: nn.Module, rows: Tensor) -> None:
        self._inputs[path] = rows.clone()

    def _run(self) -> None:
        body = getattr(self.model, "base_model", self.model)
        body(input_ids=self.batch.to(next(self.model.parameters()).device), use_cache=False)

    @contextmanager
    def _before_routers(self, call: Any) -> Iterator[None]:
        """Calls `call(path, router, rows)` before each router runs."""
        handles = []
        try:
            for path, router in self.routers.items():

                def hook(
                    module: nn.Module, arguments: tuple[Any, ...], keywords: dict[str, Any], path: str = path
                ) -> None:
                    given = next(value for value in (*arguments, *keywords.values()) if isinstance(value, Tensor))
                    call(path, module, given.detach().flatten(0, -2))

                handles.append(router.register_forward_pre_hook(hook, with_kwargs=True))
            yield
        finally:
            for handle in handles:
                handle.remove()


def find_router(block: MoEBlock) -> nn.Module | None:
    """The module of a block whose `weight` `(E, H)` gives the routing logits, or `None` where that is not clear."""
    found = []
    experts = block.experts_target
    for name, module in block.graph.named_modules():
        if name == experts or name.startswith(f"{experts}."):
            continue
        weight = module._parameters.get("weight")
        if weight is not None and weight.dim() == 2 and weight.shape[0] == block.spec.num_experts:
            found.append(module)
    return found[0] if len(found) == 1 else None


def mixed_batch(datasets: Mapping[str, Dataset], max_tokens: int) -> Tensor:
    """Samples of the most frequent length, from all datasets in turn, `(B, S)` with at most `max_tokens` tokens.

    At least one sample is taken.
    """
    lengths = Counter(sample.shape[0] for dataset in datasets.values() for sample in dataset)
    length = max(lengths, key=lambda one: (lengths[one] * one, one))
    fitting = [[sample for sample in dataset if sample.shape[0] == length] for dataset in datasets.values()]
    turns = itertools.chain.from_iterable(itertools.zip_longest(*fitting))
    samples = [sample for sample in turns if sample is not None]
    return torch.stack(samples[: max(1, max_tokens // length)])


def fit_router(router: nn.Module, original: Tensor, rows: Tensor, path: str) -> RouterChange:
    """Refit one router in place, see `RouterCalibration.refit`.

    Args:
        router: its `weight` is `(E, H)`.
        original: `(T, H)`, what it was given in the original model.
        rows: `(T, H)`, what it is given now, for the same tokens.
        path: of the block, for messages.

    Raises:
        FloatingPointError: an input is not finite.
    """
    weight = router.get_parameter("weight")
    given, before = rows.double(), weight.double()
    wanted = original.double() @ before.T
    if not bool(torch.isfinite(given.sum())) or not bool(torch.isfinite(wanted.sum())):
        raise FloatingPointError(
            f"the inputs of the router in MoE block `{path}` must be finite, but hold NaN or infinity"
        )
    missed = wanted - given @ before.T
    moments = given.T @ given
    moments.diagonal().add_(RIDGE * moments.diagonal().mean().clamp(min=1e-30))
    after = (before + torch.linalg.solve(moments, given.T @ missed).T).to(weight.dtype)
    left = wanted - given @ after.double().T
    if float(left.square().mean()) < float(missed.square().mean()):
        weight.copy_(after)
    else:
        left = missed
    return RouterChange(float(missed.square().mean().sqrt()), float(left.square().mean().sqrt()))
