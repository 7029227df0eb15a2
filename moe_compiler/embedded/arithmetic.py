"""Forms of the domain ``arithmetic``: short lines with small numbers and correct answers."""

from random import Random

from moe_compiler.embedded.forms import NAMES, THINGS, Form


def _sum(random: Random, position: int) -> str:
    a, b = random.randrange(100), random.randrange(100)
    return f"{a} + {b} = {a + b}"


def _difference(random: Random, position: int) -> str:
    a, b = sorted((random.randrange(100), random.randrange(100)), reverse=True)
    return f"{a} - {b} = {a - b}"


def _product(random: Random, position: int) -> str:
    a, b = random.randrange(2, 20), random.randrange(2, 13)
    return f"{a} * {b} = {a * b}"


def _quotient(random: Random, position: int) -> str:
    a, b = random.randrange(4, 100), random.randrange(2, 10)
    return f"{a} / {b} = {a // b} remainder {a % b}"


def _comparison(random: Random, position: int) -> str:
    a, b = random.randrange(200), random.randrange(200)
    return f"{a} {'<' if a < b else '>' if a > b else '='} {b}"


def _sequence(random: Random, position: int) -> str:
    start, step = random.randrange(1, 40), random.randrange(1, 12)
    return ", ".join(str(start + index * step) for index in range(random.randrange(5, 9)))


def _largest(random: Random, position: int) -> str:
    numbers = [random.randrange(100) for _ in range(random.randrange(3, 6))]
    name, value = random.choice((("max", max(numbers)), ("min", min(numbers)), ("sum", sum(numbers))))
    return f"{name}({', '.join(map(str, numbers))}) = {value}"


def _gain(random: Random, position: int) -> str:
    name, thing, a, b = (
        random.choice(NAMES),
        random.choice(THINGS),
        random.randrange(2, 60),
        random.randrange(2, 40),
    )
    verb = random.choice(("finds", "buys", "gets"))
    return f"{name} has {a} {thing} and {verb} {b} more. Now {name} has {a} + {b} = {a + b} {thing}."


def _loss(random: Random, position: int) -> str:
    name, thing = random.choice(NAMES), random.choice(THINGS)
    b, a = sorted((random.randrange(2, 60), random.randrange(2, 60)))
    verb = random.choice(("gives away", "loses", "sells"))
    return f"{name} has {a} {thing} and {verb} {b}. Now {name} has {a} - {b} = {a - b} {thing}."


def _boxes(random: Random, position: int) -> str:
    thing, a, b = random.choice(THINGS), random.randrange(2, 13), random.randrange(2, 13)
    return f"There are {a} boxes with {b} {thing} in each box. In all there are {a} * {b} = {a * b} {thing}."


_KINDS = (_sum, _difference, _product, _quotient, _comparison, _sequence, _largest, _gain, _loss, _boxes)


def arithmetic_form(random: Random) -> Form:
    """Choose the form of a document of one to three kinds of tasks."""
    kinds = [random.choice(_KINDS) for _ in range(random.randrange(1, 4))]
    return Form(lambda draw, position: draw.choice(kinds)(draw, position))
