"""Where a task's local files are, and their documents by split."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from moe_compiler.local_files import find_files, split_of
from moe_compiler.tasks.formats import FORMATS, TaskFormat
from moe_compiler.tasks.rows import KINDS, Row, read_rows

DEPTH = 4
"""How many folders deep a task's folder is looked for."""

XML_SPLIT = "test"
"""The split of XML files that is evaluated: the test sets published as such have labels."""


@dataclass(frozen=True)
class LocalDocuments:
    """A task's documents.

    Args:
        evaluated: those that are scored.
        train: those that few-shot examples are drawn from; there may be none.
        files: the files that `evaluated` is from.
    """

    evaluated: list[Row]
    train: list[Row]
    files: tuple[Path, ...]


def find_folder(task: str, root: Path) -> Path:
    """The folder in `root`, or in the folders there, that is named after the task; or `root` itself.

    Raises:
        ValueError: there is no format for the task.
        FileNotFoundError: there is no such folder.
    """
    names = _format(task).folders
    if not root.is_dir():
        raise FileNotFoundError(f"`data` must be an existing folder, but there is no {root}")
    level = [root]
    for _ in range(DEPTH):
        for folder in level:
            if re.sub(r"[^a-z0-9]", "", folder.name.lower()) in names:
                return folder
        level = sorted(inner for folder in level for inner in folder.iterdir() if inner.is_dir())
    raise FileNotFoundError(
        f"`data` must have a folder {task!r} with that task's files, but {root} has none; "
        f"a folder or file of another name can be given as `data={{{task!r}: path}}`"
    )


def load_local(task: str, path: Path) -> LocalDocuments:
    """Reads the documents of a task.

    Args:
        task: one of `FORMATS`.
        path: a file, all of which is evaluated; or the folder with the task's files. There the split is evaluated that
            lm-eval's task evaluates (of XML files the test set), and the training set (of XML files the development
            set) is what few-shot examples come from.

    Raises:
        ValueError: there is no format for the task; a file is unreadable, empty, or lacks a column or a label.
        FileNotFoundError: there is no such path, or no file of the split.
    """
    form = _format(task)
    if path.is_file():
        return LocalDocuments(_evaluated(form, [path]), [], (path,))
    if not path.is_dir():
        raise FileNotFoundError(f"`data` must be existing files or folders, but there is no {path}")
    files = find_files(path, KINDS)
    for kind in KINDS:
        is_xml = kind == ".xml"
        evaluated = _of_split(files, path, kind, XML_SPLIT if is_xml else form.split)
        if evaluated:
            train = _of_split(files, path, kind, "validation" if is_xml else "train")
            return LocalDocuments(_evaluated(form, evaluated), _documents(form, train), tuple(evaluated))
    names = ", ".join(str(file.relative_to(path)) for file in files) or "none"
    raise FileNotFoundError(
        f"`data` must have a file of the split {form.split!r} for {task!r} ({', '.join(KINDS)}; of .xml the split "
        f"{XML_SPLIT!r}), but {path} has the files: {names}"
    )


def _format(task: str) -> TaskFormat:
    if task not in FORMATS:
        raise ValueError(f"`data` must be of the tasks {', '.join(FORMATS)}, but is of {task!r}")
    return FORMATS[task]


def _of_split(files: Iterable[Path], folder: Path, kind: str, split: str) -> list[Path]:
    return [file for file in files if file.suffix.lower() == kind and split_of(file, folder) == split]


def _documents(form: TaskFormat, files: Iterable[Path]) -> list[Row]:
    documents = []
    for file in files:
        for number, row in enumerate(read_rows(file)):
            try:
                documents.append(form.to_document(row))
            except (KeyError, TypeError) as error:
                raise ValueError(
                    f"row {number} of {file} must have a column {error}, but has {', '.join(map(str, row))} "
                    f"(labels of JSON lines may be in {file.stem}-labels.lst beside it)"
                ) from error
            except ValueError as error:
                raise ValueError(f"row {number} of {file} must have a valid label: {error}") from error
    return documents


def _evaluated(form: TaskFormat, files: Sequence[Path]) -> list[Row]:
    documents = _documents(form, files)
    if not documents:
        raise ValueError(f"`data` must have at least one document, but there is none in {', '.join(map(str, files))}")
    return documents
