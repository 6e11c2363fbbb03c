"""HTML that nothing in it can break: text is escaped unless it was built here."""

import html

__all__ = ["Markup", "element", "join"]

_VOID = {"meta", "br", "hr"}


class Markup(str):
    """Text that is HTML already; any other text is escaped where it is used."""

    __slots__ = ()


def element(tag: str, *children: str | None, **attributes: str | None) -> Markup:
    """Returns an element.

    Args:
        tag: Name.
        children: Text, which is escaped, or markup; None is left out.
        attributes: By name, `_` for `-`, with a trailing `_` where Python has the word
            itself; None is left out.

    >>> element("p", "1 < 2", element("b", "so"), class_="note", id=None)
    '<p class="note">1 &lt; 2<b>so</b></p>'
    """
    written = "".join(
        f' {name.rstrip("_").replace("_", "-")}="{html.escape(value)}"'
        for name, value in attributes.items()
        if value is not None
    )
    if tag in _VOID:
        return Markup(f"<{tag}{written}>")
    return Markup(f"<{tag}{written}>{join(*children)}</{tag}>")


def join(*children: str | None) -> Markup:
    """Returns markup and text, which is escaped, one after another.

    >>> join(Markup("<br>"), "a & b", None)
    '<br>a &amp; b'
    """
    return Markup(
        "".join(
            child if isinstance(child, Markup) else html.escape(child)
            for child in children
            if child is not None
        )
    )
