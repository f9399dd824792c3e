"""Colours, titles, axes and files that all plots share. Without pyplot, so without global state and without a display."""

import functools
import io
import os
import re
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from phase1.files import atomic_write
from phase1.records.schema import PerplexityResult, Report
from phase1.tables.common import basis_of, hardware_of
from phase1.text import one_line

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe and Ito: told apart by colour-blind readers and in print
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#F0E442", "#000000", "#999999", "#882255")
MARKERS = "osD^vPX*"
ROLE_COLORS = {"baseline": COLORS[1], "baseline_optimized": COLORS[4], "baseline_fast": COLORS[3]}
ROLE_COLORS |= {"phase1": COLORS[0], "phase1_fast": COLORS[5]}
OTHER_COLORS = tuple(color for color in COLORS if color not in ROLE_COLORS.values())


@contextmanager
def own_style() -> Iterator[None]:
    """Within the block matplotlib has its default settings, whatever MPLBACKEND and the user's matplotlibrc say."""
    backend = os.environ.get("MPLBACKEND")
    os.environ["MPLBACKEND"] = "agg"  # read, and refused where it is not installed, when matplotlib is first imported
    try:
        import matplotlib
    finally:
        if backend is None:
            del os.environ["MPLBACKEND"]
        else:
            os.environ["MPLBACKEND"] = backend
    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        yield


def in_own_style(plot: Callable[..., Path]) -> Callable[..., Path]:
    """`plot`, made within `own_style`."""

    @functools.wraps(plot)
    def plain(*given: Any, **options: Any) -> Path:
        with own_style():
            return plot(*given, **options)

    return plain


def limit_line(axes: "Axes", label: str, height: float) -> None:
    """Draw a dashed line at `height`, with its label at the right end."""
    axes.axhline(height, color="#444444", linestyle="--", linewidth=1, zorder=0.5)
    axes.annotate(
        label, (1, height), xycoords=("axes fraction", "data"), xytext=(0, 2), textcoords="offset points", fontsize=8,
        ha="right", va="bottom", color="#444444",
    )  # fmt: skip


def color_of(key: str, index: int) -> str:
    """The colour of a role everywhere; of other models one by their place."""
    return ROLE_COLORS.get(key, OTHER_COLORS[index % len(OTHER_COLORS)])


def trained_on(report: Report[PerplexityResult]) -> str:
    """How much training the models had, and the text they are scored on."""
    trained = {result.trained_tokens for result in report.results.values() if result.trained_tokens}
    names = {result.dataset.name for result in report.results.values() if result.dataset}
    return f"trained on {', '.join(f'{count:,}' for count in sorted(trained))} tokens, scored on {', '.join(sorted(names))}"


def log_ticks(axis: Any) -> None:
    """Ticks at 1, 2 and 5 times powers of ten, written out."""
    from matplotlib.ticker import LogLocator, NullLocator

    axis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(lambda value, _: f"{value:,g}")


def conditions(report: Report[Any]) -> str:
    """Sizes, hardware and how the numbers are known, for a title."""
    symbols = {"B": "batch_size", "T": "seq_length"}
    sizes = ", ".join(f"{symbol} = {report.run[name]}" for symbol, name in symbols.items() if name in report.run)
    return f"{sizes}\n{hardware_of(report)} ({basis_of(report.results.values())})"


def new_figure(width: float, height: float, title: str) -> "Figure":
    """An empty figure in inches; matplotlib is imported here, without its window system."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained", facecolor="white")
    figure.suptitle("\n".join(escaped(line) for line in title.split("\n")), fontsize=11)
    return figure


def escaped(text: str) -> str:
    """Escape dollar signs, which would start a formula: names come from files."""
    return one_line(text, 100).replace("$", r"\$")


def clean(axes: "Axes") -> None:
    """Take away the frame, and put a light grid behind the data."""
    axes.grid(axis="y", color="#E4E4E4", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def save(figure: "Figure", path: Path | str) -> Path:
    """As PNG, or as SVG where `path` ends so: text as text, and the same bytes for the same figure.

    In a PNG a character that the usual font has not is of another font here; where none has it, a line on stderr says so.
    """
    image = io.BytesIO()
    if Path(path).suffix == ".svg":
        import matplotlib
        from matplotlib.backends.backend_svg import FigureCanvasSVG

        as_text = matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "phase1"})
        with as_text, warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Glyph .* missing", UserWarning)  # whoever shows the text brings the font
            FigureCanvasSVG(figure).print_svg(image, metadata={"Date": None, "Creator": None})
    else:
        data, missing = _png(figure)
        if missing and (fonts := _fonts_with(missing)):
            data, missing = _png_in(figure, fonts)
        if missing:
            characters = "".join(map(chr, sorted(missing)))
            boxes = f"{Path(path).name}: no font here has {one_line(characters, 40)}, drawn as boxes"
            print(one_line(f"{boxes}; install one that has, such as Noto Sans CJK", 500), file=sys.stderr)
        image.write(data)
    atomic_write(path, image.getvalue())
    return Path(path)


def _png(figure: "Figure") -> tuple[bytes, set[int]]:
    """The picture, and the characters that no font of its texts has, of which matplotlib would warn one by one."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    image = io.BytesIO()
    with warnings.catch_warnings(record=True) as said:
        warnings.filterwarnings("always", "Glyph .* missing", UserWarning)
        FigureCanvasAgg(figure).print_png(image, metadata={"Software": None}, pil_kwargs=None)
    missing = set()
    for warning in said:
        if glyph := re.match(r"Glyph (\d+) .*missing", str(warning.message)):
            missing.add(int(glyph[1]))
        else:
            warnings.warn_explicit(warning.message, warning.category, warning.filename, warning.lineno)
    return image.getvalue(), missing


def _png_in(figure: "Figure", fonts: list[str]) -> tuple[bytes, set[int]]:
    """`_png` with these fonts behind that of each text."""
    import matplotlib
    from matplotlib.text import Text

    for text in figure.findobj(Text):
        text.set_fontfamily([*text.get_fontfamily(), *fonts])
    with matplotlib.rc_context({"font.family": [*matplotlib.rcParams["font.family"], *fonts]}):
        return _png(figure)


def _fonts_with(characters: set[int]) -> list[str]:
    """Fonts of this machine that have as many of the characters as there are, upright ones first."""
    from matplotlib.font_manager import fontManager, get_font

    found, left = [], set(characters)
    for entry in sorted(
        fontManager.ttflist, key=lambda entry: (entry.style != "normal", str(entry.weight) != "400", entry.name)
    ):
        if not left or entry.name.startswith("Last Resort"):  # which has a box for every character
            continue
        with suppress(OSError, RuntimeError):  # a damaged file
            has = left & get_font(entry.fname).get_charmap().keys()
            found += [entry.name] * bool(has)
            left -= has
    return found
