"""Reading original expert weights from the safetensors files a model was loaded from, one expert at a time.

Files name experts in many ways: stacked under the module's own name, stacked and transposed, one tensor per expert and
linear, `w1` or `gate_proj`. Nothing is assumed about which: of the tensors that have the right shape and the layer's
number the ones are taken that agree with the weights in memory, bit for bit.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import try_to_load_from_cache
from torch import Tensor, nn

from moe_compiler.passes.module_list import LINEAR_NAMES

_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_INDEX, _SINGLE = "model.safetensors.index.json", "model.safetensors"
_PER_EXPERT = re.compile(r"(?P<experts>.+)\.(?P<expert>\d+)\.(?P<linear>[^.]+)\.weight")
_ADVICE = "use `master` 'memory', which keeps the original weights in host memory"


@dataclass(frozen=True)
class StoredFile:
    """A file as it was when the model was compiled.

    Attributes:
        path: where it is.
        size: its bytes.
        modified: its modification time in nanoseconds.
    """

    path: Path
    size: int
    modified: int

    @classmethod
    def of(cls, path: Path) -> StoredFile:
        """The file as it is now."""
        status = path.stat()
        return cls(path, status.st_size, status.st_mtime_ns)

    def read(self, start: int, length: int) -> bytearray:
        """Bytes of the file.

        Raises:
            RuntimeError: it cannot be read, or is not the file that it was.
        """
        try:
            if StoredFile.of(self.path) != self:
                raise RuntimeError(
                    f"{self.path} has changed since the model was compiled, so its original weights cannot be read: "
                    "put the file back or compile the model again"
                )
            content = bytearray(length)
            with self.path.open("rb") as file:
                file.seek(start)
                read = file.readinto(content)
        except OSError as error:
            raise RuntimeError(
                f"{self.path}, which holds the model's original weights, cannot be read: {error.strerror}"
            ) from error
        if read != length:
            raise RuntimeError(f"{self.path} is shorter than its header says: {read} of {length} bytes at {start}")
        return content


@dataclass(frozen=True)
class StoredTensor:
    """A tensor in a safetensors file.

    Attributes:
        file: the file.
        start: its first byte.
        dtype: its dtype.
        shape: its shape.
    """

    file: StoredFile
    start: int
    dtype: torch.dtype
    shape: tuple[int, ...]

    def __getitem__(self, index: int) -> StoredTensor:
        """The part of the tensor at `index` of its first dimension."""
        shape = self.shape[1:]
        return replace(self, start=self.start + index * prod(shape) * self.dtype.itemsize, shape=shape)

    def read(self) -> Tensor:
        """The tensor, on the host; see `StoredFile.read`."""
        content = self.file.read(self.start, prod(self.shape) * self.dtype.itemsize)
        return torch.frombuffer(content, dtype=self.dtype).view(self.shape)


@dataclass(frozen=True)
class CheckpointWeight:
    """Where the weights of one linear of all experts are.

    Attributes:
        experts: by expert, the tensors whose rows, one below the other, are its weight.
        is_transposed: whether they are stored `(K, N)`.
        dtype: the dtype of the weights in the model.
        out_features: `N`.
    """

    experts: tuple[tuple[StoredTensor, ...], ...]
    is_transposed: bool
    dtype: torch.dtype
    out_features: int

    def read(self, expert: int) -> Tensor:
        """The weight of one expert, `(N, K)` in the model's dtype, on the host.

        Raises:
            RuntimeError: a file cannot be read, or is not the file that it was.
        """
        weight = torch.cat([part.read() for part in self.experts[expert]]).to(self.dtype)
        return weight.t() if self.is_transposed else weight

    def agrees(self, weight: Tensor) -> bool:
        """Whether every expert is that of `weight` `(E, N, K)`, bit for bit; reads until one differs."""
        return all(torch.equal(self.read(expert), weight[expert].cpu()) for expert in range(weight.shape[0]))


@dataclass(frozen=True)
class Checkpoint:
    """The safetensors files of a model.

    Attributes:
        folder: where they are.
        tensors: what they hold, by name; only floating-point tensors.
    """

    folder: Path
    tensors: Mapping[str, StoredTensor]

    @classmethod
    def of(cls, model: nn.Module) -> Checkpoint:
        """The files that `model` was loaded from: its folder, or the local cache of the Hugging Face hub.

        Raises:
            ValueError: there are none, or they cannot be read.
        """
        config: Any = getattr(model, "config", None)
        name = str(getattr(model, "name_or_path", "") or getattr(config, "_name_or_path", "") or "")
        try:
            return cls.named(name, getattr(config, "_commit_hash", None))
        except ValueError as error:
            raise ValueError(f"{error}: {_ADVICE}") from error

    @classmethod
    def named(cls, name: str, revision: str | None = None) -> Checkpoint:
        """The files of a model in a folder, or of a model of the hub in the local cache; nothing is downloaded.

        Args:
            name: the folder, or the name of the hub's repository.
            revision: of the repository, a branch or a commit; that of `main` if `None`.

        Raises:
            ValueError: there are none, or they cannot be read.
        """
        folder = _folder(name, revision)
        names = [_SINGLE]
        try:
            if (folder / _INDEX).is_file():
                names = sorted(set(json.loads((folder / _INDEX).read_text())["weight_map"].values()))
            tensors: dict[str, StoredTensor] = {}
            for name in names:
                tensors |= _read_header(folder / name)
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RuntimeError) as error:
            raise ValueError(f"the safetensors files in {folder} cannot be read ({error})") from error
        return cls(folder, tensors)

    def find(self, path: str, name: str, weight: Tensor) -> CheckpointWeight:
        """Where the weights of one linear are.

        Args:
            path: module path of the experts.
            name: the linear: `"gate_up_proj"`, `"up_proj"` or `"down_proj"`.
            weight: `(E, N, K)`, as they are in memory.

        Raises:
            ValueError: no tensors agree with `weight`.
        """
        found = self.match(path, name, tuple(weight.shape), weight.dtype, lambda one: one.agrees(weight))
        if found is None:
            raise ValueError(
                f"no tensor in {self.folder} agrees with the weights of `{path}.{name}` in memory, "
                f"{tuple(weight.shape)} {weight.dtype}: the model's weights are not those of the files, or the files "
                f"have a form that is not known; {_ADVICE}"
            )
        return found

    def match(
        self,
        path: str,
        name: str,
        shape: tuple[int, ...],
        dtype: torch.dtype,
        agrees: Callable[[CheckpointWeight], bool],
    ) -> CheckpointWeight | None:
        """The first of the tensors that may be the weights of one linear, by shape and name, for which `agrees` holds.

        Args:
            path: module path of the experts.
            name: the linear: `"gate_up_proj"`, `"up_proj"` or `"down_proj"`.
            shape: `(E, N, K)`.
            dtype: what to convert the weights to.
            agrees: says whether these are the weights.
        """
        return next((one for one in self._candidates(path, name, shape, dtype) if agrees(one)), None)

    def _candidates(
        self, path: str, name: str, shape: tuple[int, ...], dtype: torch.dtype
    ) -> Iterator[CheckpointWeight]:
        """What may be the weights, by shape and by the numbers in its name."""
        numbers = _numbers(path)
        experts, rows, columns = shape
        for key, tensor in self.tensors.items():
            if _numbers(key) != numbers:
                continue
            for is_transposed, wanted in ((False, shape), (True, (experts, columns, rows))):
                if tensor.shape == wanted:
                    stacked = tuple((tensor[expert],) for expert in range(experts))
                    yield CheckpointWeight(stacked, is_transposed, dtype, rows)
        single: dict[str, dict[tuple[int, str], StoredTensor]] = {}
        for key, tensor in self.tensors.items():
            match = _PER_EXPERT.fullmatch(key)
            if match and _numbers(match["experts"]) == numbers:
                single.setdefault(match["experts"], {})[int(match["expert"]), match["linear"]] = tensor
        for found in single.values():
            for gate, up, down in LINEAR_NAMES:
                linears = {"gate_up_proj": (gate, up), "up_proj": (up,), "down_proj": (down,)}[name]
                if not all((expert, linear) in found for expert in range(experts) for linear in linears):
                    continue
                parts = tuple(tuple(found[expert, linear] for linear in linears) for expert in range(experts))
                wanted = (rows // len(linears), columns)
                if all(part.shape == wanted for expert in parts for part in expert):
                    yield CheckpointWeight(parts, False, dtype, rows)


def _folder(name: str, revision: str | None) -> Path:
    """The folder that a name stands for."""
    if name and Path(name).is_dir():
        return Path(name).resolve()
    if name and not Path(name).is_absolute():
        for file in (_INDEX, _SINGLE):
            try:
                cached = try_to_load_from_cache(name, file, revision=revision)
            except ValueError:  # the name cannot be that of a repository
                break
            if isinstance(cached, str):
                return Path(cached).parent
    where = f"{name!r}, which it came from, is no folder and is not in the local cache" if name else "came from nowhere"
    raise ValueError(f"there are no safetensors files of the model: {where}")


def _read_header(path: Path) -> dict[str, StoredTensor]:
    """The floating-point tensors of a safetensors file (format: huggingface/safetensors, README)."""
    file = StoredFile.of(path)
    length = int.from_bytes(file.read(0, 8), "little")
    if length > file.size - 8:
        raise ValueError(f"{path} is not a whole safetensors file")
    tensors = {}
    for name, entry in json.loads(file.read(8, length)).items():
        if name == "__metadata__" or entry["dtype"] not in _DTYPES:
            continue
        start, end = entry["data_offsets"]
        tensor = StoredTensor(file, 8 + length + start, _DTYPES[entry["dtype"]], tuple(entry["shape"]))
        if end - start != prod(tensor.shape) * tensor.dtype.itemsize or 8 + length + end > file.size:
            raise ValueError(f"{path} is not a whole safetensors file: tensor {name!r} does not fit")
        tensors[name] = tensor
    return tensors


def _numbers(path: str) -> list[str]:
    """The parts of a dotted path that are numbers: those of its layers."""
    return [part for part in path.split(".") if part.isdigit()]
