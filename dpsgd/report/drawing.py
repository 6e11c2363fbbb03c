"""Figures as SVG that follows the reader's colour scheme, and as PNG.

matplotlib is loaded when something is drawn, and only its figure objects are used:
there is no global state, and no window system is asked for.
"""

import io
import math
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = [
    "COLORS",
    "LIGHT",
    "SERIES",
    "add_legend",
    "css_variables",
    "figure_of",
    "line_style",
    "new_axes",
    "series_color",
    "short_label",
    "to_png",
    "to_svg",
]

# By role: the colour on light and on dark ground. Those on light ground are all
# different, so that each can be found again in the SVG and be given its role's name.
COLORS: Final = {
    "ink": ("#1d2530", "#e4e7ec"),
    "muted": ("#667080", "#99a2b0"),
    "grid": ("#e3e6ea", "#2c333d"),
    "bar": ("#a9c6ee", "#34568a"),
    "page": ("#fefefe", "#14181e"),
    "series-1": ("#2563b8", "#6ea8fe"),
    "series-2": ("#c2570c", "#f59e5b"),
    "series-3": ("#0f7b66", "#4fc9ae"),
    "series-4": ("#8b3fa8", "#cf8fe8"),
    "series-5": ("#a8233e", "#f2788f"),
    "series-6": ("#7a6a00", "#d3c04d"),
    "series-7": ("#3d4f66", "#a9b8cc"),
    "series-8": ("#0b7599", "#5cc4e8"),
}
LIGHT: Final = {role: light for role, (light, _) in COLORS.items()}
SERIES: Final = tuple(f"series-{number}" for number in range(1, 9))

_LONGEST_LABEL = 34
_LEGEND_LETTERS = 68  # in a line of a legend
_LEGEND_ROW = 0.19  # inches
_STYLES: Final = ("-", (0, (5, 1.5)), (0, (1.5, 1.2)))
_WIDTH, _HEIGHT = 4.8, 2.9  # inches, so that text stays readable on a phone
_PNG_DPI = 200
_STYLE: Final[dict[str, Any]] = {
    "font.family": "sans-serif",
    "font.size": 9.5,
    "text.color": LIGHT["ink"],
    "axes.labelcolor": LIGHT["muted"],
    "axes.edgecolor": LIGHT["muted"],
    "axes.facecolor": "none",
    "axes.linewidth": 0.8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "axes.grid": True,
    "axes.titlesize": 10.5,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "grid.color": LIGHT["grid"],
    "grid.linewidth": 0.8,
    "xtick.color": LIGHT["muted"],
    "ytick.color": LIGHT["muted"],
    "legend.frameon": False,
    "lines.linewidth": 1.8,
    "lines.solid_capstyle": "round",
    "svg.fonttype": "none",  # text stays text, in the font of the page
    "svg.hashsalt": "dpsgd",  # the same data give the same file
}


@contextmanager
def new_axes(title: str, *, height: float = _HEIGHT) -> Iterator["Axes"]:
    """Gives empty axes, drawn in our style.

    Args:
        title: What is shown, in a few words.
        height: Of the figure, in inches; all have one width.
    """
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    with rc_context(_STYLE):
        figure = Figure(figsize=(_WIDTH, height), layout="constrained")
        axes = figure.subplots()
        axes.set_title(title, pad=10)
        yield axes


def add_legend(axes: "Axes", labels: Sequence[str]) -> None:
    """Names the lines below the axes, in as many columns as their names allow."""
    longest = max(len(short_label(label)) for label in labels)
    columns = max(1, min(len(labels), _LEGEND_LETTERS // (longest + 7)))
    rows = math.ceil(len(labels) / columns)
    figure = figure_of(axes)
    figure.set_figheight(figure.get_figheight() + _LEGEND_ROW * (rows - 1))
    figure.legend(loc="outside lower left", ncols=columns, fontsize=9, handlelength=1.6)


def series_color(rank: int) -> str:
    """Returns the colour of a line."""
    return LIGHT[SERIES[rank % len(SERIES)]]


def line_style(rank: int) -> "str | tuple[int, tuple[float, ...]]":
    """Returns the dashes of a line: another pattern once colours repeat."""
    return _STYLES[rank // len(SERIES) % len(_STYLES)]


def short_label(text: str, longest: int = _LONGEST_LABEL) -> str:
    """Returns text that is not too long, and that matplotlib takes as it is."""
    if len(text) > longest:
        head = longest // 2 - 1
        text = f"{text[:head]}...{text[len(text) - (longest - head - 3) :]}"
    return text.replace("$", r"\$")


def figure_of(axes: "Axes") -> "Figure":
    """Returns the figure that holds axes."""
    from matplotlib.figure import Figure

    assert isinstance(axes.figure, Figure)
    return axes.figure


def to_png(figure: "Figure") -> bytes:
    """Returns a figure as PNG on light ground."""
    from matplotlib import rc_context

    stream = io.BytesIO()
    with rc_context(_STYLE):
        figure.savefig(stream, format="png", dpi=_PNG_DPI, facecolor=LIGHT["page"])
    return stream.getvalue()


def to_svg(figure: "Figure", name: str, *, is_inline: bool) -> str:
    """Returns a figure as SVG whose colours follow the scheme of the reader.

    Args:
        figure: Drawn with the colours of `LIGHT`.
        name: Prefix of all ids, so that several figures can share a page.
        is_inline: Whether it goes into a page that defines the colours, or is a file
            of its own, which then defines them itself.
    """
    from matplotlib import rc_context

    stream = io.StringIO()
    nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
    with rc_context(_STYLE):
        figure.savefig(stream, format="svg", metadata=nothing, facecolor="none")
    text = _with_roles(_with_ids(stream.getvalue(), name))
    start = text.index("<svg")
    body = text[text.index(">", start) + 1 :]
    box = re.search(r'viewBox="[^"]*"', text[start:])
    assert box is not None  # matplotlib writes one
    head = f"<svg {box.group()}"
    if is_inline:
        return f'{head} aria-hidden="true">{body}'
    namespace = ' xmlns="http://www.w3.org/2000/svg"'
    return f"{head}{namespace}><style>{_standalone_style()}</style>{body}"


def css_variables(*, is_dark: bool) -> str:
    """Returns the colours as CSS custom properties."""
    return "".join(f"--{role}:{pair[is_dark]};" for role, pair in COLORS.items())


def _with_ids(text: str, name: str) -> str:
    """Returns SVG whose ids, and references to them, begin with a name."""
    text = text.replace("xlink:href", "href")
    return re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>{name}-", text)


def _with_roles(text: str) -> str:
    """Returns SVG whose colours are custom properties of CSS."""
    for role, color in LIGHT.items():
        text = text.replace(color, f"var(--{role})")
    return text


def _standalone_style() -> str:
    """Returns the style of an SVG file that stands alone."""
    light, dark = css_variables(is_dark=False), css_variables(is_dark=True)
    return (
        f":root{{{light}}}@media(prefers-color-scheme:dark){{:root{{{dark}}}}}"
        "svg{background:var(--page)}"
        "text{font-family:system-ui,sans-serif!important}"
    )
