"""What hangs on a compiled model: its runtime, its graphs, its report, and what transformers needs to save it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from transformers.quantizers.auto import AutoHfQuantizer

from moe_compiler.checks import vocabulary_size
from moe_compiler.coverage import CompileReport
from moe_compiler.data import load_samples
from moe_compiler.dynamo_config import DynamoConfig
from moe_compiler.kernels.affine import WIDTHS
from moe_compiler.passes.base import Progress
from moe_compiler.passes.calibrate import Dataset
from moe_compiler.runtime.adaptation import RuntimeLayer
from moe_compiler.runtime.runtime import Runtime
from moe_compiler.saved_format import BlockFormat, SavedFormat
from moe_compiler.saving import SavePretrained


def attach(
    model: Any,
    layers: Mapping[str, RuntimeLayer],
    report: CompileReport,
    *,
    base_model: str,
    base_revision: str | None,
    tokenizer: Any,
    progress: Progress,
) -> None:
    """Hangs everything on a model whose blocks have been lowered.

    Args:
        model: the model.
        layers: its lowered blocks by path.
        report: what was decided.
        base_model: where it came from before it was compiled; empty if unknown.
        base_revision: the commit of the hub's repository, where that is known.
        tokenizer: for `model.runtime.adapt`.
        progress: for the same.
    """
    config = report.config
    model.runtime = Runtime(
        model,
        layers,
        rule=config.rule,
        widths=config.widths or WIDTHS,
        tokens_per_batch=config.tokens_per_batch,
        load=partial(
            _load,
            default_tokenizer=tokenizer,
            sequence_length=config.sequence_length,
            vocab_size=vocabulary_size(model),
        ),
        progress=progress,
        base_model=base_model,
        base_revision=base_revision,
    )
    model.moe_graphs = {path: model.get_submodule(path) for path in layers}
    model.moe_report = report
    if hasattr(model, "save_pretrained"):
        blocks = {path: BlockFormat.of(layer) for path, layer in layers.items()}
        _mark_quantized(
            model,
            DynamoConfig.of(
                config,
                calibration=dict.fromkeys(report.datasets) or None,
                max_tokens=None,
                datasets=dict(report.datasets) or None,
                compiled=SavedFormat(blocks, base_model, base_revision),
            ),
        )


def origin(model: Any) -> tuple[str, str | None]:
    """Where a model was loaded from: a folder (as an absolute path) or a repository of the hub, and its commit."""
    config = getattr(model, "config", None)
    name = str(getattr(model, "name_or_path", "") or getattr(config, "_name_or_path", "") or "")
    if name and Path(name).is_dir():
        return str(Path(name).resolve()), None
    return name, getattr(config, "_commit_hash", None)


def describe_sources(model: Any, config: DynamoConfig) -> None:
    """Notes in the configuration of a compiled model which sources its calibration data came from, as `config` says."""
    described = replace(
        model.config.quantization_config,
        calibration=config.calibration_sources(),
        tokenizer=config.tokenizer if isinstance(config.tokenizer, str) else None,
        max_tokens=config.max_tokens,
    )
    model.config.quantization_config = model.hf_quantizer.quantization_config = described


def _mark_quantized(model: Any, config: DynamoConfig) -> None:
    """Makes transformers see a quantized model, whose weights are saved under the names that they have."""
    model.config.quantization_config = config
    model.hf_quantizer = AutoHfQuantizer.from_config(config, pre_quantized=True)
    model.is_quantized = True
    model.quantization_method = config.quant_method
    model._weight_conversions = []
    model.save_pretrained = SavePretrained(model)


def _load(samples: Any, *, name: str, tokenizer: Any, default_tokenizer: Any, **options: Any) -> Dataset:
    """Samples for `Runtime.adapt`, with the tokenizer that the model was compiled with as the default."""
    return load_samples(samples, name=name, tokenizer=tokenizer or default_tokenizer, **options)
