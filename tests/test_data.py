"""Samples of every kind become windows of token ids; bad ones are refused before anything else happens."""

import re
from typing import Any

import datasets
import pytest
import torch
import transformers

from moe_compiler.data import load_calibration, load_samples
from moe_compiler.passes.calibrate import batches


class Tokenizer:
    """One token per character, 0 between texts."""

    eos_token_id = 0

    def __call__(self, text: str, **_: Any) -> dict[str, list[int]]:
        return {"input_ids": [ord(character) for character in text]}


def as_lists(windows: Any) -> list[list[int]]:
    return [window.tolist() for window in windows]


def test_text_is_joined_and_cut_into_windows() -> None:
    windows = load_samples(["abc", "de"], tokenizer=Tokenizer(), sequence_length=4)
    assert as_lists(windows) == [[97, 98, 99, 0], [100, 101]]
    assert as_lists(load_samples("abcde", tokenizer=Tokenizer(), sequence_length=4)) == [[97, 98, 99, 100]]
    assert sum(map(len, load_samples(["a" * 50] * 9, tokenizer=Tokenizer(), max_tokens=60))) == 60


@pytest.mark.parametrize(
    "source",
    [
        torch.tensor([[5, 6, 7], [8, 9, 1]]),
        [torch.tensor([5, 6, 7]), torch.tensor([8, 9, 1])],
        [[5, 6, 7], [8, 9, 1]],
        ([5, 6, 7], torch.tensor([[8, 9, 1]], dtype=torch.int32)),
        datasets.Dataset.from_dict({"input_ids": [[5, 6, 7], [8, 9, 1]], "label": [0, 1]}),
        (ids for ids in ([5, 6, 7], [8, 9, 1])),
    ],
    ids=["2-D", "tensors", "lists", "mixed", "datasets", "generator"],
)
def test_token_ids_of_every_kind(source: Any) -> None:
    assert as_lists(load_samples(source)) == [[5, 6, 7], [8, 9, 1]]


def test_a_dataset_of_text() -> None:
    source = datasets.Dataset.from_dict({"text": ["ab", "cd"]})
    assert as_lists(load_samples(source, tokenizer=Tokenizer())) == [[97, 98, 0, 99, 100]]


def test_long_samples_are_cut_and_a_single_token_left_over_is_dropped() -> None:
    assert as_lists(load_samples(torch.arange(9), sequence_length=4)) == [[0, 1, 2, 3], [4, 5, 6, 7]]


def test_batches_never_mix_lengths_and_keep_the_order() -> None:
    windows = [torch.full((n,), i) for i, n in enumerate([4, 4, 4, 3, 4])]
    shapes = [tuple(batch.shape) for batch in batches(windows, tokens_per_batch=8)]
    assert shapes == [(2, 4), (1, 4), (1, 3), (1, 4)]


BAD: list[tuple[Any, type[Exception], str]] = [
    ({}, ValueError, "`calibration` must name at least one dataset, but is empty"),
    (["text"], TypeError, "`calibration` must be a mapping from a dataset's name to its samples"),
    ({"wiki": []}, ValueError, "dataset 'wiki' must hold at least one sample, but is empty"),
    ({"wiki": torch.zeros(0, 4).long()}, ValueError, "dataset 'wiki' must hold at least one sample, but is empty"),
    ({"wiki": ["text"]}, ValueError, "`tokenizer` is needed because dataset 'wiki' holds text, but it is None"),
    ({"wiki": [[1, 2], [3]]}, ValueError, "sample 1 of dataset 'wiki' has 1"),
    ({"wiki": [[1, 2], []]}, ValueError, "sample 1 of dataset 'wiki' has 0"),
    ({"wiki": [[1, 50]]}, ValueError, "token ids must lie in [0, 50), the model's vocabulary, but sample 0 of dataset 'wiki' holds 50"),
    ({"wiki": [[1, -2]]}, ValueError, "sample 0 of dataset 'wiki' holds -2"),
    ({"wiki": [[0.5, 2.0]]}, TypeError, "sample 0 of dataset 'wiki' must hold integers, but is torch.float32"),
    ({"wiki": [object()]}, TypeError, "sample 0 of dataset 'wiki' must be text or token ids, but is a object"),
    ({"wiki": torch.zeros(2, 2, 2).long()}, ValueError, "sample 0 of dataset 'wiki' must be 1-D, but has shape (2, 2)"),
    ({"wiki": ["text", [1, 2]]}, TypeError, "dataset 'wiki' must hold either text or token ids, but holds both"),
    ({"wiki": {"text": ["a"]}}, TypeError, "but is a dict with text: give one of its values"),
    ({"wiki": transformers.BatchEncoding({"input_ids": [[1, 2]]})}, TypeError, "but is a BatchEncoding with input_ids"),
    ({"wiki": datasets.DatasetDict(train=datasets.Dataset.from_dict({"text": ["x"]}))}, TypeError, "but is a DatasetDict with train"),
    ({"wiki": datasets.Dataset.from_dict({"input_ids": [[1, 0]], "attention_mask": [[1, 0]]})}, ValueError, "dataset 'wiki' must not be padded"),
    ({"wiki": 3}, TypeError, "dataset 'wiki' must be text, token ids or an iterable of them, but is int"),
    ({"wiki": datasets.Dataset.from_dict({"body": ["x"]})}, ValueError, "dataset 'wiki' must have a column `input_ids` or `text`, but has body"),
]  # fmt: skip


@pytest.mark.parametrize(("calibration", "error", "message"), BAD, ids=[case[-1][:40] for case in BAD])
def test_bad_samples_are_refused(calibration: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=re.escape(message)):
        load_calibration(calibration, vocab_size=50)
