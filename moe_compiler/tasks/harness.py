"""Tasks of lm-eval, the Language Model Evaluation Harness, with the hub's documents or with local ones."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from difflib import get_close_matches
from importlib import import_module
from pathlib import Path
from typing import Any

import datasets
from huggingface_hub.errors import HfHubHTTPError

from moe_compiler.tasks.files import LocalDocuments, find_folder, load_local
from moe_compiler.tasks.formats import FORMATS

OWN_FOLDERS = {
    "arc_challenge": "arc",
    "arc_easy": "arc",
    "cb": "super_glue/cb",
    "copa": "super_glue/copa",
    "piqa": "piqa",
    "rte": "glue/rte",
}
"""Where lm-eval defines the tasks of `FORMATS`: reading these few folders takes much less time than all its tasks."""


_NAMING = re.compile(r"^\s*(?:(?:- *)?(?:task|group|tag) *:|-)(.*)$", re.MULTILINE)
_WORD = re.compile(r"[^\s'\",\[\]{}]+")


def lm_eval(module: str = "") -> Any:
    """A module of lm-eval.

    Raises:
        RuntimeError: the library is not installed, or without what it needs for Hugging Face models.
    """
    try:
        return import_module(f"lm_eval{module}")
    except ModuleNotFoundError as error:
        raise RuntimeError(
            f"`zero_shot` needs the library lm-eval, but there is no module {error.name!r}: "
            "pip install 'moe-compiler[eval]'"
        ) from error


def check_tasks(tasks: Sequence[str]) -> None:
    """Refuses names that nothing in lm-eval has, before anything that takes long.

    To know all of its names lm-eval parses 14,000 files, which takes it a minute. Here their lines are searched for
    words that may be names, in a second; a word that is none after all is refused by `load_tasks`.

    Args:
        tasks: names of tasks, groups or tags.

    Raises:
        RuntimeError: lm-eval is not installed.
        ValueError: there is no such name.
    """
    root = Path(lm_eval().__file__).parent / "tasks"
    if set(tasks) <= OWN_FOLDERS.keys():
        return
    words = set(FORMATS)
    for path in root.rglob("*.yaml"):
        for line in _NAMING.findall(path.read_text(encoding="utf-8")):
            words.update(_WORD.findall(line))
    for task in tasks:
        if task not in words:
            raise _unknown(task, words)


def read_documents(
    tasks: Sequence[str], data: str | Path | Mapping[str, str | Path] | None
) -> dict[str, LocalDocuments]:
    """The local documents, by task, of those tasks that have some.

    Args:
        tasks: names of lm-eval's tasks.
        data: a folder that has all tasks, or by task a folder or a file; the hub has the other tasks.

    Raises:
        ValueError: `data` names other tasks than `tasks`; there is no format for a task; a document is bad.
        FileNotFoundError: files are missing.
    """
    if data is None:
        return {}
    if isinstance(data, Mapping):
        if unknown := [task for task in data if task not in tasks]:
            raise ValueError(f"`data` must be of the tasks {', '.join(tasks)}, but is of {unknown[0]!r}")
        return {task: load_local(task, Path(path).expanduser()) for task, path in data.items()}
    root = Path(data).expanduser()
    return {task: load_local(task, find_folder(task, root)) for task in tasks}


def load_tasks(
    tasks: Sequence[str], documents: Mapping[str, LocalDocuments], num_fewshot: int, seed: int
) -> dict[str, Any]:
    """lm-eval's task objects by name; a group or tag stands for all its tasks.

    Prompts, choices and metrics are those of lm-eval's own definition, for local documents too.

    Args:
        tasks: names of tasks, groups or tags.
        documents: the local ones, by task.
        num_fewshot: worked examples before each document.
        seed: of their choice.

    Raises:
        ValueError: there is no such task; few-shot examples are asked for where there is no training set.
        FileNotFoundError: the hub's documents cannot be had.
    """
    manager = _manager(tasks)
    known = manager.all_tasks
    for task in tasks:
        if task not in known:
            raise _unknown(task, known)
    loaded: dict[str, Any] = {}
    for task in tasks:
        if task in documents:
            if num_fewshot and not documents[task].train:
                raise ValueError(
                    f"`num_fewshot` must be 0 where there is no training set, as for {task!r}, but is {num_fewshot}"
                )
            spec: Any = {"group": "local", "task": [{"task": task, **_overrides(task, documents[task])}]}
        else:
            spec = task
        try:
            loaded |= manager.load([spec])["tasks"]
        except (OSError, HfHubHTTPError, datasets.exceptions.DatasetsError) as error:
            which = "" if task in FORMATS else f", which can be done for {', '.join(FORMATS)}"
            raise FileNotFoundError(
                f"`tasks` has {task!r}, whose documents are neither in the cache {datasets.config.HF_DATASETS_CACHE} "
                f"nor to be had from the hub: {str(error).rstrip('.')}. "
                f"Without the hub, give local files as `data` (on the command line as `--task-data`){which}"
            ) from error
    for task in loaded.values():
        task.set_config(key="num_fewshot", value=num_fewshot)
        task.set_fewshot_seed(seed=seed)
    return loaded


def _unknown(task: str, known: Iterable[str]) -> ValueError:
    near = get_close_matches(task, sorted(known), n=3)
    hint = f"; near: {', '.join(near)}" if near else ""
    return ValueError(f"`tasks` must be tasks of lm-eval, but there is no {task!r}{hint}")


def _manager(tasks: Sequence[str]) -> Any:
    module = lm_eval(".tasks")
    root = Path(module.__file__).parent
    folders = sorted({root / OWN_FOLDERS.get(task, "no such folder") for task in tasks})
    if all(folder.is_dir() for folder in folders):
        manager = module.TaskManager(include_path=folders, include_defaults=False)
        if set(tasks) <= set(manager.all_tasks):
            return manager
    return module.TaskManager()


def _overrides(task: str, documents: LocalDocuments) -> dict[str, Any]:
    """What of a task's definition is replaced: where its documents come from."""
    split = FORMATS[task].split
    return {
        "custom_dataset": _provider(documents, split),
        "dataset_path": "local files",
        "dataset_name": None,
        "training_split": "train" if documents.train else None,
        "validation_split": split if split == "validation" else None,
        "test_split": split if split == "test" else None,
    }


def _provider(documents: LocalDocuments, split: str) -> Callable[..., dict[str, datasets.Dataset]]:
    def provide(**_: Any) -> dict[str, datasets.Dataset]:
        parts = {split: documents.evaluated, "train": documents.train}
        return {name: datasets.Dataset.from_list(rows) for name, rows in parts.items() if rows}

    return provide
