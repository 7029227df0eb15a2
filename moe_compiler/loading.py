"""Loading a saved model: what happens to it before and after transformers has read its weights."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import Any

from huggingface_hub import hf_hub_download
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers import AutoTokenizer

from moe_compiler.analysis import Analysis
from moe_compiler.attachment import attach, describe_sources
from moe_compiler.coverage import CompileReport
from moe_compiler.dynamo_config import DynamoConfig
from moe_compiler.kernels.buffers import FixedDtypeBuffers
from moe_compiler.passes.base import Progress
from moe_compiler.passes.capture import MoEBlock
from moe_compiler.passes.lower import LoweredExperts
from moe_compiler.refusal import refusing_tensors
from moe_compiler.runtime.adaptation import RuntimeLayer
from moe_compiler.runtime.profile import read_profile
from moe_compiler.runtime.saved import read_layers
from moe_compiler.saved_format import SavedFormat
from moe_compiler.saving import ANALYSIS, FORMAT_VERSION, PROFILES, REPORT, RUNTIME
from moe_compiler.skeleton import build_skeleton, fill_constants

FINGERPRINT = "moe_compiler.fingerprint"


@dataclass(frozen=True)
class Loading:
    """A saved model whose weights are about to be read.

    Attributes:
        config: its `quantization_config`.
        blocks: its lowered blocks by path.
        weights: its files of weights.
        repository: the name that it is loaded by.
    """

    config: DynamoConfig
    blocks: Mapping[str, MoEBlock]
    weights: Sequence[Path]
    repository: str

    def file(self, name: str) -> Path:
        """The path of a file beside the weights; one of the hub is downloaded.

        Raises:
            FileNotFoundError: there is no such file.
        """
        first = self.weights[0]
        path = first.parent / name
        if path.is_file():
            return path
        snapshot = next((one for one in first.parents if one.parent.name == "snapshots"), None)
        if snapshot is not None:
            inside = (first.parent.relative_to(snapshot) / name).as_posix()
            try:
                cache = str(snapshot.parents[2])
                return Path(hf_hub_download(self.repository, inside, revision=snapshot.name, cache_dir=cache))
            except (OSError, ValueError) as error:
                raise FileNotFoundError(f"the saved model is not complete: {name} cannot be had: {error}") from error
        raise FileNotFoundError(f"the saved model is not complete: {path} does not exist")


class FolderTokenizer:
    """The tokenizer in a model's folder or repository, read when text is to be tokenized.

    Args:
        name: the folder, or the repository's name on the hub.
    """

    def __init__(self, name: str) -> None:
        self.name = name

    @cached_property
    def tokenizer(self) -> Any:
        """The tokenizer.

        Raises:
            ValueError: there is none.
        """
        try:
            found = AutoTokenizer.from_pretrained(self.name)
        except (OSError, ValueError) as error:
            raise ValueError(f"`tokenizer` is needed for text, since {self.name} has none: {error}") from error
        if len(found) <= len(found.all_special_ids):  # transformers makes an empty one of the model's usual class
            raise ValueError(f"`tokenizer` is needed for text, since {self.name} has none")
        return found

    @property
    def eos_token_id(self) -> int | None:
        """The id of the end-of-text token."""
        return self.tokenizer.eos_token_id  # type: ignore[no-any-return]

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Tokenizes."""
        return self.tokenizer(*args, **kwargs)


def begin(model: Any, config: DynamoConfig, checkpoint_files: Sequence[str] | None) -> Loading:
    """Gives a model without weights the form of the saved one.

    Args:
        model: on the meta device.
        config: its `quantization_config`.
        checkpoint_files: the files of weights.

    Raises:
        ValueError: the config holds no compiled model, or the model or the files are not those that it describes.
    """
    saved = _saved(config)
    if not checkpoint_files:
        raise ValueError("a compiled model can only be loaded from the folder or repository it was saved to")
    weights = [Path(file) for file in checkpoint_files]
    blocks = build_skeleton(model, saved, config.group_size)
    _check_weights(weights, blocks, saved)
    known = map(re.escape, refusing_tensors(map(_experts, blocks.values())))
    model._keys_to_ignore_on_load_unexpected = {*(model._keys_to_ignore_on_load_unexpected or ()), *known}
    return Loading(config, blocks, weights, str(model.config._name_or_path))


def finish(model: Any, loading: Loading, progress: Progress) -> None:
    """Hangs runtime, graphs and report on a model whose weights have been read.

    Raises:
        FileNotFoundError: a file of the saved model is missing.
        ValueError: one is damaged or belongs to another model.
    """
    saved, blocks = _saved(loading.config), loading.blocks
    fill_constants(blocks, saved)
    contents = _read_report(loading)
    packed = {path: _experts(block).all_packed() for path, block in blocks.items()}
    layers = {}
    for path, one in read_layers(loading.file(RUNTIME), packed, saved.fingerprint).items():
        overhead = {name: linear.effective_bits - linear.code_bits for name, linear in packed[path].items()}
        layers[path] = RuntimeLayer(blocks[path], one.masters, one.calibration_count, overhead, one.top_k)
    for path in blocks:
        model.get_submodule(path).meta["stages"] = dict(contents.stages[path])
    attach(
        model,
        layers,
        contents.report,
        base_model=saved.base_model,
        base_revision=saved.base_revision,
        tokenizer=FolderTokenizer(loading.repository),
        progress=progress,
    )
    describe_sources(model, loading.config)
    linears = {(path, name): one for path, named in packed.items() for name, one in named.items()}
    profiles = [
        read_profile(loading.file(file), linears, lambda: saved.fingerprint, name)
        for name, file in contents.profiles.items()
    ]
    model.runtime.restore(profiles, contents.active)


@dataclass(frozen=True)
class _Contents:
    """What `moe_report.json` holds: the report, profiles' files by name, the active one, graphs by block and stage."""

    report: CompileReport
    profiles: Mapping[str, str]
    active: str
    stages: Mapping[str, Mapping[str, str]]


def _read_report(loading: Loading) -> _Contents:
    path = loading.file(REPORT)
    try:
        contents = json.loads(path.read_text(encoding="utf-8"))
        if contents["format_version"] != FORMAT_VERSION:
            raise ValueError(f"its `format_version` must be {FORMAT_VERSION}, but is {contents['format_version']!r}")
        profiles = {str(name): str(file) for name, file in contents["profiles"].items()}
        if any(PurePosixPath(file).parts[:-1] != (PROFILES,) for file in profiles.values()):
            raise ValueError(f"its `profiles` must be files in {PROFILES}/, but are {', '.join(profiles.values())}")
        graphs, blocks = contents["graphs"], {block: contents["stages"][block] for block in loading.blocks}
        stages = {block: {stage: graphs[number] for stage, number in one.items()} for block, one in blocks.items()}
        read = _Contents(CompileReport.from_dict(contents["report"]), profiles, contents["active"], stages)
        has_analysis = contents["analysis"] is not None
    except (KeyError, TypeError, IndexError, AttributeError, ValueError) as error:
        reason = f"it lacks {error}" if isinstance(error, KeyError) else str(error)
        raise ValueError(f"{path} cannot be read: {reason}") from error
    if not has_analysis:
        return read
    return replace(read, report=replace(read.report, analysis=Analysis.load(loading.file(ANALYSIS))))


def _saved(config: DynamoConfig) -> SavedFormat:
    if config.compiled is None:
        raise ValueError(
            "`quantization_config` in config.json must describe the packed weights in its field `compiled`, "
            "but has no such field"
        )
    return config.compiled


def _experts(block: MoEBlock) -> LoweredExperts:
    experts = block.experts
    assert isinstance(experts, LoweredExperts)
    return experts


def _check_weights(weights: Sequence[Path], blocks: Mapping[str, MoEBlock], saved: SavedFormat) -> None:
    """Refuses files of another model than config.json's, and files without all packed weights.

    transformers would fill what is missing with random numbers and a warning.
    """
    names: set[str] = set()
    for path in weights:
        try:
            with safe_open(path, framework="pt") as file:
                found = (file.metadata() or {}).get(FINGERPRINT)
                names |= set(file.keys())
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{path} is not a whole safetensors file: {error}") from error
        if found != saved.fingerprint:
            raise ValueError(f"{path} and config.json belong to different models, or to different saves of one")
    for block_path, block in blocks.items():
        for name, module in _packed_modules(block):
            for buffer in module._buffers.keys() - module._non_persistent_buffers_set:
                key = ".".join(part for part in (block_path, name, buffer) if part)
                if key not in names:
                    raise ValueError(f"the weights in {weights[0].parent} lack the tensor `{key}`")


def _packed_modules(block: MoEBlock) -> list[tuple[str, nn.Module]]:
    root: nn.Module = block.experts if block.path == block.spec.path else block.graph
    return [(name, one) for name, one in root.named_modules() if isinstance(one, FixedDtypeBuffers)]
