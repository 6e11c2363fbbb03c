"""The parts of a page that all reports share; a page fetches nothing from anywhere."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from typing import TYPE_CHECKING, Any

from dpsgd.report.drawing import css_variables, to_png, to_svg
from dpsgd.report.markup import Markup, element, join
from dpsgd.report.statement import Statement
from dpsgd.report.words import setting_in_words

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = [
    "Drawn",
    "Report",
    "columns",
    "details",
    "draw",
    "facts",
    "figures",
    "page",
    "section",
    "settings_tables",
    "statement_box",
    "table",
    "tiles",
]

# Even a value that slipped through unescaped could load nothing and run nothing.
_POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"
_PAPER = "https://arxiv.org/abs/2204.13650"
_GROUNDS = ("--box:#f6f7f9;--shade:#0002;", "--box:#1a2028;--shade:#0008;")


class Drawn:
    """A figure of a page: markup for the page, and a PNG that lies beside it.

    Args:
        name: File name of the PNG, without its ending.
        figure: What was drawn.
        description: What it shows, for those who do not see it.
        caption: Line below it, or None.
    """

    def __init__(
        self, name: str, figure: "Figure", description: str, caption: str | None = None
    ) -> None:
        self.name = name
        self.figure = figure
        svg = Markup(to_svg(figure, name, is_inline=True))
        below = element("figcaption", caption) if caption else None
        image = element("div", svg, role="img", aria_label=description)
        self.markup = element("figure", image, below)


@dataclass(frozen=True, slots=True)
class Report:
    """What is written.

    Attributes:
        html: The page.
        drawn: Its figures, of which each is written as PNG as well.
    """

    html: str
    drawn: Sequence[Drawn]

    def contents(self) -> dict[str, bytes]:
        """Returns the content of each file, by its path in the folder."""
        images = {f"figures/{one.name}.png": to_png(one.figure) for one in self.drawn}
        return {"report.html": self.html.encode(), **images}


def draw(
    name: str,
    figure: "Figure | None",
    description: str,
    caption: str | None = None,
) -> list[Drawn]:
    """Returns a drawn figure, or nothing where there was nothing to draw."""
    return [] if figure is None else [Drawn(name, figure, description, caption)]


def page(title: str, kicker: str, subtitle: str, *parts: Markup) -> str:
    """Returns a whole page.

    Args:
        title: Heading.
        kicker: What kind of page it is, above the heading.
        subtitle: One line below the heading.
        parts: Sections, in their order.
    """
    header = element(
        "header",
        element("p", kicker, class_="kicker"),
        element("h1", title),
        element("p", subtitle, class_="muted"),
    )
    link = element("a", "De et al. 2022", href=_PAPER)
    footer = element(
        "footer",
        "Written by dpsgd from what the runs left behind; it changes nothing in them. "
        "The method is that of ",
        link,
        ".",
    )
    head = element(
        "head",
        element("meta", charset="utf-8"),
        element("meta", name="viewport", content="width=device-width, initial-scale=1"),
        element("meta", name="color-scheme", content="light dark"),
        element("meta", http_equiv="Content-Security-Policy", content=_POLICY),
        element("title", title),
        element("style", Markup(_style())),
    )
    body = element("body", element("main", header, *parts, footer))
    return f"<!doctype html>\n{element('html', head, body, lang='en')}\n"


def section(heading: str, *parts: Markup | None) -> Markup:
    """Returns a section with its heading."""
    return element("section", element("h2", heading), *parts)


def details(summary: str, *parts: Markup, is_open: bool = False) -> Markup:
    """Returns a part that a reader opens."""
    state = {"open": ""} if is_open else {}
    return element("details", element("summary", summary), *parts, **state)


def statement_box(statement: Statement) -> Markup:
    """Returns a privacy statement, headline first."""
    rows = [
        element("li", element("b", what), f": {why}.")
        for what, why in statement.not_covered
    ]
    uncovered = (
        (element("h3", "What it does not cover"), element("ul", *rows)) if rows else ()
    )
    return element(
        "section",
        element("p", "Privacy statement", class_="kicker"),
        element("h2", statement.headline),
        *(element("p", one) for one in statement.paragraphs),
        facts(statement.facts),
        *uncovered,
        class_=f"statement {statement.standing}",
    )


def facts(rows: Iterable[tuple[str, str]]) -> Markup:
    """Returns names with their values in words."""
    cells = [join(element("dt", name), element("dd", value)) for name, value in rows]
    return element("dl", *cells, class_="facts")


def tiles(rows: Iterable[tuple[str, str, str | None]]) -> Markup:
    """Returns the figures that are looked for first: (name, value, note)."""
    cells = [
        element(
            "dl",
            element("dt", name),
            element("dd", value, class_="value"),
            element("dd", note, class_="note") if note else None,
            class_="tile",
        )
        for name, value, note in rows
    ]
    return element("div", *cells, class_="tiles")


def figures(drawn: Sequence[Drawn]) -> Markup | None:
    """Returns figures side by side as far as the window allows."""
    if not drawn:
        return None
    return element("div", *(one.markup for one in drawn), class_="figures")


def columns(left: Markup, right: Markup) -> Markup:
    """Returns two parts side by side, or one below the other on a narrow window."""
    return element("div", left, right, class_="columns")


def table(
    headings: Sequence[str],
    rows: Iterable[Sequence[str]],
    *,
    label: str,
    text_columns: int = 1,
) -> Markup:
    """Returns a table that scrolls inside its own box where it is too wide.

    Args:
        headings: One a column.
        rows: Cells, as many as headings.
        label: What the table is, for those who do not see it.
        text_columns: How many columns, from the left, hold words; others hold numbers.
    """
    kinds = ["text" if n < text_columns else "number" for n in range(len(headings))]

    def line(tag: str, cells: Sequence[str]) -> Markup:
        pairs = zip(cells, kinds, strict=True)
        return element("tr", *(element(tag, cell, class_=kind) for cell, kind in pairs))

    head = element("thead", line("th", headings))
    body = element("tbody", *(line("td", cells) for cells in rows))
    return element(
        "div",
        element("table", head, body),
        class_="scroll",
        tabindex="0",
        role="region",
        aria_label=label,
    )


def settings_tables(settings: Mapping[str, Mapping[str, Any]]) -> Markup:
    """Returns the settings of a run, a small table a section."""
    parts = []
    for name, values in settings.items():
        if not isinstance(values, Mapping):
            values = {"": values}
        rows = [
            element(
                "tr",
                element("td", str(key)),
                element("td", setting_in_words(value), class_="code"),
            )
            for key, value in values.items()
        ]
        heading = element("h3", str(name))
        parts.append(element("div", heading, element("table", *rows)))
    return element("div", *parts, class_="settings")


def _style() -> str:
    """Returns the style sheet, with the colours of both schemes."""
    light = css_variables(is_dark=False) + _GROUNDS[0]
    dark = css_variables(is_dark=True) + _GROUNDS[1]
    sheet = files("dpsgd.report").joinpath("page.css").read_text(encoding="utf-8")
    return (
        f":root{{color-scheme:light dark;{light}}}"
        f"@media(prefers-color-scheme:dark){{:root{{{dark}}}}}\n{sheet}"
    )
