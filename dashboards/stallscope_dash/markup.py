"""A component that shows escaped HTML: what is read and not clicked at costs Dash nothing but its text.

Each of Dash's own components is looked after with every change of any other: a table of them takes seconds.
"""

from __future__ import annotations

from typing import Any

from dash.development.base_component import Component

from stallscope.reports.markup import Html


class Markup(Component):
    """``html`` in a ``div``; links within it change the address as Dash's own do. Its other half is in ``assets``."""

    def __init__(self, html: Html, **given: Any) -> None:
        """``given``: id, className, style."""
        self._namespace = "stallscope_dash"
        self._type = "Markup"
        self._prop_names = ["id", "html", "className", "style"]
        self._valid_wildcard_attributes: list[str] = []
        self.available_properties = self._prop_names
        self.available_wildcard_properties = []
        super().__init__(html=html, **given)  # type: ignore[no-untyped-call]
