"""Rows of the files that tasks are published as."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from moe_compiler.local_files import stream_files

Row = dict[str, Any]

KINDS = (".jsonl", ".parquet", ".tsv", ".xml")
"""Kinds of files, in the order in which one is preferred to another of the same split."""


def read_rows(path: Path) -> list[Row]:
    """The rows of a file of one of `KINDS`.

    Elements of an XML file become rows of their attributes and the texts of their children, without the line breaks in
    those. JSON lines may have their labels, one a line, in a file beside them that ends in `-labels.lst`, as PIQA's do.

    Raises:
        ValueError: the file is of another kind, or not what its name says, or the labels are not as many as the rows.
    """
    if path.suffix.lower() not in KINDS:
        raise ValueError(f"`data` must be files of the kinds {', '.join(KINDS)}, but is {path}")
    try:
        rows = _READERS[path.suffix.lower()](path)
    except (ValueError, ElementTree.ParseError, csv.Error) as error:
        raise ValueError(f"`data` must hold readable files, but {path} is not: {error}") from error
    labels = path.with_name(f"{path.stem}-labels.lst")
    if labels.is_file():
        values = labels.read_text(encoding="utf-8").split()
        if len(values) != len(rows):
            raise ValueError(f"{labels} must have a label for each row of {path}, {len(rows)}, but has {len(values)}")
        rows = [row | {"label": value} for row, value in zip(rows, values, strict=True)]
    return rows


def _read_jsonl(path: Path) -> list[Row]:
    lines = path.read_text(encoding="utf-8").split("\n")
    return [json.loads(line) for line in lines if line.strip()]


def _read_parquet(path: Path) -> list[Row]:
    return [dict(row) for row in stream_files(".parquet", [str(path)])]


def _read_tsv(path: Path) -> list[Row]:
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE))


def _read_xml(path: Path) -> list[Row]:
    return [
        element.attrib | {child.tag: " ".join((child.text or "").split()) for child in element}
        for element in ElementTree.parse(path).getroot()
    ]


_READERS = {".jsonl": _read_jsonl, ".parquet": _read_parquet, ".tsv": _read_tsv, ".xml": _read_xml}
