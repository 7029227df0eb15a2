"""Hub data sets: short names, local copies, the cache and the hub itself."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import datasets
from huggingface_hub import constants, hf_hub_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

from moe_compiler.local_files import BUILDERS, Rows, choose_split, kind_of, stream_files

SHUFFLE_BUFFER = 10_000
"""Rows among which a stream is shuffled."""


@dataclass(frozen=True)
class HubSource:
    """Where a data set lies on the hub.

    Args:
        path: its name, with the owner.
        name: its configuration.
        split: one of its splits.
        files: the file to read by split, where not all of the repository is wanted.
        revision: of the repository: a branch, tag or commit.
        streaming: whether to read it without downloading all of it first.
        articles: whether rows are the lines of articles with headings, as WikiText's are.
        short_name: what we call it.
    """

    path: str
    name: str | None = None
    split: str | None = None
    files: Mapping[str, str] | None = None
    revision: str = "main"
    streaming: bool = False
    articles: bool = False
    short_name: str | None = None

    def __str__(self) -> str:
        words = {"": self.path, "configuration ": self.name, "split ": self.split}
        return ", ".join(f"{word}{value!r}" for word, value in words.items() if value)

    def places(self, data: str | Path | None) -> list[Path]:
        """Where the folder `data` may have a local copy.

        Raises:
            FileNotFoundError: there is no such folder.
        """
        if data is None:
            return []
        root = Path(data).expanduser()
        if not root.is_dir():
            raise FileNotFoundError(f"`data` must be a folder with copies of hub data sets, but there is no {root}")
        names = dict.fromkeys((self.short_name, self.path, self.path.split("/")[-1]))
        return [root / name for name in names if name]

    def local_copy(self, data: str | Path | None) -> Path | None:
        """The folder in `data` with a copy of the data set and, where it has folders for them, the configuration."""
        for place in self.places(data):
            if place.exists():
                inner = place / self.name if self.name else place
                return inner if inner.exists() else place
        return None


SHORT_NAMES = {
    source.short_name: source
    for source in (
        HubSource("Salesforce/wikitext", "wikitext-2-raw-v1", articles=True, short_name="wikitext2"),
        HubSource(
            "ptb-text-only/ptb_text_only",
            "penn_treebank",
            files={split: f"penn_treebank/{split}/0000.parquet" for split in ("train", "validation", "test")},
            revision="refs/convert/parquet",
            short_name="ptb",
        ),
        HubSource(
            "allenai/c4",
            "en",
            files={
                "train": "en/c4-train.00000-of-01024.json.gz",
                "validation": "en/c4-validation.00000-of-00008.json.gz",
            },
            streaming=True,
            short_name="c4",
        ),
    )
}
"""The data sets that GPTQ and its successors are calibrated and measured on (arXiv 2210.17323, section 4); of C4 the
first file of each split, as in its code."""


def parse_source(source: str, split: str | None, streaming: bool | None) -> HubSource:
    """Reads a short name, `name`, `name:config` or `name:config:split`.

    Raises:
        FileNotFoundError: `source` looks like a path.
        ValueError: it has another form, or names another split than `split`.
    """
    if source in SHORT_NAMES:
        hub = replace(SHORT_NAMES[source], split=split)
    elif source.startswith((".", "/", "~", "\\")) or kind_of(Path(source)) in BUILDERS:
        raise FileNotFoundError(f"`source` must be an existing path or a hub data set, but there is no {source!r}")
    else:
        path, *rest = source.split(":")
        if len(rest) > 2 or not path:
            raise ValueError(f"`source` must be 'name', 'name:config' or 'name:config:split', but is {source!r}")
        name, own = [*(part or None for part in rest), None, None][:2]
        if own and split and own != split:
            raise ValueError(f"`split` must be {own!r}, as `source` {source!r} says, or left out, but is {split!r}")
        hub = HubSource(path, name, own or split)
    return hub if streaming is None else replace(hub, streaming=streaming)


def hub_rows(hub: HubSource, source: str, data: str | Path | None, seed: int | None) -> Rows:
    """The rows of a hub data set: from the cache, else downloaded, or streamed where `hub.streaming` says so.

    Args:
        hub: the data set.
        source: what the user called it.
        data: where local copies were looked for.
        seed: shuffles a stream, among `SHUFFLE_BUFFER` rows; not used otherwise.

    Raises:
        FileNotFoundError: it is neither in the cache nor to be reached.
        ValueError: it has no such configuration or split.
    """
    try:
        rows = _load_files(hub, hub.files) if hub.files else _load(hub)
    except (OSError, HfHubHTTPError, HFValidationError, datasets.exceptions.DatasetsError) as error:
        raise FileNotFoundError(_not_found(hub, source, data, error)) from error
    except ValueError as error:
        if "find cache for" in str(error):  # what `datasets` says offline, of a data set that is cached in part
            raise FileNotFoundError(_not_found(hub, source, data, error)) from error
        raise ValueError(f"`source` {source!r} is the hub data set {hub}: {error}") from error
    if hub.streaming and seed is not None:
        rows = rows.shuffle(seed=seed, buffer_size=SHUFFLE_BUFFER)
    typed: Rows = rows
    return typed


def _load(hub: HubSource) -> Any:
    found = datasets.load_dataset(hub.path, hub.name, revision=hub.revision, streaming=hub.streaming)
    return found[choose_split(found, hub.split, hub.path)]


def _load_files(hub: HubSource, files: Mapping[str, str]) -> Any:
    file = files[choose_split(files, hub.split, hub.path)]
    place = f"hf://datasets/{hub.path}@{hub.revision.replace('/', '%2F')}/{file}"
    try:
        place = hf_hub_download(
            hub.path, file, repo_type="dataset", revision=hub.revision, local_files_only=hub.streaming
        )
    except LocalEntryNotFoundError:
        if not hub.streaming:
            raise
    return stream_files(kind_of(Path(file)), [place])


def _not_found(hub: HubSource, source: str, data: str | Path | None, error: Exception) -> str:
    tried = [f"local copies {', '.join(map(str, hub.places(data)))}"] if data is not None else []
    tried += [f"the caches {datasets.config.HF_DATASETS_CACHE} and {constants.HF_HUB_CACHE}", "the hub"]
    return (
        f"`source` {source!r} is the hub data set {hub}, which was not found: {str(error).rstrip('.')}. "
        f"Tried {'; '.join(tried)}. "
        "Without the hub, give the path of a local copy as `source`, or as `data` (on the command line as `--copies`) "
        f"a folder that has one as {' or '.join(dict.fromkeys((hub.path, hub.path.split('/')[-1])))}"
    )
