"""The pages: each a path, a layout, and parts that draw into it what the address asks for."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from dash.development.base_component import Component

from stallscope_dash.parts import Identity
from stallscope_dash.scene import Scene


@dataclass(frozen=True)
class Part:
    """What fills a property of a component of the page's layout: drawn again whenever the address or data change."""

    identity: Identity
    draw: Callable[[Scene], object]
    prop: str = "html"


@dataclass(frozen=True)
class Page:
    """``layout`` is there at once, with places that its ``parts`` fill as they get ready."""

    path: str
    title: str
    layout: Callable[[], Component]
    parts: tuple[Part, ...]
