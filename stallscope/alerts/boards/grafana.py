"""Boards, panels and variables as data, and their JSON: Grafana's classic dashboard model, schema version 42.

Checked against the types of ``@grafana/schema`` 13.2. Panels flow from left to right within their row; what Grafana
takes for granted is left out.
"""

from __future__ import annotations

import string
from collections.abc import Iterator
from dataclasses import dataclass

from stallscope.watch.families import SCRAPE_S

Json = dict[str, object]

SCHEMA_VERSION = 42
WIDTH = 24  # of a board, in Grafana's columns
DATASOURCE: Json = {"type": "prometheus", "uid": "${datasource}"}
# As a matcher's value: any name, a newline in it too, which a dot alone does not match before Prometheus 3.
ANY = "(?s).*"
GREEN, YELLOW, RED = "green", "yellow", "red"


@dataclass(frozen=True, slots=True)
class Query:
    """``expr``: PromQL with Grafana's variables in it; ``legend``: a template such as ``{{tenant}}``."""

    expr: str
    legend: str = ""


@dataclass(frozen=True, slots=True)
class Link:
    """A data link: where a click on a value leads."""

    title: str
    url: str


@dataclass(frozen=True, slots=True)
class Column:
    """How a table's column is named and shown; ``unit`` "" leaves the panel's."""

    field: str
    name: str
    unit: str = ""


@dataclass(frozen=True, slots=True)
class Panel:
    """One question and its answer. ``unit``: as Grafana names it. ``steps``: (from which value on, colour), ascending.

    ``lower``: what is below the first step's value; by default green, "all is well".
    """

    title: str
    about: str
    queries: tuple[Query, ...]
    unit: str
    width: int
    height: int = 8
    steps: tuple[tuple[float, str], ...] = ()
    lower: str = GREEN
    most: float | None = None
    links: tuple[Link, ...] = ()


class Lines(Panel):
    """Values over time."""


class Areas(Panel):
    """Values over time, one upon the other: for what adds up."""


class Number(Panel):
    """The latest value, large, coloured by ``steps``."""


class Bars(Panel):
    """The latest values, the largest first."""


@dataclass(frozen=True, slots=True)
class Matrix(Panel):
    """The latest values by two labels: a row for each value of ``rows``, a column for each of ``columns``."""

    rows: str = ""
    columns: str = ""


@dataclass(frozen=True, slots=True)
class Table(Panel):
    """The latest series, their labels as columns; only those of ``shown``, in that order."""

    shown: tuple[Column, ...] = ()


@dataclass(frozen=True, slots=True)
class Text:
    """Markdown, with Grafana's variables in it."""

    title: str
    content: str
    width: int
    height: int


@dataclass(frozen=True, slots=True)
class Row:
    """A headline and the panels below it."""

    title: str
    panels: tuple[Panel | Text, ...]


@dataclass(frozen=True, slots=True)
class Choice:
    """A variable that is filled by a query: ``label_values(...)``, or ``query_result(...)`` and a ``regex``.

    ``many``: several values, or all of them. ``hidden``: its value is for texts alone.
    """

    name: str
    label: str
    query: str
    about: str
    many: bool = True
    regex: str = ""
    hidden: bool = False


@dataclass(frozen=True, slots=True)
class Listed:
    """A variable with a few fixed values, the first of which is the default."""

    name: str
    label: str
    values: tuple[str, ...]
    about: str


@dataclass(frozen=True, slots=True)
class Typed:
    """A variable that is typed in."""

    name: str
    label: str
    default: str
    about: str


@dataclass(frozen=True, slots=True)
class Board:
    """``uid`` is its address in Grafana; ``pages``: PromQL of what is marked on each panel over time."""

    uid: str
    title: str
    about: str
    variables: tuple[Choice | Listed | Typed, ...]
    rows: tuple[Row, ...]
    pages: str = ""


def to_json(board: Board) -> Json:
    """The board as Grafana imports it."""
    return {
        "uid": board.uid,
        "title": board.title,
        "description": board.about,
        "tags": ["stallscope"],
        "schemaVersion": SCHEMA_VERSION,
        "editable": True,
        "graphTooltip": 1,
        "refresh": f"{SCRAPE_S}s",
        "time": {"from": "now-30m", "to": "now"},
        "timezone": "browser",
        "links": [],
        "annotations": {"list": [_pages(board.pages)] if board.pages else []},
        "templating": {"list": [_DATASOURCE_VARIABLE, *map(_variable, board.variables)]},
        "panels": list(_panels(board.rows)),
    }


# --- variables ----------------------------------------------------------------------------------------------------
_DATASOURCE_VARIABLE: Json = {
    "name": "datasource",
    "label": "Prometheus",
    "description": "The Prometheus that scrapes what this board shows.",
    "type": "datasource",
    "query": "prometheus",
}


def _variable(variable: Choice | Listed | Typed) -> Json:
    said: Json = {"name": variable.name, "label": variable.label, "description": variable.about}
    if isinstance(variable, Typed):
        current = {"text": variable.default, "value": variable.default}
        return said | {"type": "textbox", "query": variable.default, "current": current, "options": [current]}
    if isinstance(variable, Listed):
        options = [{"text": one, "value": one, "selected": not at} for at, one in enumerate(variable.values)]
        return said | {
            "type": "custom",
            "query": ",".join(variable.values),
            "current": options[0],
            "options": options,
        }
    asked = {"qryType": 1 if variable.query.startswith("label_values") else 3, "query": variable.query, "refId": "A"}
    said |= {
        "type": "query",
        "datasource": DATASOURCE,
        "query": asked,
        "regex": variable.regex,
        "refresh": 2,  # with each change of the time range: tenants come and go
        "sort": 1,
        "hide": 2 if variable.hidden else 0,
    }
    if variable.many:
        everything = {"text": "All", "value": "$__all"}
        said |= {"multi": True, "includeAll": True, "allValue": ANY, "current": everything}
    return said


def _pages(expr: str) -> Json:
    return {
        "name": "Pages",
        "datasource": DATASOURCE,
        "enable": True,
        "hide": False,
        "iconColor": RED,
        "expr": expr,
        "step": f"{SCRAPE_S}s",
        "titleFormat": "{{alertname}}",
        "textFormat": "{{tenant}}{{replica}}",
    }


# --- panels -------------------------------------------------------------------------------------------------------
def _panels(rows: tuple[Row, ...]) -> Iterator[Json]:
    number = y = 0
    for row in rows:
        number += 1
        yield {
            "id": number,
            "type": "row",
            "title": row.title,
            "collapsed": False,
            "gridPos": {"x": 0, "y": y, "w": WIDTH, "h": 1},
            "panels": [],
        }
        y += 1
        x = height = 0
        for panel in row.panels:
            if x + panel.width > WIDTH:
                x, y, height = 0, y + height, 0
            number += 1
            place = {"x": x, "y": y, "w": panel.width, "h": panel.height}
            yield {"id": number, "title": panel.title, "gridPos": place} | _panel(panel)
            x, height = x + panel.width, max(height, panel.height)
        y += height


def _panel(panel: Panel | Text) -> Json:
    if isinstance(panel, Text):
        return {"type": "text", "options": {"mode": "markdown", "content": panel.content}}
    kind, options, custom = _KINDS[type(panel)]
    instant = not isinstance(panel, Lines | Areas)
    defaults: Json = {"unit": panel.unit, "min": 0, "custom": custom}
    if panel.most is not None:
        defaults["max"] = panel.most
    if panel.steps:
        steps = [{"color": panel.lower, "value": None}, *({"color": hue, "value": at} for at, hue in panel.steps)]
        defaults["thresholds"] = {"mode": "absolute", "steps": steps}
        if instant:
            defaults["color"] = {"mode": "thresholds"}
        else:
            defaults["custom"] = custom | {"thresholdsStyle": {"mode": "dashed"}}
    elif instant:  # or Grafana would call it red from 80 on
        defaults["color"] = {"mode": "fixed", "fixedColor": "blue"}
    if panel.links:
        defaults["links"] = [{"title": link.title, "url": link.url} for link in panel.links]
    if isinstance(panel, Number | Bars):
        defaults["noValue"] = "none"
    return {
        "type": kind,
        "description": panel.about,
        "datasource": DATASOURCE,
        "interval": f"{SCRAPE_S}s",  # no finer than what was scraped; $__rate_interval follows from it
        "targets": [
            _target(ref, query, instant, table=isinstance(panel, Matrix | Table))
            for ref, query in zip(string.ascii_uppercase, panel.queries, strict=False)
        ],
        "fieldConfig": {"defaults": defaults, "overrides": _overrides(panel)},
        "options": options,
        "transformations": _transformations(panel),
    }


def _target(ref: str, query: Query, instant: bool, table: bool) -> Json:
    return {
        "refId": ref,
        "datasource": DATASOURCE,
        "expr": query.expr,
        "legendFormat": query.legend,
        "instant": instant,
        "range": not instant,
        "format": "table" if table else "time_series",
    }


def _overrides(panel: Panel) -> list[Json]:
    if isinstance(panel, Matrix):  # a name gets no colour of a value
        plain = [{"id": "custom.cellOptions", "value": {"type": "auto"}}]
        return [{"matcher": {"id": "byType", "options": "string"}, "properties": plain}]
    if isinstance(panel, Table):
        return [
            {
                "matcher": {"id": "byName", "options": column.field},
                "properties": [{"id": "unit", "value": column.unit}],
            }
            for column in panel.shown
            if column.unit
        ]
    return []


def _transformations(panel: Panel) -> list[Json]:
    if isinstance(panel, Matrix):
        by = {"rowField": panel.rows, "columnField": panel.columns, "valueField": "Value", "emptyValue": "empty"}
        return [{"id": "groupingToMatrix", "options": by}]
    if isinstance(panel, Table):
        names = [column.field for column in panel.shown]
        order = {
            "indexByName": {name: at for at, name in enumerate(names)},
            "renameByName": {column.field: column.name for column in panel.shown},
        }
        return [
            {"id": "filterFieldsByName", "options": {"include": {"names": names}}},
            {"id": "organize", "options": order},
        ]
    return []


_LEGEND: Json = {
    "showLegend": True,
    "displayMode": "table",
    "placement": "bottom",
    "calcs": ["lastNotNull", "max"],
    "sortBy": "Max",
    "sortDesc": True,
}
_OVER_TIME: Json = {"legend": _LEGEND, "tooltip": {"mode": "multi", "sort": "desc", "hideZeros": True}}
_LATEST: Json = {"calcs": ["lastNotNull"], "fields": "", "values": False}
_LINE: Json = {"drawStyle": "line", "lineWidth": 1, "showPoints": "never", "spanNulls": False}
_STACKED: Json = {"fillOpacity": 40, "stacking": {"mode": "normal", "group": "A"}}
_TABLE: Json = {"showHeader": True, "cellHeight": "sm"}
# The plugin, its options, and what is its own of a field's configuration.
_KINDS: dict[type[Panel], tuple[str, Json, Json]] = {
    Lines: ("timeseries", _OVER_TIME, _LINE | {"fillOpacity": 5}),
    Areas: ("timeseries", _OVER_TIME, _LINE | _STACKED),
    Number: (
        "stat",
        {"reduceOptions": _LATEST, "colorMode": "background", "graphMode": "none", "textMode": "auto"},
        {},
    ),
    Bars: (
        "bargauge",
        {"reduceOptions": _LATEST, "displayMode": "basic", "orientation": "horizontal", "valueMode": "color"},
        {},
    ),
    Matrix: ("table", _TABLE, {"align": "auto", "cellOptions": {"type": "color-background", "mode": "basic"}}),
    Table: ("table", _TABLE, {"align": "auto"}),
}
