"""`dynamo_compile`: the whole pipeline as one flat list of steps."""

from __future__ import annotations

import gc
import logging
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, TypeVar

import torch
from torch import nn

from moe_compiler.analysis import Analysis
from moe_compiler.analyze import DEFAULT_ALPHA, analyze
from moe_compiler.attachment import attach, origin
from moe_compiler.checks import check_blocks, check_finite, check_model, vocabulary_size
from moe_compiler.config import CompileConfig
from moe_compiler.coverage import CompileReport, block_coverage
from moe_compiler.data import load_calibration
from moe_compiler.graph_record import GraphRecord, record_graph, stages_before
from moe_compiler.hessians import HessianWindows
from moe_compiler.layer import (
    CompiledLayer,
    CompiledLinear,
    check_master,
    compile_layer,
    compile_linear,
    layer_evidence,
    measure_errors,
)
from moe_compiler.passes.assign import assign
from moe_compiler.passes.base import NoProgress, Progress
from moe_compiler.passes.calibrate import Dataset, observe_datasets
from moe_compiler.passes.capture import MoEBlock, capture_moe_blocks
from moe_compiler.passes.graph import MoEGraph
from moe_compiler.passes.hidden import HiddenMoments, hidden_moments
from moe_compiler.passes.plan import PrecisionPlan
from moe_compiler.passes.router import RouterCalibration, RouterChange
from moe_compiler.passes.sensitivity import layer_sensitivity
from moe_compiler.passes.significance import token_weights
from moe_compiler.passes.statistics import BlockStatistics, LayerEvidence
from moe_compiler.progress import RichProgress

logger = logging.getLogger(__name__)

Model = TypeVar("Model", bound=nn.Module)
Statistics = Mapping[str, Mapping[str, BlockStatistics]]
"""By block path and dataset."""


def dynamo_compile(
    model: Model,
    calibration: Mapping[str, Any],
    config: CompileConfig | None = None,
    *,
    tokenizer: Any = None,
    compile: bool = False,
    progress: bool | Progress = True,
    **overrides: Any,
) -> Model:
    """Quantizes the experts of an MoE model, each at its own width, in place.

    Method: DynaMo (arXiv 2503.21135v3); every decision beyond the paper is named where it is made.

    Args:
        model: a Hugging Face MoE model with its weights on one device. It is put in eval mode.
        calibration: by dataset name, samples: texts, token ids or a `datasets.Dataset`. Several datasets of different
            kinds make the allocation robust.
        config: the choices; `overrides` replace single fields, as in `dynamo_compile(..., target_bits=3.0)`.
        tokenizer: needed where samples are text; kept for `model.runtime.adapt`.
        compile: also call `model.compile(fullgraph=True, dynamic=True)` at the end.
        progress: draw progress bars on standard error, or an object that shows progress in its own way.
        **overrides: fields of `CompileConfig`.

    Returns:
        The same object. `model.runtime` adapts it, `model.moe_graphs` holds the rewritten graph of each MoE block by
        its path, `model.moe_report` what was decided and what was covered; the original experts are freed.
        `model.save_pretrained` saves all of it, and transformers' `from_pretrained` loads it again.

    Raises:
        ValueError: bad samples, a model that cannot be compiled (no MoE block, compiled or quantized already,
            offloaded, NaN weights), or a `target_bits` that cannot be met. Nothing has been changed then.
        FloatingPointError: NaN or infinite activations on the calibration data. Nothing has been changed.
        RuntimeError: quantization failed after the first layers had been replaced; the model must be loaded again.
    """
    config = (config or CompileConfig()).with_overrides(**overrides)
    shown: Progress = (RichProgress() if progress else NoProgress()) if isinstance(progress, bool) else progress
    check_model(model)
    vocab_size = vocabulary_size(model)
    datasets = load_calibration(
        calibration, tokenizer=tokenizer, sequence_length=config.sequence_length, vocab_size=vocab_size
    )
    check_finite(model)
    training = {name: module.training for name, module in model.named_modules()}
    model.eval()
    try:
        example = next(iter(datasets.values()))[0][None, :8].to(next(model.parameters()).device)
        blocks = capture_moe_blocks(model, example)
        check_blocks(model, blocks)
        check_master(model, blocks, config)
        statistics = observe_datasets(
            model,
            blocks,
            datasets,
            token_weights=_token_weights(datasets, vocab_size, config),
            tokens_per_batch=config.tokens_per_batch,
            progress=shown,
        )
        hessians = HessianWindows(model, blocks, datasets, config, shown)
        evidence = [layer_evidence(block, statistics[path], config) for path, block in blocks.items()]
        if config.strategy == "budget":
            evidence = _measured(model, evidence, blocks, datasets, statistics, hessians, config)
        plan = _assign(evidence, config)
        analysis = analyze(evidence, plan, blocks, datasets, alpha=_token_alpha(config), progress=shown)
        stages = {path: stages_before(block) for path, block in blocks.items()}
        calibration_of_routers = _router_calibration(model, blocks, datasets, config)
        layers = _lower(model, blocks, plan, statistics, stages, hessians, config, shown)
        routers = calibration_of_routers.refit() if calibration_of_routers is not None else {}
    except BaseException:
        for name, module in model.named_modules():
            module.training = training.get(name, False)
        raise
    _attach(model, layers, plan, routers, analysis.with_stages(stages), datasets, config, tokenizer, shown)
    if compile:
        model.compile(fullgraph=True, dynamic=True)
    return model


def _token_weights(
    datasets: Mapping[str, Dataset], vocab_size: int | None, config: CompileConfig
) -> dict[str, torch.Tensor] | None:
    """By dataset, the weight of each token (MoQa eq. 2), or `None` where every token counts 1."""
    alpha = _token_alpha(config)
    if alpha is None:
        return None
    weights = {}
    for name, dataset in datasets.items():
        counts = torch.bincount(torch.cat(list(dataset)), minlength=vocab_size or 0)
        weights[name] = token_weights(counts, alpha)
    return weights


def _token_alpha(config: CompileConfig) -> float | None:
    if config.token_weight_alpha is None and config.strategy == "moqa":
        return DEFAULT_ALPHA
    return config.token_weight_alpha


def _assign(evidence: list[LayerEvidence], config: CompileConfig) -> PrecisionPlan:
    return assign(
        evidence,
        config.strategy,
        target_bits=config.target_bits,
        widths=config.widths,
        seed=config.seed,
        overlap=config.overlap,
        insurance=config.insurance,
        uniform_bits=config.uniform_bits,
    )


def _measured(
    model: nn.Module,
    evidence: list[LayerEvidence],
    blocks: Mapping[str, MoEBlock],
    datasets: Mapping[str, Dataset],
    statistics: Statistics,
    hessians: HessianWindows,
    config: CompileConfig,
) -> list[LayerEvidence]:
    """The evidence with the measured error of every width and what it costs, which the strategy `"budget"` needs."""
    try:
        sensitivity = layer_sensitivity(model, blocks, datasets, progress=hessians.progress)
    except (RuntimeError, NotImplementedError) as error:
        logger.warning("the model cannot be differentiated, so all layers count the same in the budget: %s", error)
        sensitivity = dict.fromkeys(blocks, 1.0)
    by_path = {layer.path: replace(layer, sensitivity=sensitivity[layer.path]) for layer in evidence}
    for window in hessians.windows():
        found = hessians.collect(window)
        with hessians.progress.task("measuring widths", len(window)) as advance:
            for path in window:
                count = sum(one.count for one in statistics[path].values())
                assert isinstance(count, torch.Tensor)
                errors, signal = measure_errors(blocks[path], found[path], count, config)
                by_path[path] = replace(by_path[path], errors=errors, signal=signal)
                advance()
    return list(by_path.values())


def _lower(
    model: nn.Module,
    blocks: Mapping[str, MoEBlock],
    plan: PrecisionPlan,
    statistics: Statistics,
    stages: Mapping[str, Mapping[str, GraphRecord]],
    hessians: HessianWindows,
    config: CompileConfig,
    progress: Progress,
) -> dict[str, CompiledLayer]:
    """Quantizes and lowers every block, window by window, so that a window sees the quantized layers before it."""
    layers: dict[str, CompiledLayer] = {}
    try:
        for window in hessians.windows():
            first = _first_linears(model, window, plan, statistics, hessians, config, progress)
            hidden: Mapping[str, HiddenMoments] = {}
            if config.quantizer == "gptq":
                hidden = hidden_moments(
                    model,
                    window,
                    {path: linear.packed for path, linear in first.items()},
                    hessians.datasets,
                    tokens_per_batch=config.tokens_per_batch,
                    progress=progress,
                )
                gc.collect()  # graphs and modules refer to each other: the observers go only now
            with progress.task("quantizing", len(window)) as advance:
                for path, block in window.items():
                    layers[path] = compile_layer(
                        model,
                        block,
                        plan.layers[path],
                        first[path],
                        hidden.get(path),
                        list(statistics[path].values()),
                        config,
                    )
                    _graph(model, path).meta["stages"] = {stage: one.text for stage, one in stages[path].items()}
                    gc.collect()  # graphs and modules refer to each other: the originals go only now
                    advance()
            del hidden  # before the next window's Hessians are collected
    except Exception as error:
        if not layers:
            raise
        raise RuntimeError(
            f"quantization failed after {len(layers)} of {len(blocks)} MoE blocks had been replaced; "
            "the model is of no use any more: load it again"
        ) from error
    return layers


def _first_linears(
    model: nn.Module,
    window: dict[str, MoEBlock],
    plan: PrecisionPlan,
    statistics: Statistics,
    hessians: HessianWindows,
    config: CompileConfig,
    progress: Progress,
) -> dict[str, CompiledLinear]:
    """The first linear of every block of a window, quantized; nothing is changed yet."""
    found = hessians.collect(window) if config.quantizer == "gptq" else {}
    hessians.forget()  # they have served: `found` is the last reference
    first = {}
    with progress.task("quantizing", len(window)) as advance:
        for path, block in window.items():
            projection = block.spec.projections[0]
            hessian = found[path][projection.name] if found else None
            seen = list(statistics[path].values())
            first[path] = compile_linear(model, block, projection, plan.layers[path], hessian, seen, config)
            advance()
    return first


def _router_calibration(
    model: nn.Module, blocks: Mapping[str, MoEBlock], datasets: Mapping[str, Dataset], config: CompileConfig
) -> RouterCalibration | None:
    """What the routers are given before anything is quantized, if they are to be refitted."""
    if not config.router_tokens:
        return None
    return RouterCalibration(model, blocks, datasets, config.router_tokens)


def _graph(model: nn.Module, path: str) -> MoEGraph:
    graph = model.get_submodule(path)
    assert isinstance(graph, MoEGraph)
    return graph


def _attach(
    model: Any,
    layers: Mapping[str, CompiledLayer],
    plan: PrecisionPlan,
    routers: Mapping[str, RouterChange],
    analysis: Analysis,
    datasets: Mapping[str, Dataset],
    config: CompileConfig,
    tokenizer: Any,
    progress: Progress,
) -> None:
    """Hangs the runtime, the graphs and the report on the model."""
    base_model, base_revision = origin(model)
    report = CompileReport(
        config=config,
        plan=plan,
        blended={path: dict(layer.blended) for path, layer in layers.items()},
        coverage=tuple(entry for layer in layers.values() for entry in block_coverage(layer.runtime)),
        datasets={name: sum(sample.numel() for sample in dataset) for name, dataset in datasets.items()},
        routers={path: (change.before, change.after) for path, change in routers.items()},
    )
    attach(
        model,
        {path: layer.runtime for path, layer in layers.items()},
        report,
        base_model=base_model,
        base_revision=base_revision,
        tokenizer=tokenizer,
        progress=progress,
    )
    lowered = {path: {"lowered": record_graph(_graph(model, path))} for path in layers}
    model.moe_report = replace(report, analysis=analysis.with_stages(lowered))
