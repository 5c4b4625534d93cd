"""Markup that can't be broken by names from a trace: whatever is not ``Html`` already is text, and gets escaped."""

from __future__ import annotations

import html
from collections.abc import Iterable

import orjson

from stallscope.views import words

_VOID = {"br", "hr", "input", "meta"}
_LONGEST_LABEL = 22


class Html(str):
    """A piece of a page. A plain string beside it is text."""

    __slots__ = ()


def element(tag: str, *children: str, **attributes: str) -> Html:
    """``<tag attributes>children</tag>``; a trailing underscore of an attribute's name is dropped (``class_``)."""
    given = "".join(
        f' {name.rstrip("_").replace("_", "-")}="{html.escape(words.printable(value))}"'
        for name, value in attributes.items()
        if value
    )
    return Html(f"<{tag}{given}>" if tag in _VOID else f"<{tag}{given}>{joined(children)}</{tag}>")


def joined(children: Iterable[str]) -> Html:
    """Children one after the other, text escaped."""
    return Html(
        "".join(
            child if isinstance(child, Html) else html.escape(words.printable(child)) if child else ""
            for child in children
        )
    )


def label(name: str, most: int = _LONGEST_LABEL) -> str:
    """A name for a label in Plotly, which renders a subset of HTML, and formulas: short, and with nothing to render."""
    return html.escape(words.shortened(words.printable(name), most), quote=False).replace("$", "&#36;")


def data_block(identity: str, value: object) -> Html:
    """JSON for scripts to read; within ``<script>``, only ``<`` can end it."""
    text = orjson.dumps(value, option=orjson.OPT_SERIALIZE_NUMPY).decode()
    text = text.replace("<", "\\u003c").replace("\u2028", "\\u2028").replace("\u2029", "\\u2029")
    return Html(f'<script type="application/json" id="{html.escape(identity)}">{text}</script>')
