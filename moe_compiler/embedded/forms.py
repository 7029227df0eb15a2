"""What the text generators share: the form of a document and the words that fill it."""

from collections.abc import Callable
from dataclasses import dataclass
from random import Random

Item = Callable[[Random, int], str]
"""Draws the item at one position of a document, from the random numbers and the position only."""


@dataclass(frozen=True)
class Form:
    """How one document looks.

    Attributes:
        item: draws the item at one position.
        first: lines before the items, if any.
        last: lines after the items, if any.
    """

    item: Item
    first: str = ""
    last: str = ""


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


NAMES = _words("Ada Ben Cara Dan Eva Finn Gina Hugo Ida Jon Kira Leo Mara Nils Olga Paul Rosa Sam Tina Yann")
SURNAMES = _words("Adler Brown Costa Dubois Evans Fischer Garcia Hansen Ito Jansen Keller Lopez Meyer Novak")
CITIES = _words("Berlin Boston Cairo Dublin Geneva Lima Lisbon London Lyon Madrid Oslo Paris Rome Tokyo Vienna")
THINGS = _words("apples books cards coins cups eggs keys lamps pears pens plums shells stamps stones")
PRODUCTS = _words("bag bottle camera chair clock desk drum jacket kettle lamp mirror phone printer table watch")
COLOURS = _words("black blue brown green grey orange purple red white yellow")
MONTHS = _words("January February March April May June July August September October November December")
