"""HTML: tables, figures and the page around them, valid and without anything from outside."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from string import Template

from moe_compiler.inspection import wrapped
from moe_compiler.report.figure import Figure

Cell = str | int | float

_PAGE = Template("""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>$title</title>
<style>
body { font: 16px/1.5 system-ui, sans-serif; color: #1a1a1a; background: #ffffff; max-width: 70rem;
       margin: 0 auto; padding: 1rem 1.5rem 4rem; }
h1 { font-size: 1.7rem; }
h2 { font-size: 1.35rem; border-bottom: 1px solid #cccccc; padding-bottom: .2rem; margin-top: 3rem; }
h3 { font-size: 1.05rem; margin: 2.2rem 0 .4rem; }
figure { margin: 0 0 1.5rem; }
img { display: block; max-width: 100%; height: auto; margin-bottom: .5rem; }
figcaption, p.note { color: #444444; font-size: .9rem; max-width: 52rem; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; min-width: 32rem; margin: .5rem 0 1.5rem; font-size: .9rem; }
caption { text-align: left; color: #444444; padding-bottom: .4rem; }
th, td { padding: .2rem .8rem .2rem 0; text-align: left; border-bottom: 1px solid #e4e4e4; vertical-align: top; }
thead th { border-bottom: 1px solid #888888; }
tbody th { font-weight: normal; }
td.number, th.number { text-align: right; font-variant-numeric: tabular-nums; }
pre { background: #f5f5f5; padding: .8rem; overflow-x: auto; font-size: .8rem; }
nav ol { columns: 2; column-gap: 3rem; }
nav ol ol { columns: 1; font-size: .9rem; }
nav li { break-inside: avoid; }
</style>
</head>
<body>
<header>
<h1>$title</h1>
<p class="note">$note</p>
</header>
<nav aria-label="Contents">
<h2 id="contents">Contents</h2>
<ol>
$contents
</ol>
</nav>
<main>
$sections
</main>
</body>
</html>
""")


@dataclass(frozen=True)
class Part:
    """One part of a section.

    Attributes:
        anchor: what links to it.
        title: its heading.
        html: what follows.
    """

    anchor: str
    title: str
    html: str


@dataclass(frozen=True)
class Section:
    """A section of the page.

    Attributes:
        anchor: what links to it.
        title: its heading.
        parts: what is in it.
    """

    anchor: str
    title: str
    parts: tuple[Part, ...]


def page(title: str, note: str, sections: Sequence[Section]) -> str:
    """The whole page.

    Args:
        title: its title.
        note: a line below it.
        sections: what is in it; those without parts are left out.
    """
    shown = [section for section in sections if section.parts]
    return _PAGE.substitute(
        title=escape(title),
        note=escape(note),
        contents="\n".join(map(_entry, shown)),
        sections="\n".join(map(_section, shown)),
    )


def figure_part(figure: Figure) -> Part:
    """A figure with its caption; the picture is part of the page."""
    data = base64.b64encode(figure.png).decode("ascii")
    width, height = (int.from_bytes(figure.png[at : at + 4], "big") for at in (16, 20))  # of the PNG header
    html = (
        f'<figure>\n<img src="data:image/png;base64,{data}" width="{width}" height="{height}" '
        f'alt="{escape(figure.alt)}">\n<figcaption>{escape(figure.caption)}</figcaption>\n</figure>'
    )
    return Part(figure.name, figure.title, html)


def table_part(anchor: str, title: str, caption: str, header: Sequence[str], rows: Sequence[Sequence[Cell]]) -> Part:
    """A table; the first column names the rows, columns of numbers are aligned to the right.

    Args:
        anchor: what links to it.
        title: its heading.
        caption: what it shows.
        header: the columns' names.
        rows: texts, whole numbers, and numbers that are shown with three decimals.
    """
    numeric = [bool(rows) and all(not isinstance(row[i], str) for row in rows) for i in range(len(header))]
    mark = [' class="number"' if one else "" for one in numeric]
    head = "".join(f'<th scope="col"{mark[i]}>{escape(name)}</th>' for i, name in enumerate(header))
    body = []
    for row in rows:
        first = f'<th scope="row"{mark[0]}>{_cell(row[0])}</th>'
        body.append(f"<tr>{first}{''.join(f'<td{mark[i]}>{_cell(row[i])}</td>' for i in range(1, len(row)))}</tr>")
    html = (
        f'<div class="wide">\n<table>\n<caption>{escape(caption)}</caption>\n<thead>\n<tr>{head}</tr>\n</thead>\n'
        f"<tbody>\n{chr(10).join(body)}\n</tbody>\n</table>\n</div>"
    )
    return Part(anchor, title, html)


def code_part(anchor: str, title: str, note: str, code: str) -> Part:
    """Code that opens at a click."""
    shown = escape(wrapped(code, 118))
    html = f"<details>\n<summary>{escape(note)}</summary>\n<pre><code>{shown}</code></pre>\n</details>"
    return Part(anchor, title, html)


def _cell(value: Cell) -> str:
    if isinstance(value, str):
        return escape(value)
    return f"{value:,}" if isinstance(value, int) else f"{value:,.3f}"


def _entry(section: Section) -> str:
    parts = "".join(f'\n<li><a href="#{part.anchor}">{escape(part.title)}</a></li>' for part in section.parts)
    return f'<li><a href="#{section.anchor}">{escape(section.title)}</a>\n<ol>{parts}\n</ol></li>'


def _section(section: Section) -> str:
    parts = "\n".join(f'<h3 id="{part.anchor}">{escape(part.title)}</h3>\n{part.html}' for part in section.parts)
    return f'<section>\n<h2 id="{section.anchor}">{escape(section.title)}</h2>\n{parts}\n</section>'
