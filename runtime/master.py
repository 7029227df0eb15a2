"""Masters: where a linear's original weights come from after it was quantized, so that they can be restored later."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from moe_compiler.kernels.experts import PackedExpertLinear
from moe_compiler.runtime.checkpoint import CheckpointWeight

_DETACHED = "a saved model does not hold the original weights: call `model.runtime.attach_master` with their model"


@dataclass(frozen=True, eq=False)
class LinearMaster(ABC):
    """The original weights `W` of one linear, `(E, N, K)`, or some of their columns, in host memory or on disk.

    Attributes:
        error: `(E, K)` float32, `‖W[:, c] − Ŵ[:, c]‖²`: the squared error of each channel of the quantized base.
        column_norm: `(E, K)` float32, `‖W[:, c]‖`.
    """

    error: Tensor
    column_norm: Tensor

    def __deepcopy__(self, memo: dict[int, Any]) -> LinearMaster:
        """The same object: nothing writes a master's tensors, so that copies of a model share them."""
        return self

    @property
    def places(self) -> Tensor:
        """`e · K + c` of each channel whose original column can be had, int64, ascending: `0 .. E·K − 1`."""
        return torch.arange(self.error.numel())

    @abstractmethod
    def columns(self, places: Tensor) -> Tensor:
        """Original columns, `(S, N)` float32.

        Args:
            places: `(S,)` int64, `e · K + c`.

        Raises:
            RuntimeError: the master does not have one of them.
        """

    @abstractmethod
    def weight(self, expert: int) -> Tensor:
        """The whole original weight of one expert, `(N, K)`, in the model's own precision.

        Raises:
            ValueError: the master keeps single columns only, see `whole`.
        """

    @property
    def whole(self) -> bool:
        """Whether whole weights can be had, once they are attached."""
        return True

    @property
    @abstractmethod
    def dtype(self) -> torch.dtype:
        """The model's own precision."""

    @property
    def _held(self) -> tuple[Tensor, ...]:
        """The tensors of original weights that are held in memory."""
        return ()

    @property
    def kept_error(self) -> Tensor:
        """`error` where the original column can be had, 0 elsewhere, `(E, K)`."""
        if self.whole:
            return self.error
        kept = torch.zeros_like(self.error)
        kept.view(-1)[self.places] = self.error.view(-1)[self.places]
        return kept

    @property
    def size_bytes(self) -> int:
        """Host memory that the master takes."""
        return sum(t.numel() * t.element_size() for t in (self.error, self.column_norm, *self._held))


@dataclass(frozen=True, eq=False)
class CacheMaster(LinearMaster):
    """A stated share of the original columns, in host memory.

    Attributes:
        kept_places: `(M,)` int64, `e · K + c` of each original column that is kept, ascending.
        kept_columns: `(M, N)`, the columns in the model's own precision.
    """

    kept_places: Tensor
    kept_columns: Tensor

    @classmethod
    def of(cls, weight: Tensor, error: Tensor, first: Tensor, fraction: float) -> CacheMaster:
        """Keeps the original columns that a later correction most likely wants.

        Beside those in `first` these are the channels with the largest error `‖W[:, c] − Ŵ[:, c]‖²`, whatever passed
        them during calibration. Our decision: other data use other experts and channels, and of the rankings tried on
        the embedded model (by error, by error times the calibration data's energy or its mean over experts) this one
        kept most of what new data needed.

        Args:
            weight: `(E, N, K)`, the original weight.
            error: `(E, K)`, see `channel_error`.
            first: places `e · K + c` of channels that are kept in any case, such as those in the pool.
            fraction: the share of the `E·K` columns to keep.
        """
        score = error.view(-1).clone()
        score[first] = torch.inf
        best = torch.topk(score, max(first.numel(), round(fraction * score.numel()))).indices.sort().values
        return cls(error, column_norm(weight), best, original_columns(weight, best).cpu())

    @property
    def places(self) -> Tensor:
        """`e · K + c` of each original column that is kept, int64, ascending."""
        return self.kept_places

    @property
    def whole(self) -> bool:
        """Whether whole weights can be had: never."""
        return False

    @property
    def dtype(self) -> torch.dtype:
        """The model's own precision."""
        return self.kept_columns.dtype

    @property
    def _held(self) -> tuple[Tensor, ...]:
        return self.kept_places, self.kept_columns

    def columns(self, places: Tensor) -> Tensor:
        """Original columns, `(S, N)` float32; see `LinearMaster.columns`."""
        if not places.numel():
            return torch.empty(0, self.kept_columns.shape[1])
        at = torch.searchsorted(self.kept_places, places).clamp(max=max(self.kept_places.numel() - 1, 0))
        if not self.kept_places.numel() or not torch.equal(self.kept_places[at], places):
            raise RuntimeError(
                "the channel pool holds channels that are not in the master: the model's state was loaded from another "
                "compilation; load it into a model that was compiled in the same way"
            )
        return self.kept_columns[at].float()

    def weight(self, expert: int) -> Tensor:
        """Refused: only some columns are kept."""
        raise ValueError(
            f"the master keeps single columns, not the whole weight of expert {expert}: "
            "compile with `master` 'memory' or 'checkpoint'"
        )


@dataclass(frozen=True, eq=False)
class MemoryMaster(LinearMaster):
    """All original weights, in host memory; shared with the model's own where those were there.

    Attributes:
        original: `(E, N, K)` in the model's own precision.
    """

    original: Tensor

    @classmethod
    def of(cls, weight: Tensor, error: Tensor) -> MemoryMaster:
        """Keeps `weight` `(E, N, K)`, whose channels the base is wrong about by `error` `(E, K)`."""
        return cls(error, column_norm(weight), weight.detach().cpu())

    @property
    def dtype(self) -> torch.dtype:
        """The model's own precision."""
        return self.original.dtype

    @property
    def _held(self) -> tuple[Tensor, ...]:
        return (self.original,)

    def columns(self, places: Tensor) -> Tensor:
        """Original columns, `(S, N)` float32."""
        return original_columns(self.original, places).float()

    def weight(self, expert: int) -> Tensor:
        """The whole original weight of one expert, `(N, K)`, by reference."""
        return self.original[expert]


@dataclass(frozen=True, eq=False)
class CheckpointMaster(LinearMaster):
    """All original weights, read when they are needed, one expert at a time, from the files the model came from.

    A column lies scattered over its whole matrix, so that reading one costs as much as reading the matrix.

    Attributes:
        source: where the weight is in the files.
    """

    source: CheckpointWeight

    @classmethod
    def of(cls, weight: Tensor, error: Tensor, source: CheckpointWeight) -> CheckpointMaster:
        """Keeps where `weight` `(E, N, K)` is in the files; nothing but `error` and norms stays in memory."""
        return cls(error, column_norm(weight), source)

    @property
    def dtype(self) -> torch.dtype:
        """The model's own precision."""
        return self.source.dtype

    def columns(self, places: Tensor) -> Tensor:
        """Original columns, `(S, N)` float32.

        Raises:
            RuntimeError: a file has changed or gone, see `CheckpointWeight.read`.
        """
        channels = self.error.shape[1]
        experts = places // channels
        columns = torch.empty(places.shape[0], self.source.out_features)
        for expert in experts.unique().tolist():
            mine = (experts == expert).nonzero().squeeze(1)
            columns[mine] = self.weight(expert)[:, places[mine] % channels].t().float()
        return columns

    def weight(self, expert: int) -> Tensor:
        """The whole original weight of one expert, `(N, K)`, in the model's own precision.

        Raises:
            RuntimeError: a file has changed or gone, see `CheckpointWeight.read`.
        """
        return self.source.read(expert)


@dataclass(frozen=True, eq=False)
class DetachedMaster(LinearMaster):
    """What is left of a master of whole weights in a saved model: what they were like, not where they are.

    Attributes:
        original_dtype: the model's own precision.
    """

    original_dtype: torch.dtype

    @property
    def dtype(self) -> torch.dtype:
        """The model's own precision."""
        return self.original_dtype

    def columns(self, places: Tensor) -> Tensor:
        """Refused: the weights are not attached."""
        raise RuntimeError(_DETACHED)

    def weight(self, expert: int) -> Tensor:
        """Refused: the weights are not attached."""
        raise RuntimeError(_DETACHED)


def channel_error(weight: Tensor, packed: PackedExpertLinear) -> Tensor:
    """`‖W[:, c] − Ŵ[:, c]‖²` of every channel of the quantized base, `(E, K)` float32 on the host."""
    error = torch.empty(weight.shape[0], weight.shape[2])
    for expert in range(weight.shape[0]):
        difference = weight[expert].float() - packed.dequantize_expert(expert)
        error[expert] = difference.square().sum(dim=0).cpu()
    return error


def column_norm(weight: Tensor) -> Tensor:
    """`‖W[:, c]‖` of every channel of `(E, N, K)`, `(E, K)` float32 on the host."""
    norm: Tensor = torch.linalg.vector_norm(weight, dim=1, dtype=torch.float32)
    return norm.cpu()


def original_columns(weight: Tensor, places: Tensor) -> Tensor:
    """Columns of `(E, N, K)` at `e · K + c`, `(S, N)`."""
    places = places.to(weight.device)
    return weight[places // weight.shape[2], :, places % weight.shape[2]]
