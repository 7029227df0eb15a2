"""Calibration and evaluation samples: text, token ids and `datasets` become windows of token ids."""

from __future__ import annotations

from collections import UserDict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import datasets
import torch
from torch import Tensor

from moe_compiler.passes.calibrate import Dataset


def load_samples(
    source: Any,
    *,
    name: str = "samples",
    tokenizer: Any = None,
    sequence_length: int = 512,
    vocab_size: int | None = None,
    max_tokens: int | None = None,
) -> Dataset:
    """Turns one dataset into windows of token ids.

    Text is tokenized, joined (with the tokenizer's end-of-text token between texts, where it has one) and cut into
    windows of `sequence_length`; what is left over at the end is a shorter window, dropped only where it is a single
    token. Token ids stay samples of their own and are cut only where they are longer.

    Args:
        source: a text, an iterable of texts, a 1-D or 2-D integer tensor, an iterable of those or of lists of ints, or
            a `datasets.Dataset` or `datasets.IterableDataset` with a column `input_ids` or `text`.
        name: what to call the dataset in messages.
        tokenizer: needed where `source` is text.
        sequence_length: tokens per window, at least 2.
        vocab_size: where given, ids must be below it.
        max_tokens: stop after about so many tokens; what an iterable or a stream has beyond them is not read.

    Returns:
        Windows, 1-D int64 tensors of 2 up to `sequence_length` token ids.

    Raises:
        ValueError: no samples, text without a tokenizer, a sample of fewer than two tokens, ids outside the vocabulary,
            a padded dataset.
        TypeError: `source` or a sample is none of the kinds above.
    """
    ids = _take(_open(source, name), name, tokenizer, max_tokens)
    if not ids:
        raise ValueError(f"dataset {name!r} must hold at least one sample, but is empty")
    windows: list[Tensor] = []
    tokens = 0
    for number, sample in enumerate(ids):
        if sample.numel() < 2:
            raise ValueError(
                f"every sample must have at least 2 tokens, but sample {number} of dataset {name!r} "
                f"has {sample.numel()}"
            )
        if int(sample.min()) < 0 or (vocab_size is not None and int(sample.max()) >= vocab_size):
            bad = int(sample.min()) if int(sample.min()) < 0 else int(sample.max())
            raise ValueError(
                f"token ids must lie in [0, {vocab_size}), the model's vocabulary, "
                f"but sample {number} of dataset {name!r} holds {bad}"
            )
        pieces = [piece for piece in sample.split(sequence_length) if piece.numel() >= 2]
        windows += pieces
        tokens += sum(piece.numel() for piece in pieces)
        if max_tokens is not None and tokens >= max_tokens:
            break
    return windows


def load_calibration(
    calibration: Any, *, tokenizer: Any = None, sequence_length: int = 512, vocab_size: int | None = None
) -> dict[str, Dataset]:
    """Turns the mapping that `dynamo_compile` takes into windows of token ids by dataset.

    Raises:
        TypeError: `calibration` is not a mapping from names to samples.
        ValueError: it is empty, or a dataset is bad (see `load_samples`).
    """
    if not isinstance(calibration, Mapping):
        raise TypeError(
            "`calibration` must be a mapping from a dataset's name to its samples, "
            f'such as {{"wiki": texts}}, but is a {type(calibration).__name__}'
        )
    if not calibration:
        raise ValueError("`calibration` must name at least one dataset, but is empty")
    return {
        str(name): load_samples(
            source,
            name=str(name),
            tokenizer=tokenizer,
            sequence_length=sequence_length,
            vocab_size=vocab_size,
        )
        for name, source in calibration.items()
    }


def _open(source: Any, name: str) -> Iterable[Any]:
    """The samples of `source`, texts or token ids."""
    if isinstance(source, Mapping | UserDict):
        raise TypeError(
            f"dataset {name!r} must be text, token ids or an iterable of them, but is a {type(source).__name__} with "
            f"{', '.join(map(str, source))}: give one of its values"
        )
    if isinstance(source, datasets.IterableDataset):
        return _stream(source, name)
    if isinstance(source, datasets.Dataset):
        if "attention_mask" in source.column_names:
            _refuse_padding(source["attention_mask"], name)
        return list(source[_column(source.column_names, name)])
    if isinstance(source, str):
        return [source]
    if isinstance(source, Tensor):
        return [source] if source.dim() == 1 else list(source)
    if not isinstance(source, Iterable):
        raise TypeError(
            f"dataset {name!r} must be text, token ids or an iterable of them, but is {type(source).__name__}"
        )
    if isinstance(source, Sequence) and len({isinstance(sample, str) for sample in source}) > 1:
        raise _mixed(name)
    return source


def _stream(rows: Iterable[Mapping[str, Any]], name: str) -> Iterator[Any]:
    column: str | None = None
    for row in rows:
        column = column or _column(row, name)
        if "attention_mask" in row:
            _refuse_padding([row["attention_mask"]], name)
        yield row[column]


def _column(columns: Iterable[str], name: str) -> str:
    column = next((column for column in ("input_ids", "text") if column in columns), None)
    if column is None:
        raise ValueError(f"dataset {name!r} must have a column `input_ids` or `text`, but has {', '.join(columns)}")
    return column


def _refuse_padding(masks: Iterable[Any], name: str) -> None:
    if any(0 in mask for mask in masks):
        raise ValueError(f"dataset {name!r} must not be padded, but its `attention_mask` holds zeros")


def _take(samples: Iterable[Any], name: str, tokenizer: Any, max_tokens: int | None) -> list[Tensor]:
    """The token ids of each sample, or of all texts together; reads no more samples than `max_tokens` needs."""
    texts: list[int] = []
    ids: list[Tensor] = []
    is_text: bool | None = None
    tokens = 0
    for number, sample in enumerate(samples):
        if is_text not in (None, isinstance(sample, str)):
            raise _mixed(name)
        is_text = isinstance(sample, str)
        if is_text:
            texts += _tokenize(sample, name, tokenizer, bool(texts))
            tokens = len(texts)
        else:
            ids.append(_as_ids(sample, f"sample {number} of dataset {name!r}"))
            tokens += ids[-1].numel()
        if max_tokens is not None and tokens >= max_tokens:
            break
    return [torch.tensor(texts[:max_tokens], dtype=torch.int64)] if is_text else ids


def _mixed(name: str) -> TypeError:
    return TypeError(f"dataset {name!r} must hold either text or token ids, but holds both")


def _tokenize(text: str, name: str, tokenizer: Any, follows: bool) -> list[int]:
    """Token ids of a text, after the end-of-text token where it `follows` another one."""
    if tokenizer is None:
        raise ValueError(f"`tokenizer` is needed because dataset {name!r} holds text, but it is None")
    ids: list[int] = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    return [tokenizer.eos_token_id, *ids] if follows and tokenizer.eos_token_id is not None else ids


def _as_ids(sample: Any, where: str) -> Tensor:
    try:
        tensor = torch.as_tensor(sample)
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(f"{where} must be text or token ids, but is a {type(sample).__name__}") from error
    if tensor.numel() and (tensor.is_floating_point() or tensor.is_complex() or tensor.dtype == torch.bool):
        raise TypeError(f"{where} must hold integers, but is {tensor.dtype}")
    if tensor.dim() == 2 and tensor.shape[0] == 1:
        tensor = tensor[0]
    if tensor.dim() != 1:
        raise ValueError(f"{where} must be 1-D, but has shape {tuple(tensor.shape)}")
    return tensor.long().cpu()
