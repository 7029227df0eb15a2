"""Data files in local folders: which there are, which split each belongs to, and their rows."""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Collection, Iterable, Iterator, Mapping
from itertools import chain, groupby
from pathlib import Path
from typing import Any

import datasets

BUILDERS = {
    ".txt": "text",
    ".jsonl": "json",
    ".json": "json",
    ".parquet": "parquet",
    ".csv": "csv",
    ".tsv": "csv",
}
"""Kinds of files and the builder of the `datasets` library that reads them."""

SPLIT_WORDS = {
    "train": "train",
    "training": "train",
    "validation": "validation",
    "valid": "validation",
    "val": "validation",
    "dev": "validation",
    "test": "test",
    "testing": "test",
    "eval": "test",
    "evaluation": "test",
}
"""Words in the name of a file or folder and the split they stand for, as the `datasets` library reads them."""

Rows = Iterable[Mapping[str, Any]]


def kind_of(path: Path) -> str:
    """The suffix that tells the file's format, in lower case: `.json` for `c4-train.00000-of-01024.json.gz`."""
    name = path.name.lower()
    for suffix in (".gz", ".bz2", ".xz", ".zst"):
        name = name.removesuffix(suffix)
    return Path(name).suffix


def split_of(path: Path, folder: Path) -> str | None:
    """The split that the file's name stands for, else the one that a folder between it and `folder` does."""
    for part in reversed(path.relative_to(folder).parts):
        for word in re.split(r"[^a-z]+", part.lower()):
            if word in SPLIT_WORDS:
                return SPLIT_WORDS[word]
    return None


def find_files(folder: Path, kinds: Collection[str]) -> list[Path]:
    """The files of the given kinds in `folder` and below, without hidden ones, sorted by path."""
    return sorted(
        path
        for path in folder.rglob("*")
        if kind_of(path) in kinds
        and path.is_file()
        and not any(part.startswith((".", "__")) for part in path.relative_to(folder).parts)
    )


def choose_split(splits: Iterable[str], split: str | None, where: object) -> str:
    """`split` if there is such a one; without it `"train"`, or the only one.

    Raises:
        ValueError: there is no such split, or several and none is `"train"`.
    """
    known = list(splits)
    chosen = split or ("train" if "train" in known else known[0] if len(known) == 1 else None)
    if chosen not in known:
        raise ValueError(f"`split` must be one of {', '.join(known)}, which {where} has, but is {split!r}")
    return chosen


def local_rows(path: Path, split: str | None, sample_by: str) -> Rows:
    """The rows of a file, of a folder of files, or of what `datasets` saved to a folder, one after the other.

    Raises:
        FileNotFoundError: the folder has no data files.
        ValueError: the file is of another kind; there is no such split.
    """
    if any((path / file).is_file() for file in ("dataset_dict.json", "state.json")):
        saved = datasets.load_from_disk(str(path))
        if isinstance(saved, datasets.Dataset):
            saved = {str(saved.split or "train"): saved}
        rows: Rows = saved[choose_split(saved, split, path)]
        return rows
    files = find_files(path, BUILDERS) if path.is_dir() else [path]
    if not files:
        raise FileNotFoundError(f"`source` must have files of the kinds {', '.join(BUILDERS)}, but {path} has none")
    if kind_of(files[0]) not in BUILDERS:
        raise ValueError(f"`source` must be a file of the kinds {', '.join(BUILDERS)}, but is {path}")
    folder = path if path.is_dir() else path.parent
    by_split: dict[str, list[Path]] = {}
    for file in files:
        by_split.setdefault(split_of(file, folder) or "train", []).append(file)
    chosen = by_split[choose_split(by_split, split, path)]
    streams = (
        (kind, stream_files(kind, [str(file) for file in group], sample_by)) for kind, group in groupby(chosen, kind_of)
    )
    return chain.from_iterable(_to_the_end(rows) if BUILDERS[kind] == "csv" else rows for kind, rows in streams)


def _to_the_end(rows: Rows) -> Iterator[Mapping[str, Any]]:
    """The same rows; where fewer are asked for, the others are read too, so that the library closes its files."""
    remaining = iter(rows)
    try:
        for row in remaining:  # noqa: UP028 - `yield from` would close the library's generator
            yield row
    finally:
        deque(remaining, maxlen=0)


def stream_files(kind: str, files: list[str], sample_by: str = "document") -> datasets.IterableDataset:
    """The rows of files of one kind, paths or URLs, read when they are asked for."""
    options: dict[str, Any] = {}
    if kind == ".txt":
        options["sample_by"] = sample_by
    elif kind == ".tsv":
        options["sep"] = "\t"
    return datasets.load_dataset(BUILDERS[kind], data_files=files, split="train", streaming=True, **options)
