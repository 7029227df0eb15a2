"""Texts from files of every kind, from folders, from local copies and caches of hub data sets; never a network."""

import gzip
import itertools
import json
import random
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import datasets
import huggingface_hub
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_compiler.data import load_samples
from moe_compiler.hub_sources import SHORT_NAMES
from moe_compiler.sources import _articles, _draw, read_texts

TEXTS = [f"text {number}" for number in range(40)]
ROWS = [{"text": text, "number": number} for number, text in enumerate(TEXTS)]
WIKITEXT = [
    "",
    " = Ants = \n",
    "",
    " Ants work . \n",
    " = = Nests = = \n",
    "",
    " = Bees = \n",
    "",
    " Bees fly . \n",
    "",
]


@pytest.fixture(autouse=True)
def caches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, Path]:
    """Empty caches of the two libraries, instead of the user's."""
    places = tmp_path / "home" / "datasets", tmp_path / "home" / "hub"
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(places[0]))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(places[1]))
    return places


def write_jsonl(path: Path, rows: list[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def write_gzip(path: Path, rows: list[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(gzip.compress("".join(json.dumps(row) + "\n" for row in rows).encode()))


WRITERS: dict[str, Callable[[Path], Any]] = {
    "rows.jsonl": lambda path: write_jsonl(path, ROWS),
    "rows.json": lambda path: path.write_text(json.dumps(ROWS)),
    "rows.jsonl.gz": lambda path: write_gzip(path, ROWS),
    "rows.parquet": lambda path: datasets.Dataset.from_list(ROWS).to_parquet(path),
    "rows.csv": lambda path: path.write_text("text,number\n" + "".join(f"{t},{n}\n" for n, t in enumerate(TEXTS))),
    "rows.tsv": lambda path: path.write_text("text\tnumber\n" + "".join(f"{t}\t{n}\n" for n, t in enumerate(TEXTS))),
    "saved": lambda path: datasets.Dataset.from_list(ROWS).save_to_disk(path),
    "splits": lambda path: datasets.DatasetDict({"train": datasets.Dataset.from_list(ROWS)}).save_to_disk(path),
}


@pytest.mark.parametrize("name", WRITERS)
def test_every_kind_gives_the_same_texts(tmp_path: Path, name: str) -> None:
    WRITERS[name](tmp_path / name)
    source = str(tmp_path / name)
    assert read_texts(source) == TEXTS
    assert read_texts(source, max_texts=3, seed=None) == TEXTS[:3]
    drawn = read_texts(source, max_texts=12, seed=5)
    assert drawn == read_texts(source, max_texts=12, seed=5) != read_texts(source, max_texts=12, seed=6)
    assert len(set(drawn)) == 12
    assert set(drawn) < set(TEXTS)
    assert sorted(read_texts(source, max_texts=1000)) == sorted(TEXTS)


@pytest.mark.parametrize(
    ("sample_by", "texts"),
    [("document", ["a b\n\nc\nd\n"]), ("paragraph", ["a b", "c\nd\n"]), ("line", ["a b", "c", "d"])],
)
def test_what_a_text_is_in_a_text_file(tmp_path: Path, sample_by: str, texts: list[str]) -> None:
    (tmp_path / "notes.txt").write_text("a b\n\nc\nd\n")
    assert read_texts(str(tmp_path / "notes.txt"), sample_by=sample_by) == texts


def test_a_folder_is_read_by_split_and_in_the_order_of_its_files(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "b-train.jsonl", ROWS[:2])
    (tmp_path / "c-train.txt").write_text("a file")
    write_jsonl(tmp_path / "deep" / "a-train.jsonl", ROWS[2:3])
    write_jsonl(tmp_path / "test" / "0000.jsonl", ROWS[3:4])
    write_jsonl(tmp_path / "my-dev.jsonl", ROWS[4:5])
    write_jsonl(tmp_path / ".hidden" / "train.jsonl", ROWS[5:6])
    (tmp_path / "README.md").write_text("not data")
    assert read_texts(str(tmp_path)) == ["text 0", "text 1", "a file", "text 2"]
    assert read_texts(str(tmp_path), split="test") == ["text 3"]
    assert read_texts(str(tmp_path), split="validation") == ["text 4"]
    with pytest.raises(ValueError, match=r"`split` must be one of train, validation, test, which .* but is 'dev'"):
        read_texts(str(tmp_path), split="dev")


def test_the_only_split_is_the_default_and_names_without_one_are_train(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "latest.jsonl", ROWS[:1])  # "test" inside a word is no split
    assert read_texts(str(tmp_path), split="train") == TEXTS[:1]
    write_jsonl(tmp_path / "latest.jsonl", ROWS[:1])
    (tmp_path / "latest.jsonl").rename(tmp_path / "test.jsonl")
    assert read_texts(str(tmp_path)) == TEXTS[:1]


def test_empty_texts_are_dropped_and_the_only_column_of_strings_is_found(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "a.jsonl", [{"id": 1, "body": "x"}, {"id": 2, "body": " \n"}, {"id": 3, "body": None}])
    assert read_texts(str(tmp_path / "a.jsonl")) == ["x"]
    write_jsonl(tmp_path / "b.jsonl", [{"goal": "g", "answer": "a"}])
    assert read_texts(str(tmp_path / "b.jsonl"), column="answer") == ["a"]


def wikitext(folder: Path) -> None:
    """The layout that the hub's repository has."""
    for split, rows in {"train": WIKITEXT, "test": WIKITEXT[:5]}.items():
        folder.mkdir(parents=True, exist_ok=True)
        datasets.Dataset.from_dict({"text": rows}).to_parquet(folder / f"{split}-00000-of-00001.parquet")


@pytest.mark.parametrize("place", ["Salesforce/wikitext/wikitext-2-raw-v1", "wikitext/wikitext-2-raw-v1", "wikitext2"])
def test_a_local_copy_of_wikitext_gives_articles(tmp_path: Path, place: str) -> None:
    wikitext(tmp_path / place)
    articles = read_texts("wikitext2", data=tmp_path)
    assert [re.findall(r"^ = (\w+) = $", article, re.MULTILINE) for article in articles] == [["Ants"], ["Bees"]]
    assert "\n\n".join(articles) == "\n\n".join(WIKITEXT)
    assert len(read_texts("wikitext2", split="test", data=str(tmp_path))) == 1
    assert read_texts(str(tmp_path / place), max_texts=1, seed=None) == [" = Ants = \n"]
    if place.count("/"):
        name = place.rsplit("/", 1)[0]
        assert read_texts(f"{name}:wikitext-2-raw-v1:test", data=tmp_path) == [line for line in WIKITEXT[:5] if line]


@given(st.lists(st.sampled_from(["", " = A = \n", " = = B = = \n", " words \n"]), min_size=1))
@settings(deadline=None, max_examples=50)
def test_articles_lose_no_line(lines: list[str]) -> None:
    articles = list(_articles(lines))
    assert "\n\n".join(articles) == "\n\n".join(lines)
    assert len(articles) == max(1, lines.count(" = A = \n"))


def test_every_text_is_drawn_equally_often() -> None:
    generator = random.Random(0)
    counts = dict.fromkeys("abcdef", 0)
    for _ in range(3000):
        for text in _draw("abcdef", 2, generator):
            counts[text] += 1
    assert all(abs(count - 1000) < 120 for count in counts.values()), counts


def hub_cache(cache: Path, short_name: str, split: str, write: Callable[[Path], Any]) -> None:
    """A file as `huggingface_hub` caches it."""
    source = SHORT_NAMES[short_name]
    assert source.files is not None
    folder = cache / f"datasets--{source.path.replace('/', '--')}"
    commit = "0" * 40
    file = folder / "snapshots" / commit / source.files[split]
    file.parent.mkdir(parents=True)
    write(file)
    reference = folder / "refs" / source.revision
    reference.parent.mkdir(parents=True)
    reference.write_text(commit)


def test_c4_is_streamed_from_the_cache(caches: tuple[Path, Path]) -> None:
    hub_cache(caches[1], "c4", "validation", lambda path: write_gzip(path, ROWS))
    assert read_texts("c4", split="validation", max_texts=5, seed=None) == TEXTS[:5]
    drawn = read_texts("c4", split="validation", max_texts=40)
    assert sorted(drawn) == sorted(TEXTS)
    assert drawn != TEXTS
    assert drawn[:7] == read_texts("c4", split="validation", max_texts=7)
    assert drawn != read_texts("c4", split="validation", max_texts=40, seed=1)
    assert read_texts("c4", split="validation", streaming=False) == TEXTS


def test_ptb_is_read_from_the_cache(caches: tuple[Path, Path]) -> None:
    rows = datasets.Dataset.from_dict({"sentence": TEXTS})
    hub_cache(caches[1], "ptb", "test", rows.to_parquet)
    assert read_texts("ptb", split="test") == TEXTS


@pytest.mark.parametrize("streaming", [False, True])
def test_a_data_set_is_read_from_the_cache(tmp_path: Path, caches: tuple[Path, Path], streaming: bool) -> None:
    write_jsonl(tmp_path / "rows.jsonl", ROWS)
    datasets.load_dataset("json", data_files=str(tmp_path / "rows.jsonl"))
    prepared = next(caches[0].glob("json/default-*/0.0.0/*/json-train.arrow")).parent
    target = caches[0] / "someone___things" / "default" / "0.0.0" / prepared.name
    target.mkdir(parents=True)
    info = json.loads((prepared / "dataset_info.json").read_text()) | {"config_name": "default"}
    (target / "dataset_info.json").write_text(json.dumps(info))
    (target / "things-train.arrow").write_bytes((prepared / "json-train.arrow").read_bytes())
    assert read_texts("someone/things", streaming=streaming, max_texts=9, seed=None) == TEXTS[:9]
    assert read_texts("someone/things:default:train", streaming=streaming, max_texts=99, seed=3) != TEXTS
    with pytest.raises(ValueError, match="`split` must be one of train, which someone/things has, but is 'test'"):
        read_texts("someone/things", split="test")
    with pytest.raises(FileNotFoundError, match="configuration 'other', which was not found: Couldn't find cache for"):
        read_texts("someone/things:other")


@pytest.mark.parametrize("source", ["wikitext2", "c4", "ptb", "someone/nothing", "someone/nothing:config:test"])
def test_without_a_hub_it_says_what_was_tried(tmp_path: Path, source: str) -> None:
    name = SHORT_NAMES[source].path if source in SHORT_NAMES else "someone/nothing"
    with pytest.raises(FileNotFoundError, match=f"`source` '{source}' is the hub data set '{name}'") as caught:
        read_texts(source, max_texts=1, data=tmp_path)
    for part in (f"local copies {tmp_path}", str(tmp_path / "home" / "datasets"), "the hub", "path of a local copy"):
        assert part in str(caught.value)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"source": 3}, TypeError, "`source` must be a string, but is a int"),
        ({"source": ""}, ValueError, "`source` must name a data set or a path, but is empty"),
        ({"source": "a:b:c:d"}, ValueError, "must be 'name', 'name:config' or 'name:config:split', but is 'a:b:c:d'"),
        ({"source": "a:b:test", "split": "train"}, ValueError, "`split` must be 'test', as `source` 'a:b:test' says"),
        ({"source": "./nowhere"}, FileNotFoundError, "must be an existing path .* there is no './nowhere'"),
        ({"source": "no.jsonl"}, FileNotFoundError, "must be an existing path .* there is no 'no.jsonl'"),
        ({"source": "c4"}, ValueError, "`max_texts` must be given where a data set is streamed, as 'c4' is"),
        ({"source": "c4", "max_texts": 0}, ValueError, "`max_texts` must be at least 1, but is 0"),
        ({"source": "c4", "sample_by": "word"}, ValueError, "'paragraph' or 'line', but is 'word'"),
        ({"source": "c4", "data": "./nowhere"}, FileNotFoundError, "`data` must be a folder .* there is no nowhere"),
        ({"source": "c4", "split": "dev", "max_texts": 1}, ValueError, "`split` must be one of train, validation"),
    ],
)
def test_bad_arguments(options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        read_texts(**options)


@pytest.mark.parametrize(
    ("rows", "column", "message"),
    [
        ([{"goal": "g", "answer": "a"}], None, "`column` must be given, since .* the columns goal, answer"),
        ([{"number": 1}], None, "neither `text` nor a single column of strings, but the columns number"),
        ([{"text": "g"}], "body", "`column` must be one of text, which .* but is 'body'"),
        ([{"text": ["g"]}], None, "`column` must be one of strings, but 'text' of .* holds a list in row 0"),
        ([{"text": " "}], None, "must hold at least one text, but there are none"),
    ],
)
def test_bad_columns(tmp_path: Path, rows: list[dict[str, Any]], column: str | None, message: str) -> None:
    write_jsonl(tmp_path / "rows.jsonl", rows)
    with pytest.raises(ValueError, match=message):
        read_texts(str(tmp_path / "rows.jsonl"), column=column)


def test_a_folder_without_data_and_a_file_of_another_kind(tmp_path: Path) -> None:
    (tmp_path / "a.bin").write_bytes(b"")
    with pytest.raises(FileNotFoundError, match=r"must have files of the kinds \.txt, .* has none"):
        read_texts(str(tmp_path))
    with pytest.raises(ValueError, match=r"must be a file of the kinds \.txt, .* but is .*a\.bin"):
        read_texts(str(tmp_path / "a.bin"))


class Tokenizer:
    """One token per character, 0 between texts."""

    eos_token_id = 0

    def __call__(self, text: str, **_: Any) -> dict[str, list[int]]:
        return {"input_ids": [ord(character) for character in text]}


def test_a_stream_is_calibration_data_and_read_no_further_than_needed() -> None:
    read: list[int] = []

    def rows() -> Iterator[dict[str, Any]]:
        for number in itertools.count():
            read.append(number)
            yield {"number": number, "text": "abc"}

    stream = datasets.IterableDataset.from_generator(rows)
    windows = load_samples(stream, tokenizer=Tokenizer(), sequence_length=4, max_tokens=10)
    assert [window.tolist() for window in windows] == [[97, 98, 99, 0], [97, 98, 99, 0], [97, 98]]
    assert len(read) == 3
    whole = load_samples(stream.take(5), tokenizer=Tokenizer(), sequence_length=4)
    assert sum(map(len, whole)) == 5 * 3 + 4


def test_a_stream_of_token_ids() -> None:
    def rows(**columns: Any) -> datasets.IterableDataset:
        return datasets.Dataset.from_dict(columns).to_iterable_dataset()

    assert [w.tolist() for w in load_samples(rows(input_ids=[[1, 2], [3, 4]]), max_tokens=2)] == [[1, 2]]
    with pytest.raises(ValueError, match="dataset 'wiki' must not be padded"):
        load_samples(rows(input_ids=[[1, 2]], attention_mask=[[1, 0]]), name="wiki")
    with pytest.raises(ValueError, match="dataset 'wiki' must have a column `input_ids` or `text`, but has body"):
        load_samples(rows(body=["a"]), name="wiki")
    with pytest.raises(ValueError, match="`tokenizer` is needed because dataset 'wiki' holds text"):
        load_samples(rows(text=["a"]), name="wiki")
