"""Text, tables and plots as HTML. What is not `Html` comes from files and is escaped."""

import base64
import html
import re

from phase1.tables.table import Table, is_wide
from phase1.text import one_line


class Html(str):
    """Text that is HTML already."""


def tag(name: str, *inside: str, **attributes: str) -> Html:
    """An element; `class_` and the like stand for attributes that are words of Python, `data_x` for data-x."""
    given = "".join(
        f' {key.strip("_").replace("_", "-")}="{html.escape(one_line(value, len(value)))}"' for key, value in attributes.items()
    )
    return Html(f"<{name}{given}>{joined(*inside)}</{name}>")


def joined(*parts: str) -> Html:
    return Html("".join(part if isinstance(part, Html) else html.escape(one_line(part, 2000)) for part in parts))


def lines(text: str) -> Html:
    """Several lines as they are, without control characters."""
    return Html(html.escape("\n".join(one_line(line, 2000) for line in text.splitlines())))


def table(content: Table) -> Html:
    """The rows, which scroll in themselves; few rows with many numbers stand side by side."""
    headings, rows = [column.heading for column in content.columns], content.texts(str)
    right = [content.is_numeric(i) for i in range(len(headings))]
    if is_wide(content):
        headings, *rows = (list(row) for row in zip(headings, *rows))
        right = [False] + [True] * (len(headings) - 1)
    css = ["n" if numeric else "t" for numeric in right]
    head = tag("tr", *(tag("th", text, scope="col", class_=c) for text, c in zip(headings, css)))
    body = [
        tag("tr", tag("th", row[0], scope="row"), *(tag("td", text, class_=c) for text, c in zip(row[1:], css[1:])))
        for row in rows
    ]
    grid = tag("table", tag("thead", head), tag("tbody", *body))
    return tag("div", grid, class_="scroll", tabindex="0", role="region", aria_label=content.caption)


def plot(svg: str, name: str, caption: str) -> Html:
    """A drawing of matplotlib, with ids of its own beside other drawings; `caption` says in words what it shows."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'(\bid="|url\(#|href="#)', rf"\g<1>{name}-", svg)
    svg = re.sub(r' (width|height)="[\d.]+pt"', "", svg, count=2)
    svg = svg.replace("<svg ", f'<svg role="img" aria-label="{html.escape(one_line(caption), quote=True)}" ', 1)
    return tag("figure", Html(svg), class_="scroll plot", tabindex="0", aria_label=caption)


def download(name: str, kind: str, content: bytes) -> Html:
    """A link that holds the file."""
    return tag("a", name, download=name, href=f"data:{kind};base64,{base64.b64encode(content).decode()}")


def folded(title: str, *inside: str) -> Html:
    return tag("details", tag("summary", title), *inside)
