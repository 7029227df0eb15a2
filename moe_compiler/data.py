"""Calibration and evaluation samples: text, token ids and `datasets` become windows of token ids."""

from __future__ import annotations

from collections import UserDict
from collections.abc import Iterable, Mapping
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
            a `datasets.Dataset` with a column `input_ids` or `text`.
        name: what to call the dataset in messages.
        tokenizer: needed where `source` is text.
        sequence_length: tokens per window, at least 2.
        vocab_size: where given, ids must be below it.
        max_tokens: stop after about so many tokens.

    Returns:
        Windows, 1-D int64 tensors of 2 up to `sequence_length` token ids.

    Raises:
        ValueError: no samples, text without a tokenizer, a sample of fewer than two tokens, ids outside the vocabulary,
            a padded dataset.
        TypeError: `source` or a sample is none of the kinds above.
    """
    texts, ids = _sort_out(source, name)
    if texts:
        if tokenizer is None:
            raise ValueError(f"`tokenizer` is needed because dataset {name!r} holds text, but it is None")
        ids = [_tokenize(texts, tokenizer, max_tokens)]
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


def _sort_out(source: Any, name: str) -> tuple[list[str], list[Tensor]]:
    """The texts and the token ids of `source`, one of them empty."""
    if isinstance(source, Mapping | UserDict):
        raise TypeError(
            f"dataset {name!r} must be text, token ids or an iterable of them, but is a {type(source).__name__} with "
            f"{', '.join(map(str, source))}: give one of its values"
        )
    if isinstance(source, datasets.Dataset):
        columns = source.column_names
        if "attention_mask" in columns and any(0 in mask for mask in source["attention_mask"]):
            raise ValueError(f"dataset {name!r} must not be padded, but its `attention_mask` holds zeros")
        column = next((c for c in ("input_ids", "text") if c in columns), None)
        if column is None:
            raise ValueError(f"dataset {name!r} must have a column `input_ids` or `text`, but has {', '.join(columns)}")
        source = list(source[column])
    if isinstance(source, str):
        source = [source]
    if isinstance(source, Tensor):
        source = [source] if source.dim() == 1 else list(source)
    if not isinstance(source, Iterable):
        raise TypeError(
            f"dataset {name!r} must be text, token ids or an iterable of them, but is {type(source).__name__}"
        )
    texts: list[str] = []
    ids: list[Tensor] = []
    for number, sample in enumerate(source):
        if isinstance(sample, str):
            texts.append(sample)
        else:
            ids.append(_as_ids(sample, f"sample {number} of dataset {name!r}"))
    if texts and ids:
        raise TypeError(f"dataset {name!r} must hold either text or token ids, but holds both")
    return texts, ids


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


def _tokenize(texts: list[str], tokenizer: Any, max_tokens: int | None) -> Tensor:
    end = tokenizer.eos_token_id
    ids: list[int] = []
    for text in texts:
        if ids and end is not None:
            ids.append(end)
        ids += tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        if max_tokens is not None and len(ids) >= max_tokens:
            ids = ids[:max_tokens]
            break
    return torch.tensor(ids, dtype=torch.int64)
