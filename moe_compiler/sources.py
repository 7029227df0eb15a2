"""Texts by name: hub data sets and local files of every common kind."""

from __future__ import annotations

import random
import re
from collections.abc import Iterable, Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import Any

from moe_compiler.hub_sources import SHORT_NAMES, hub_rows, parse_source
from moe_compiler.local_files import Rows, local_rows


def read_texts(
    source: str,
    *,
    split: str | None = None,
    column: str | None = None,
    max_texts: int | None = None,
    seed: int | None = 0,
    streaming: bool | None = None,
    sample_by: str = "document",
    data: str | Path | None = None,
) -> list[str]:
    """Reads texts from the hub, its cache or local files.

    A text is a row of the data set; of `wikitext2` it is an article, and the articles of the split `test`, joined with
    a blank line between, are the text whose perplexity papers report. Empty texts are dropped.

    Args:
        source: `"wikitext2"`, `"c4"` or `"ptb"`; a hub data set as `"name"`, `"name:config"` or `"name:config:split"`;
            a local file (`.txt`, `.jsonl`, `.json`, `.parquet`, `.csv`, `.tsv`, also compressed); or a folder of such
            files, in the layout of a hub repository, or as `datasets` saved it.
        split: which split. Without it `"train"`, or the only one there is. A file belongs to the split that its name,
            or a folder's, stands for; to `"train"` where none does.
        column: which column holds the text. Without it `text`, or the only column of strings.
        max_texts: at most so many texts.
        seed: draws `max_texts` of them, without replacement and in random order, the same for the same seed. With
            `None` they are the first ones, in order.
        streaming: whether to read a hub data set without downloading all of it; needs `max_texts`. A stream is shuffled
            among 10,000 rows only. Without it `"c4"` is streamed and others are not. Local files are read in one pass
            and never held in memory as a whole, whatever this says.
        sample_by: what is a text in a `.txt` file: `"document"` (the file), `"paragraph"` (blank lines between) or
            `"line"`.
        data: a folder with local copies of hub data sets, each as `owner/name` or `name` (or under the short name).
            Those that it has are read from there.

    Returns:
        The texts; without `max_texts` all of them, in the order of the source.

    Raises:
        FileNotFoundError: the path does not exist or has no data files; the hub data set is neither in `data` nor in
            the cache nor to be reached.
        ValueError: an argument is out of range; no such configuration, split or column; several columns of strings and
            none is `text`; there are no texts.
        TypeError: `source` is not a string.
    """
    if not isinstance(source, str):
        raise TypeError(f"`source` must be a string, but is a {type(source).__name__}")
    if not source:
        raise ValueError("`source` must name a data set or a path, but is empty")
    if max_texts is not None and max_texts < 1:
        raise ValueError(f"`max_texts` must be at least 1, but is {max_texts}")
    if sample_by not in ("document", "paragraph", "line"):
        raise ValueError(f"`sample_by` must be 'document', 'paragraph' or 'line', but is {sample_by!r}")
    articles = shuffled = False
    if source not in SHORT_NAMES and (path := Path(source).expanduser()).exists():
        rows = local_rows(path, split, sample_by)
    else:
        hub = parse_source(source, split, streaming)
        articles = hub.articles
        if copy := hub.local_copy(data):
            rows = local_rows(copy, hub.split, sample_by)
        else:
            if hub.streaming and max_texts is None:
                raise ValueError(f"`max_texts` must be given where a data set is streamed, as {source!r} is")
            shuffled = hub.streaming and not articles
            rows = hub_rows(hub, source, data, seed if shuffled else None)
    texts = _column(rows, source, column)
    if articles:
        texts = _articles(texts)
    texts = (text for text in texts if text.strip())
    if max_texts is None or seed is None or shuffled:
        found = list(islice(texts, max_texts))
    else:
        found = _draw(texts, max_texts, random.Random(seed))
    if not found:
        raise ValueError(f"`source` {source!r} must hold at least one text, but there are none")
    return found


def _column(rows: Rows, source: str, column: str | None) -> Iterator[str]:
    """The text of each row, `""` where it has none."""
    chosen: str | None = None
    for number, row in enumerate(rows):
        if chosen is None:
            chosen = _choose_column(row, source, column)
        text = row[chosen]
        if not isinstance(text, str | None):
            raise ValueError(
                f"`column` must be one of strings, but {chosen!r} of {source!r} holds a {type(text).__name__} "
                f"in row {number}"
            )
        yield text or ""


def _choose_column(row: Mapping[str, Any], source: str, column: str | None) -> str:
    if column is not None:
        if column not in row:
            raise ValueError(f"`column` must be one of {', '.join(row)}, which {source!r} has, but is {column!r}")
        return column
    if "text" in row:
        return "text"
    strings = [name for name, value in row.items() if isinstance(value, str)]
    if len(strings) != 1:
        raise ValueError(
            f"`column` must be given, since {source!r} has neither `text` nor a single column of strings, "
            f"but the columns {', '.join(row)}"
        )
    return strings[0]


def _articles(lines: Iterable[str]) -> Iterator[str]:
    """Joins the lines of WikiText to articles; each begins with a line such as ` = Title = `."""
    article: list[str] = []
    begun = False
    for line in lines:
        heading = re.fullmatch(r" = [^=].* = \n?", line) is not None
        if heading and begun:
            yield "\n\n".join(article)
            article = []
        begun = begun or heading
        article.append(line)
    yield "\n\n".join(article)


def _draw(texts: Iterable[str], count: int, generator: random.Random) -> list[str]:
    """Draws without replacement in one pass (algorithm R; Vitter, 1985), in random order."""
    drawn: list[str] = []
    for number, text in enumerate(texts):
        if number < count:
            drawn.append(text)
        elif (place := generator.randrange(number + 1)) < count:
            drawn[place] = text
    generator.shuffle(drawn)
    return drawn
