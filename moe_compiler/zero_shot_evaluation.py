"""Accuracy of a model on multiple-choice tasks that it was not trained for, measured by lm-eval."""

from __future__ import annotations

import copy
import io
import logging
import math
import random
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, redirect_stderr
from functools import partial, wraps
from pathlib import Path
from typing import Any

from torch import nn
from transformers import PreTrainedTokenizerBase

from moe_compiler.passes.base import Advance, NoProgress, Progress
from moe_compiler.progress import RichProgress
from moe_compiler.runtime.runtime import Runtime
from moe_compiler.tasks.harness import check_tasks, lm_eval, load_tasks, read_documents
from moe_compiler.zero_shot_result import Metric, TaskScore, ZeroShotResult

TASKS = ("arc_challenge", "arc_easy", "rte", "piqa", "copa", "cb")


def zero_shot(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    tasks: Sequence[str] = TASKS,
    *,
    limit: int | None = None,
    num_fewshot: int = 0,
    batch_size: int = 8,
    data: str | Path | Mapping[str, str | Path] | None = None,
    seed: int = 0,
    progress: bool | Progress = True,
) -> ZeroShotResult:
    """Scores a causal language model on tasks of lm-eval, with lm-eval's prompts and metrics.

    A choice's score is its log-likelihood after the prompt; the choice with the highest one is the model's answer
    (Brown et al., arXiv 2005.14165, section 2.4; lm-eval, arXiv 2405.14782). Model, tokenizer and random state stay as
    they were, but for the routing histograms of a compiled model, which count these tokens too. All documents see one
    profile of its runtime, so that changes by other threads wait for the end.

    Args:
        model: a Hugging Face causal language model, compiled by `dynamo_compile` or not.
        tokenizer: its tokenizer.
        tasks: names of lm-eval's tasks, groups or tags.
        limit: at most so many documents of each task, drawn by `seed`; the same for every model.
        num_fewshot: worked examples before each document, drawn by `seed`.
        batch_size: sequences in one forward pass.
        data: local files of the tasks, instead of the hub's: a folder with a folder for each of `tasks`, named after
            it; or by task a folder or a file. `moe_compiler.tasks.formats` says which are read. Tasks that a mapping
            leaves out come from the hub.
        seed: of the choice of documents and examples.
        progress: draw a progress bar on standard error, or an object that shows progress in its own way.

    Returns:
        Scores by task; `print` shows a table, `to_dict` is for JSON.

    Raises:
        RuntimeError: lm-eval is not installed.
        ValueError: an argument is out of range; there is no such task; local files are bad.
        TypeError: `tokenizer` is no tokenizer of transformers; `tasks` is a string.
        FileNotFoundError: documents are neither in the cache nor to be had from the hub; local files are missing.
        FloatingPointError: a log-likelihood was NaN.
    """
    if isinstance(tasks, str):
        raise TypeError(f"`tasks` must be a sequence of names, but is the string {tasks!r}")
    for name, value, least in (("limit", limit, 1), ("num_fewshot", num_fewshot, 0), ("batch_size", batch_size, 1)):
        if value is not None and value < least:
            raise ValueError(f"`{name}` must be at least {least}, but is {value}")
    if not tasks or len(set(tasks)) < len(tasks):
        raise ValueError(f"`tasks` must name tasks, each once, but is {list(tasks)}")
    if not isinstance(tokenizer, PreTrainedTokenizerBase):
        raise TypeError(f"`tokenizer` must be a tokenizer of transformers, but is a {type(tokenizer).__name__}")
    check_tasks(tasks)
    library = lm_eval()
    shown: Progress = (RichProgress() if progress else NoProgress()) if isinstance(progress, bool) else progress
    with _errors_only("lm_eval"), _random_state_kept():
        documents = read_documents(tasks, data)
        loaded = load_tasks(tasks, documents, num_fewshot, seed)
        for task in loaded.values():
            task.build_all_requests = _without_bar(task.build_all_requests)
        with _evaluated(model), warnings.catch_warnings():
            # scikit-learn's, where no document of a class was scored and none was answered so; its F1 is 0 then
            warnings.filterwarnings("ignore", "F-score is ill-defined", UserWarning)
            measured = library.evaluate(
                _language_model(model, tokenizer, batch_size, shown),
                {"tasks": loaded},
                samples=_samples(loaded, limit, seed),
                log_samples=False,
            )
    sources = {name: ", ".join(map(str, documents[name].files)) for name in documents}
    return ZeroShotResult(
        tasks={name: _score(measured, name, task, sources.get(name)) for name, task in loaded.items()},
        num_fewshot=num_fewshot,
        limit=limit,
        seed=seed,
        lm_eval=library.__version__,
    )


def _samples(tasks: Mapping[str, Any], limit: int | None, seed: int) -> dict[str, list[int]] | None:
    """The documents to score, by task; a task that is left out is scored whole."""
    if limit is None:
        return None
    sizes = {name: len(task.eval_docs) for name, task in tasks.items()}
    return {name: sorted(random.Random(seed).sample(range(n), limit)) for name, n in sizes.items() if n > limit}


def _language_model(model: nn.Module, tokenizer: PreTrainedTokenizerBase, batch_size: int, progress: Progress) -> Any:
    """The model as lm-eval takes it, with our progress bar instead of its own."""
    hf = lm_eval(".models.huggingface").HFLM(
        pretrained=model, backend="causal", tokenizer=copy.deepcopy(tokenizer), batch_size=batch_size
    )
    for kind in ("loglikelihood", "loglikelihood_rolling", "generate_until"):
        setattr(hf, kind, partial(_answer, hf, getattr(hf, kind), progress))
    return hf


def _answer(hf: Any, ask: Callable[..., Any], progress: Progress, requests: Sequence[Any]) -> Any:
    with progress.task("zero-shot", len(requests)) as advance:
        hf.set_cache_hook(_Watch(advance))
        return ask(requests, disable_tqdm=True)


class _Watch:
    """Takes the place of lm-eval's cache: it is told each answer as soon as there is one."""

    def __init__(self, advance: Advance) -> None:
        self.advance = advance

    def add_partial(self, kind: str, request: Any, answer: Any) -> None:
        """Refuses NaN, which would count as an answer otherwise."""
        value = answer[0] if isinstance(answer, tuple) else answer
        if isinstance(value, float) and math.isnan(value):
            raise FloatingPointError(f"the log-likelihood of {request!r} is NaN: the model has no accuracy")
        self.advance()


def _without_bar(build: Callable[..., None]) -> Callable[..., None]:
    """The same without the progress bar, which lm-eval offers no option to leave out."""

    @wraps(build)
    def quiet(*args: Any, **options: Any) -> None:
        with redirect_stderr(io.StringIO()):
            build(*args, **options)

    return quiet


@contextmanager
def _errors_only(name: str) -> Iterator[None]:
    """Less severe messages of a logger are not shown."""
    logger = logging.getLogger(name)
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


@contextmanager
def _random_state_kept() -> Iterator[None]:
    """lm-eval draws from Python's own generator."""
    state = random.getstate()
    try:
        yield
    finally:
        random.setstate(state)


@contextmanager
def _evaluated(model: nn.Module) -> Iterator[None]:
    """The model in evaluation mode and with one profile; afterwards in the mode that it was in."""
    runtime = getattr(model, "runtime", None)
    hold: AbstractContextManager[None] = runtime.hold() if isinstance(runtime, Runtime) else nullcontext()
    training = {module: module.training for module in model.modules()}
    with hold:
        try:
            yield
        finally:
            for module, mode in training.items():
                module.training = mode


def _score(measured: Mapping[str, Any], name: str, task: Any, files: str | None) -> TaskScore:
    values: Mapping[str, Any] = measured["results"][name]
    metrics = {}
    for key, value in values.items():
        metric, _, filtered = key.partition(",")
        if filtered and not metric.endswith("_stderr"):
            stderr = values.get(f"{metric}_stderr,{filtered}")
            label = metric if filtered == "none" else f"{metric} ({filtered})"
            metrics[label] = Metric(float(value), float(stderr) if isinstance(stderr, int | float) else None)
    hub = ", ".join(part for part in (task.DATASET_PATH, task.DATASET_NAME) if part)
    counts = measured["n-samples"][name]
    return TaskScore(metrics, counts["effective"], counts["original"], str(task.VERSION), files or f"hub {hub}")
