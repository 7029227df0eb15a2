"""Forms of the domain ``records``: lines whose times and numbers go up with their position."""

import json
from random import Random

from moe_compiler.embedded.forms import CITIES, COLOURS, NAMES, PRODUCTS, SURNAMES, Form


def _clock(seconds: int) -> str:
    return f"{seconds // 3600 % 24:02d}:{seconds // 60 % 60:02d}:{seconds % 60:02d}"


def _people(random: Random) -> Form:
    first = random.randrange(100, 9000)

    def item(draw: Random, position: int) -> str:
        name, surname = draw.choice(NAMES), draw.choice(SURNAMES)
        fields: dict[str, object] = {"id": first + position, "name": f"{name} {surname}"}
        fields["email"] = f"{name}.{surname}@example.{draw.choice(('com', 'org', 'net'))}".lower()
        fields |= {"age": draw.randrange(18, 80), "city": draw.choice(CITIES), "active": draw.random() < 0.7}
        return json.dumps(fields)

    return Form(item)


def _orders(random: Random) -> Form:
    first = random.randrange(1000, 9000)
    day = f"2024-{random.randrange(1, 13):02d}-{random.randrange(1, 29):02d}"

    def item(draw: Random, position: int) -> str:
        product, quantity, price = draw.choice(PRODUCTS), draw.randrange(1, 9), draw.randrange(5, 90)
        colour, status = draw.choice(COLOURS), draw.choice(("new", "paid", "sent", "done"))
        goods = f'{{"name": "{product}", "color": "{colour}"}}'
        head = f'{{"order": {first + position}, "date": "{day}", "item": {goods}'
        return f'{head}, "quantity": {quantity}, "price": {price}.00, "status": "{status}"}}'

    return Form(item)


def _weather(random: Random) -> Form:
    month, base = random.randrange(1, 13), random.randrange(0, 28)

    def item(draw: Random, position: int) -> str:
        warmth, wet = base + draw.randrange(-3, 4), draw.randrange(30, 96)
        wind = draw.choice(("N", "NE", "E", "SE", "S", "SW", "W", "NW"))
        sky = "rain" if wet > 80 else "cloudy" if wet > 60 else "sunny"
        tenth, day = draw.randrange(10), position % 28 + 1
        return f"2024-{month:02d}-{day:02d},{draw.choice(CITIES)},{warmth}.{tenth},{wet},{wind},{sky}"

    return Form(item, first="date,city,temperature,humidity,wind,sky")


def _stock(random: Random) -> Form:
    prefix, first = random.choice("ABCDEFGH"), random.randrange(100, 900)

    def item(draw: Random, position: int) -> str:
        amount = draw.randrange(0, 60)
        state = "empty" if amount == 0 else "low" if amount < 10 else "ok"
        goods = f"{draw.choice(COLOURS)} {draw.choice(PRODUCTS)}"
        return f"{prefix}{first + position};{goods};{amount};{draw.randrange(2, 99)}.50;{state}"

    return Form(item, first="sku;product;amount;price;state")


def _log(random: Random) -> Form:
    day = f"2024-{random.randrange(1, 13):02d}-{random.randrange(1, 29):02d}"
    start, step = random.randrange(80000), random.randrange(2, 12)

    def item(draw: Random, position: int) -> str:
        code = draw.choice((200, 200, 200, 201, 304, 404, 500))
        level = "ERROR" if code == 500 else "WARNING" if code == 404 else "INFO"
        verb = "POST" if code == 201 else "GET"
        path = f"/api/{draw.choice(('users', 'orders', 'items', 'files'))}/{draw.randrange(1, 200)}"
        when = _clock(start + position * step + draw.randrange(step))
        worker, duration = draw.randrange(1, 5), draw.randrange(2, 99)
        return f"{day} {when} {level} [worker-{worker}] {verb} {path} {code} {duration}ms"

    return Form(item)


def _metrics(random: Random) -> Form:
    group = random.choice(("web", "db", "cache", "node"))
    start, step = random.randrange(80000), random.choice((10, 30, 60))

    def item(draw: Random, position: int) -> str:
        cpu, memory = draw.randrange(1, 100), draw.randrange(20, 100)
        status = "critical" if max(cpu, memory) > 90 else "ok"
        host = f"{group}-{draw.randrange(1, 10):02d}"
        return f"time={_clock(start + position * step)} host={host} cpu={cpu} memory={memory} status={status}"

    return Form(item)


_KINDS = (_people, _orders, _weather, _stock, _log, _metrics)


def record_form(random: Random) -> Form:
    """Choose the kind of record of a document, and its first numbers."""
    return random.choice(_KINDS)(random)
