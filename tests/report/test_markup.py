from dpsgd.report.markup import Markup, element, join


def test_text_is_escaped_and_markup_is_not() -> None:
    text = "<script>alert('1')</script> & \"2\""
    escaped = "&lt;script&gt;alert(&#x27;1&#x27;)&lt;/script&gt; &amp; &quot;2&quot;"

    assert element("p", text) == f"<p>{escaped}</p>"
    assert element("p", title=text) == f'<p title="{escaped}"></p>'
    assert element("p", element("b", text)) == f"<p><b>{escaped}</b></p>"
    assert join(text, Markup("<hr>")) == f"{escaped}<hr>"


def test_what_is_built_is_markup_and_so_escaped_once() -> None:
    once = element("i", "a < b")

    assert isinstance(join(once), Markup)
    assert element("p", once) == "<p><i>a &lt; b</i></p>"
    # Text made of markup by other means is text again.
    assert element("p", once + "!") == "<p>&lt;i&gt;a &amp;lt; b&lt;/i&gt;!</p>"


def test_elements_without_content_are_not_closed() -> None:
    assert element("meta", charset="utf-8") == '<meta charset="utf-8">'
    assert element("p", None, id=None, aria_label="x") == '<p aria-label="x"></p>'
