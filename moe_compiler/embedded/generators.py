"""Endless generated text, with a split that is disjoint by construction.

A document is a list of short items (a sum, a record, an element). The hash of an item's text decides its
split, and a generator draws again until the item belongs to the split it was asked for. Only the
lines that open or close a document (a CSV header, the head of a page) are in both splits.
"""

import zlib
from collections.abc import Iterator
from random import Random
from typing import Literal

from moe_compiler.embedded.arithmetic import arithmetic_form
from moe_compiler.embedded.markup import markup_form
from moe_compiler.embedded.records import record_form

Split = Literal["train", "evaluation"]
EVALUATION_SHARE = 8  # one text in so many is held out

_FORMS = {"arithmetic": arithmetic_form, "records": record_form, "markup": markup_form}
GENERATED_DOMAINS: tuple[str, ...] = tuple(_FORMS)


def held_out(text: str) -> bool:
    """Tell if a text belongs to the evaluation split.

    Args:
        text: an item of a document, or the name of a module or topic.

    Returns:
        True for one text in `EVALUATION_SHARE`, by CRC-32 of its UTF-8 bytes: the same everywhere.
    """
    return zlib.crc32(text.encode()) % EVALUATION_SHARE == 0


def generate_documents(domain: str, split: Split, seed: int = 0) -> Iterator[str]:
    """Generate documents of one domain without end.

    Args:
        domain: one of `GENERATED_DOMAINS`.
        split: every item has `held_out(item) == (split == "evaluation")`.
        seed: another seed gives other documents of the same split.

    Yields:
        Documents of 8 to 20 items, with a line feed after each line.
    """
    number = 0
    while True:
        random = Random(f"{domain}/{split}/{seed}/{number}")
        form = _FORMS[domain](random)
        lines = [form.first] if form.first else []
        for position in range(random.randrange(8, 21)):
            text = form.item(random, position)
            while held_out(text) != (split == "evaluation"):
                text = form.item(random, position)
            lines.append(text)
        if form.last:
            lines.append(form.last)
        yield "\n".join(lines) + "\n"
        number += 1
