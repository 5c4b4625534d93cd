"""Long tables: sorted, filtered and saved as CSV by whoever looks; names in them are text, and links are ours."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import dash_ag_grid as ag
from dash import html
from dash.development.base_component import Component

from stallscope.reports.markup import element
from stallscope.views import words
from stallscope_dash import parts
from stallscope_dash.markup import Markup

_ROW_PX, _ROWS_A_PAGE = 34, 10
# In the colours of the page, light or dark.
_THEME = (
    "themeQuartz.withParams({backgroundColor: 'var(--ground)', foregroundColor: 'var(--text)', "
    "chromeBackgroundColor: 'var(--raised)', headerTextColor: 'var(--dim)', borderColor: 'var(--line)', "
    "accentColor: 'var(--link)', fontFamily: 'inherit', fontSize: 14, spacing: 5, cellHorizontalPadding: 9, "
    "browserColorScheme: 'inherit'})"
)


@dataclass(frozen=True)
class Column:
    """A field of the rows, its heading, and what it holds: text, a number of so many ``decimals``, or what ``linked``
    made."""

    field: str
    heading: str
    decimals: int | None = None
    link: bool = False
    least_px: int = 98


def linked(text: str, href: str) -> dict[str, str]:
    """A cell of a column of links."""
    return {"text": words.printable(text), "href": href}


def grid(identity: str, columns: Sequence[Column]) -> Component:
    """A table that a part fills with rows (dicts by field)."""
    made = ag.AgGrid(
        id=identity,
        columnDefs=[_definition(column) for column in columns],
        columnSize="responsiveSizeToFit",
        defaultColDef={
            "sortable": True,
            "resizable": True,
            "wrapHeaderText": True,
            "autoHeaderHeight": True,
        },
        dashGridOptions={
            "theme": {"function": _THEME},
            "rowHeight": _ROW_PX,
            "ensureDomOrder": True,
            "enableCellTextSelection": True,
            "animateRows": False,
            "domLayout": "autoHeight",
            "pagination": True,
            "paginationPageSize": _ROWS_A_PAGE,
            "paginationPageSizeSelector": False,
        },
        csvExportParams={"fileName": f"{identity}.csv"},
        style={"height": None},
    )
    save = element("button", "CSV", class_="save", data_csv=identity, aria_label="Save the table as CSV")
    return html.Div([parts.made_later(identity, made, "rowData"), Markup(element("div", save, class_="saves"))])


def _definition(column: Column) -> dict[str, object]:
    made: dict[str, object] = {"field": column.field, "headerName": column.heading, "minWidth": column.least_px}
    if column.decimals is not None:
        shown = {"function": f"d3.format(',.{column.decimals}f')(params.value)"}
        made |= {
            "type": "rightAligned",
            "filter": "agNumberColumnFilter",
            "valueFormatter": shown,
            "useValueFormatterForExport": False,
        }
    elif column.link:
        getter = {"function": f"params.data.{column.field}.text"}
        made |= {
            "cellRenderer": "StallscopeLink",
            "valueGetter": getter,
            "minWidth": 170,
            "filter": "agTextColumnFilter",
        }
    else:
        made |= {"filter": "agTextColumnFilter"}
    return made
