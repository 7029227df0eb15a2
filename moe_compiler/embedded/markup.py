"""Forms of the domain ``markup``: nested HTML and XML elements."""

from random import Random

from moe_compiler.embedded.forms import CITIES, COLOURS, MONTHS, NAMES, PRODUCTS, SURNAMES, Form


def _page(random: Random) -> Form:
    title = f"{random.choice(PRODUCTS).capitalize()} shop {random.choice(CITIES)}"

    def item(draw: Random, position: int) -> str:
        product, colour = draw.choice(PRODUCTS), draw.choice(COLOURS)
        price, number = draw.randrange(5, 90), draw.randrange(1, 500)
        kind = draw.randrange(4)
        if kind == 0:
            role = draw.choice(("intro", "note", "text"))
            return f'  <p class="{role}">The <b>{colour}</b> {product} costs {price}.</p>'
        if kind == 1:
            image = f'<img src="/img/{product}.png"/>'
            return f'  <a href="/shop/{product}/{number}.html" title="{product}">{image}</a>'
        if kind == 2:
            rows = "\n".join(f"    <li>{draw.choice(COLOURS)} {product}</li>" for _ in range(draw.randrange(2, 5)))
            return f'  <ul id="list-{number}">\n{rows}\n  </ul>'
        inner = f"    <h2>{product}</h2>\n    <span>{price}</span>"
        return f'  <div id="item-{number}" class="product">\n{inner}\n  </div>'

    head = f"<html>\n<head>\n  <title>{title}</title>\n</head>\n<body>\n  <h1>{title}</h1>"
    return Form(item, first=head, last="</body>\n</html>")


def _table(random: Random) -> Form:
    def item(draw: Random, position: int) -> str:
        cells = (draw.choice(NAMES), draw.choice(CITIES), str(draw.randrange(18, 80)))
        return "  <tr>" + "".join(f"<td>{cell}</td>" for cell in cells) + "</tr>"

    width = random.choice(("wide", "small"))
    head = f'<table class="{width}">\n  <tr><th>name</th><th>city</th><th>age</th></tr>'
    return Form(item, first=head, last="</table>")


def _catalog(random: Random) -> Form:
    first = random.randrange(1, 400)

    def item(draw: Random, position: int) -> str:
        author = f"{draw.choice(NAMES)} {draw.choice(SURNAMES)}"
        title = f"The {draw.choice(COLOURS)} {draw.choice(PRODUCTS)} of {draw.choice(CITIES)}"
        date = f"{draw.choice(MONTHS)} {draw.randrange(1950, 2024)}"
        inner = f"    <author>{author}</author>\n    <title>{title}</title>\n    <date>{date}</date>"
        return f'  <book id="b{first + position}">\n{inner}\n  </book>'

    return Form(item, first='<?xml version="1.0"?>\n<catalog>', last="</catalog>")


_KINDS = (_page, _table, _catalog)


def markup_form(random: Random) -> Form:
    """Choose the kind of page or catalogue of a document."""
    return random.choice(_KINDS)(random)
