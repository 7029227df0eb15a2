"""The names that every command takes: of models, and of texts. `embedded` stands for what comes with the package."""

from __future__ import annotations

from typing import cast

from moe_compiler.cli.options import EMBEDDED
from moe_compiler.embedded import MODEL_FOLDER, load_samples
from moe_compiler.embedded.generators import Split
from moe_compiler.sources import read_texts

_CHARACTERS_PER_TOKEN = 8
_FEWEST_TOKENS_PER_TEXT = 4


def model_path(name: str) -> str:
    """What `from_pretrained` takes for the name of a model."""
    return str(MODEL_FOLDER) if name == EMBEDDED else name


def has_held_out_split(source: str) -> bool:
    """Whether `texts_of` has other texts to measure on than to calibrate on: those of an embedded domain."""
    return source.startswith(f"{EMBEDDED}:") and source.count(":") == 1


def texts_of(
    source: str,
    *,
    tokens: int,
    held_out: bool = False,
    split: str | None = None,
    column: str | None = None,
    copies: str | None = None,
    seed: int = 0,
) -> list[str]:
    """Reads texts of about so many tokens or more.

    Args:
        source: see `moe_compiler.sources.read_texts`, or `embedded:DOMAIN`, `embedded:DOMAIN:SPLIT`.
        tokens: how many are wanted.
        held_out: whether the texts are to measure on: of an embedded domain those that its model never saw, of others
            the first in order, where otherwise they are drawn.
        split: which split of the data set.
        column: which column has the text.
        copies: a folder with local copies of hub data sets.
        seed: of the draw.

    Returns:
        The texts.

    Raises:
        FileNotFoundError: there is no such source.
        ValueError: it has no such split or domain, or no text.
    """
    if source == EMBEDDED or source.startswith(f"{EMBEDDED}:"):
        _, domain, own, *_ = [*source.split(":"), "", ""]
        chosen = own or split or ("evaluation" if held_out else "train")
        return load_samples(domain, cast(Split, chosen), max_characters=_CHARACTERS_PER_TOKEN * tokens)
    return read_texts(
        source,
        split=split,
        column=column,
        max_texts=max(64, tokens // _FEWEST_TOKENS_PER_TEXT),
        seed=None if held_out else seed,
        data=copies,
    )
