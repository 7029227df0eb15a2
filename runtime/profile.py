"""Profiles: named contents of a model's channel pools, and their files.

A file is in the safetensors format; its metadata hold a JSON header and the header's own digest. It never unpickles.
The header names the format and layout version, the model's fingerprint and a BLAKE2b hash of every tensor, so that a
file of another model, or one that was cut or changed, is refused before anything is used of it.
"""

from __future__ import annotations

import contextlib
import glob
import hashlib
import json
import os
import secrets
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from moe_compiler.kernels.experts import PackedExpertLinear
from moe_compiler.kernels.pool import ChannelPool

FORMAT_VERSION = 1
LAYOUT_VERSION = 1
_HEADER = "moe_compiler.profile"
_HISTOGRAM = "routing_histogram"
_DIGEST, _DIGEST_BYTES = "blake2b", 32
_STALE_SECONDS = 3600

Linear = tuple[str, str]
"""A linear of a model's experts: path of the MoE block and name of the linear."""


@dataclass(frozen=True)
class Profile:
    """Contents of all channel pools of a model, and the data they were made for.

    Attributes:
        name: what it is called.
        rule: how the pools were filled.
        tokens: tokens of the data that were observed, 0 where that is not known.
        pools: the contents of each pool.
        histograms: by MoE block path, `(E,)` float64 on the host: the tokens that those data routed to each expert.
    """

    name: str
    rule: str
    tokens: int
    pools: Mapping[Linear, ChannelPool]
    histograms: Mapping[str, Tensor]

    @property
    def size_bytes(self) -> int:
        """Bytes of the contents."""
        return sum(pool.size_bytes for pool in self.pools.values())

    def __str__(self) -> str:
        used, capacity = (sum(getattr(pool, one) for pool in self.pools.values()) for one in ("used", "capacity"))
        return (
            f"profile {self.name!r}: rule {self.rule!r} on {self.tokens:,} tokens, "
            f"{used:,} of {capacity:,} slots, {self.size_bytes / 1e6:.2f} MB"
        )


@dataclass(frozen=True)
class _Header:
    """What a file says about itself; `hashes` by tensor."""

    format_version: int
    layout_version: int
    fingerprint: str
    name: str
    rule: str
    tokens: int
    hashes: dict[str, str]


def check_name(name: str) -> None:
    """Refuses what cannot be a profile's name.

    Raises:
        ValueError: it is not a text, or an empty one.
    """
    if not isinstance(name, str) or not name:
        raise ValueError(f"`name` must be a text that is not empty, but is {name!r}")


def fingerprint(packed: Mapping[Linear, PackedExpertLinear]) -> str:
    """A hash over what never changes of a compiled model's experts: codes, tables, scales, zero points and shapes."""
    digest = hashlib.blake2b(digest_size=_DIGEST_BYTES)
    for (path, linear), one in packed.items():
        sizes = [path, linear, one.in_features, one.group_size, *map(list, _shapes(one.pool))]
        digest.update(json.dumps(sizes).encode())
        for tensor in (one.planes, one.table, one.scale, one.zero_point):
            digest.update(_hash(tensor).encode())
    return digest.hexdigest()


def check_contents(pool: ChannelPool, like: PackedExpertLinear, where: str) -> None:
    """Refuses contents that the operators could not read: they would reach outside of the pool, or spread NaN.

    Args:
        pool: the contents.
        like: the linear whose pool they are for.
        where: what to call them in a message.

    Raises:
        ValueError: they are of another shape or dtype, or point outside of the pool.
        FloatingPointError: a scale is not finite.
    """
    wanted = like.pool.tensors()
    for name, tensor in pool.tensors().items():
        if tensor.shape != wanted[name].shape or tensor.dtype != wanted[name].dtype:
            raise ValueError(
                f"{where}: `{name}` must be {tuple(wanted[name].shape)} {wanted[name].dtype}, "
                f"but is {tuple(tensor.shape)} {tensor.dtype}"
            )
    offset, index = pool.offset.cpu(), pool.index.cpu()
    if bool((offset.diff() < 0).any()) or int(offset[0]) != 0 or int(offset[-1]) > pool.capacity:
        raise ValueError(f"{where}: `offset` must ascend from 0 to at most {pool.capacity}, but is {offset.tolist()}")
    inputs = like.in_features + pool.direction.shape[0]
    if index.numel() and not 0 <= int(index.min()) <= int(index.max()) < inputs:
        raise ValueError(f"{where}: `index` must lie in [0, {inputs}), but lies in [{index.min()}, {index.max()}]")
    if not bool(torch.isfinite(pool.scale).all()):
        raise FloatingPointError(f"{where}: `scale` must be finite, but holds NaN or infinity")


def write_profile(profile: Profile, path: str | os.PathLike[str], fingerprint: str) -> None:
    """Writes a profile: to a temporary name beside `path`, then renamed, so that `path` is never half written.

    What a process that was killed while it wrote `path` left behind is removed once it is an hour old.

    Raises:
        OSError: the file could not be written. Whatever `path` held before is still there.
    """
    target = Path(path)
    if target.is_dir():
        raise IsADirectoryError(f"`path` must be a file, but {target} is a folder")
    if not target.parent.is_dir():
        raise FileNotFoundError(f"`path` must lie in a folder that exists, but {target.parent} does not")
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in _named(profile).items()}
    header = _Header(
        format_version=FORMAT_VERSION,
        layout_version=LAYOUT_VERSION,
        fingerprint=fingerprint,
        name=profile.name,
        rule=profile.rule,
        tokens=profile.tokens,
        hashes={name: _hash(tensor) for name, tensor in tensors.items()},
    )
    data = safetensors.torch.save(tensors, {_HEADER: _sealed(asdict(header))})
    _remove_stale(target)
    temporary = target.with_name(f".{target.name}.{secrets.token_hex(8)}.tmp")
    try:
        with temporary.open("xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)
    _sync_folder(target.parent)


def read_profile(
    path: str | os.PathLike[str],
    packed: Mapping[Linear, PackedExpertLinear],
    fingerprint: Callable[[], str],
    name: str | None = None,
) -> Profile:
    """Reads and checks a profile; its contents are put on the devices of the pools.

    Args:
        path: the file.
        packed: the linears of the model that it must fit.
        fingerprint: gives the model's fingerprint; asked only if the file is whole.
        name: what to call the profile; as the file says if `None`.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is no profile, is damaged, of another version or made for another model: names file and reason.
    """
    source = Path(path)
    if not source.is_file():
        raise FileNotFoundError(f"`path` must be a profile's file, but {source} does not exist or is none")
    try:
        header, tensors = _decode(source.read_bytes())
        if header.fingerprint != fingerprint():
            raise ValueError("it was made for another model, or for another compilation of this one")
        pools = {key: _pool(key, one, tensors) for key, one in packed.items()}
        histograms = {block: _routing(block, packed, tensors) for block in dict.fromkeys(path for path, _ in packed)}
        if tensors:
            raise ValueError(f"it holds a tensor `{next(iter(tensors))}` that this model has no place for")
    except (ValueError, FloatingPointError) as error:
        raise ValueError(f"profile {source} cannot be loaded: {error}") from error
    return Profile(name or header.name, header.rule, header.tokens, pools, histograms)


def _decode(data: bytes) -> tuple[_Header, dict[str, Tensor]]:
    """The header and the tensors of a file that is whole and of this version."""
    try:
        tensors = safetensors.torch.load(data)
        size = int.from_bytes(data[:8], "little")
        metadata = json.loads(data[8 : 8 + size]).get("__metadata__", {})
    except (SafetensorError, ValueError, KeyError) as error:
        raise ValueError(f"it is not a safetensors file, or was cut off ({error})") from error
    if _HEADER not in metadata:
        raise ValueError("it is a safetensors file, but not a profile")
    header = _header(_unsealed(metadata[_HEADER]))
    for name in header.hashes.keys() | tensors.keys():
        if name not in header.hashes or name not in tensors:
            raise ValueError(f"its header and its contents differ in the tensor `{name}`")
        if _hash(tensors[name]) != header.hashes[name]:
            raise ValueError(f"its tensor `{name}` was changed or damaged")
    return header, tensors


def _sealed(values: dict[str, Any]) -> str:
    """The values as JSON with their own digest."""
    return json.dumps({**values, _DIGEST: _digest(values)})


def _unsealed(text: str) -> dict[str, Any]:
    try:
        values = json.loads(text)
        digest = values.pop(_DIGEST)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError("its header was changed or damaged") from error
    if digest != _digest(values):
        raise ValueError("its header was changed or damaged")
    assert isinstance(values, dict)
    return values


def _header(values: dict[str, Any]) -> _Header:
    for name, known in (("format_version", FORMAT_VERSION), ("layout_version", LAYOUT_VERSION)):
        if values.get(name) != known:
            raise ValueError(f"its `{name}` must be {known}, but is {values.get(name)}")
    kinds = {"fingerprint": str, "name": str, "rule": str, "tokens": int, "hashes": dict}
    for name, kind in kinds.items():
        if not isinstance(values.get(name), kind):
            raise ValueError(f"its header must hold a {kind.__name__} `{name}`, but holds {values.get(name)!r}")
    check_name(values["name"])
    return _Header(**{field.name: values[field.name] for field in fields(_Header)})


def _pool(key: Linear, like: PackedExpertLinear, tensors: dict[str, Tensor]) -> ChannelPool:
    found = {}
    for field in fields(ChannelPool):
        found[field.name] = _take(_name(key, field.name), tensors)
    pool = ChannelPool(**found)
    check_contents(pool, like, "/".join(key))
    return moved(pool, like.pool.offset.device)


def _routing(block: str, packed: Mapping[Linear, PackedExpertLinear], tensors: dict[str, Tensor]) -> Tensor:
    histogram = _take(f"{block}.{_HISTOGRAM}", tensors)
    experts = next(one.num_experts for (path, _), one in packed.items() if path == block)
    if histogram.shape != (experts,) or histogram.dtype != torch.float64:
        raise ValueError(f"its routing histogram of `{block}` must be ({experts},) float64")
    if not bool(torch.isfinite(histogram).all()) or bool((histogram < 0).any()) or not bool(histogram.sum() > 0):
        raise ValueError(f"its routing histogram of `{block}` must be finite, not negative and not all zero")
    return histogram


def _take(name: str, tensors: dict[str, Tensor]) -> Tensor:
    if name not in tensors:
        raise ValueError(f"it holds no tensor `{name}`")
    return tensors.pop(name)


def moved(pool: ChannelPool, device: torch.device) -> ChannelPool:
    """The contents on a device."""
    return ChannelPool(**{name: tensor.to(device) for name, tensor in pool.tensors().items()})


def _named(profile: Profile) -> dict[str, Tensor]:
    named = {f"{block}.{_HISTOGRAM}": histogram for block, histogram in profile.histograms.items()}
    for key, pool in profile.pools.items():
        named |= {_name(key, field): tensor for field, tensor in pool.tensors().items()}
    return named


def _name(key: Linear, field: str) -> str:
    return f"{key[0]}.{key[1]}.{field}"


def _shapes(pool: ChannelPool) -> Iterable[torch.Size]:
    return (tensor.shape for tensor in pool.tensors().values())


def _hash(tensor: Tensor) -> str:
    """BLAKE2b over dtype, shape and bytes."""
    digest = hashlib.blake2b(f"{tensor.dtype} {tuple(tensor.shape)}".encode(), digest_size=_DIGEST_BYTES)
    digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _digest(values: Mapping[str, Any]) -> str:
    return hashlib.blake2b(json.dumps(values, sort_keys=True).encode(), digest_size=_DIGEST_BYTES).hexdigest()


def _remove_stale(target: Path) -> None:
    """Removes temporary files of `target` that nobody can still be writing."""
    for one in target.parent.glob(f".{glob.escape(target.name)}.*.tmp"):
        with contextlib.suppress(OSError):
            if time.time() - one.stat().st_mtime > _STALE_SECONDS:
                one.unlink()


def _sync_folder(folder: Path) -> None:
    """Makes a rename last, where the system can."""
    if os.name == "posix":
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
