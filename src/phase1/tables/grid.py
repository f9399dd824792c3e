"""Rows of text as columns for a terminal."""

from collections.abc import Sequence
from itertools import zip_longest


def grid(headings: Sequence[str], rows: Sequence[Sequence[str]], right: Sequence[bool]) -> str:
    """`headings`, a rule and `rows`, two spaces between columns; cells may have lines, and end flush where `right` is true."""
    lines = [[cell.split("\n") for cell in row] for row in (headings, *rows)]
    widths = [max(len(line) for row in lines for line in row[i]) for i in range(len(headings))]

    def line(cells: Sequence[str]) -> str:
        padded = (cell.rjust(width) if flush else cell.ljust(width) for cell, width, flush in zip(cells, widths, right))
        return "  ".join(padded).rstrip()

    body = ["\n".join(line(cells) for cells in zip_longest(*row, fillvalue="")) for row in lines]
    return "\n".join([body[0], "  ".join("-" * width for width in widths), *body[1:]])
