"""Windows of token ids from named texts."""

from __future__ import annotations

import argparse
from typing import Any

from moe_compiler.checks import vocabulary_size
from moe_compiler.cli.names import texts_of
from moe_compiler.data import load_samples
from moe_compiler.passes.calibrate import Dataset


def read_windows(
    source: str,
    tokenizer: Any,
    model: Any,
    options: argparse.Namespace,
    *,
    name: str,
    tokens: int,
    window: int,
    held_out: bool = False,
    seed: int = 0,
) -> Dataset:
    """Reads a source as windows of token ids.

    Args:
        source: see `moe_compiler.cli.names.texts_of`.
        tokenizer: turns text into ids.
        model: its vocabulary must have the ids.
        options: what was typed: has `split`, `column` and `copies`.
        name: what to call the data in messages.
        tokens: how many tokens at most; fewer where the source has fewer.
        window: tokens per window.
        held_out: whether the texts are to measure on.
        seed: draws the texts.

    Returns:
        The windows; all but the last have the same length.
    """
    texts = texts_of(
        source,
        tokens=tokens,
        held_out=held_out,
        split=options.split,
        column=options.column,
        copies=options.copies,
        seed=seed,
    )
    return load_samples(
        texts,
        name=name,
        tokenizer=tokenizer,
        sequence_length=window,
        vocab_size=vocabulary_size(model),
        max_tokens=tokens,
    )


def count(dataset: Dataset) -> int:
    """How many tokens the windows hold."""
    return sum(window.numel() for window in dataset)
