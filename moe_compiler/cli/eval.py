"""`moe-compiler eval`: perplexity and zero-shot tasks, of two models side by side."""

from __future__ import annotations

import argparse
import gc
import math
from typing import Any

from moe_compiler.cli.models import is_compiled, load, switch_profile
from moe_compiler.cli.output import print_json, print_table, print_text
from moe_compiler.cli.parser import UsageError
from moe_compiler.cli.texts import count, read_windows
from moe_compiler.evaluate import perplexity
from moe_compiler.passes.calibrate import Dataset
from moe_compiler.progress import RichProgress


def run(options: argparse.Namespace) -> None:
    """Measures one model after the other, on the same windows."""
    if len(options.models) > 2:
        raise UsageError(f"`MODEL` must be given once or twice, but is {', '.join(options.models)}")
    if not options.data and not options.tasks:
        raise UsageError("`--data` or `--tasks` must say what to measure on")
    if options.window < 2:
        raise UsageError("`--window` must be at least 2, since the first token of each is not scored")
    _check_tasks(options)
    datasets: dict[str, Dataset] = {}
    perplexities: list[dict[str, float]] = []
    results: list[Any] = []
    profiles: list[str | None] = []
    for name in options.models:
        model, tokenizer = load(name, options)
        compiled = is_compiled(model)
        if compiled or (name == options.models[-1] and not any(profiles)):
            switch_profile(model, options.profile)
        profiles.append(model.runtime.active if compiled else None)
        datasets = datasets or _read(options, model, tokenizer)
        perplexities.append(_perplexities(model, datasets))
        results.append(_tasks(options, model, tokenizer))
        del model
        gc.collect()
    _print(options, datasets, perplexities, results, profiles)


def _read(options: argparse.Namespace, model: Any, tokenizer: Any) -> dict[str, Dataset]:
    common: dict[str, Any] = {"tokens": options.tokens, "window": options.window, "held_out": True}
    return {name: read_windows(source, tokenizer, model, options, name=name, **common) for name, source in options.data}


def _perplexities(model: Any, datasets: dict[str, Dataset]) -> dict[str, float]:
    progress = RichProgress()
    return {name: perplexity(model, windows, name=name, progress=progress) for name, windows in datasets.items()}


def _tasks(options: argparse.Namespace, model: Any, tokenizer: Any) -> Any:
    """What `zero_shot` measured, or `None` where no task was asked for."""
    if not options.tasks:
        return None
    from moe_compiler.zero_shot_evaluation import zero_shot

    return zero_shot(
        model,
        tokenizer,
        _task_names(options),
        limit=options.limit,
        num_fewshot=options.shots,
        batch_size=options.batch_size,
        data=options.task_data,
    )


def _check_tasks(options: argparse.Namespace) -> None:
    """Refuses tasks and their local files before the models are loaded and perplexities measured."""
    if options.tasks:
        from moe_compiler.tasks.harness import check_tasks, read_documents

        check_tasks(_task_names(options))
        read_documents(_task_names(options), options.task_data)


def _task_names(options: argparse.Namespace) -> tuple[str, ...]:
    return tuple(task.strip() for task in options.tasks.split(","))


def _print(
    options: argparse.Namespace,
    datasets: dict[str, Dataset],
    perplexities: list[dict[str, float]],
    results: list[Any],
    profiles: list[str | None],
) -> None:
    if options.json:
        models = [
            {
                "model": name,
                "profile": profile,
                "perplexity": found,
                "tasks": None if result is None else result.to_dict(),
            }
            for name, profile, found, result in zip(options.models, profiles, perplexities, results, strict=True)
        ]
        tokens = {name: count(windows) for name, windows in datasets.items()}
        print_json({"window": options.window, "tokens": tokens, "models": models})
        return
    heads = [
        name if profile is None else f"{name} ({profile})"
        for name, profile in zip(options.models, profiles, strict=True)
    ]
    if datasets:
        _print_perplexities(heads, datasets, perplexities, options.window)
    for head, result in zip(heads, results, strict=True):
        if result is not None:
            print_text(f"{head}\n{result}")


def _print_perplexities(
    heads: list[str], datasets: dict[str, Dataset], perplexities: list[dict[str, float]], window: int
) -> None:
    rows = []
    for name, windows in datasets.items():
        values = [found[name] for found in perplexities]
        loss = [f"{100 * math.log(values[1] / values[0]):.2f}"] if len(values) == 2 else []
        rows.append([name, f"{count(windows):,}", *(f"{value:.3f}" for value in values), *loss])
    print_table(["perplexity", "tokens", *heads, *(["loss"] if len(heads) == 2 else [])], rows)
    note = "; loss: 100 ln(second / first)" if len(heads) == 2 else ""
    print_text(f"windows of {window} tokens, the first of each not scored{note}")
