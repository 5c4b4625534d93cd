"""Rows of an answer as a table for a terminal, as CSV and as JSON."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from datetime import date, datetime, time
from decimal import Decimal
from itertools import islice
from typing import TextIO

from rich.cells import cell_len
from rich.console import Console
from rich.table import Table
from rich.text import Text

from stallscope.views import words

MOST_ROWS = 500  # on a terminal
_LONGEST_CELL = 200


def print_rows(columns: Sequence[str], rows: Iterable[Sequence[object]], console: Console) -> bool:
    """The first ``MOST_ROWS`` rows as a table, or, where that is too wide, their columns one below the other; returns
    whether there are more rows."""
    taken = list(islice(rows, MOST_ROWS + 1))
    cells = [[words.shortened(_cell(value), _LONGEST_CELL) for value in row] for row in taken[:MOST_ROWS]]
    if not cells:
        console.print("no rows")
        return False
    names = [words.printable(name) for name in columns]
    widths = [max(cell_len(text) for text in column) for column in zip(names, *cells, strict=True)]
    if sum(widths) + 2 * len(widths) <= console.width:
        numbers = [any(isinstance(row[at], int | float | Decimal) for row in taken) for at in range(len(names))]
        console.print(_table(names, numbers, cells))
    else:
        _print_records(names, cells, console)
    return len(taken) > MOST_ROWS


def _table(names: Sequence[str], numbers: Sequence[bool], cells: Sequence[Sequence[str]]) -> Table:
    table = Table(box=None, header_style="bold", pad_edge=False)
    for name, number in zip(names, numbers, strict=True):
        table.add_column(Text(name), justify="right" if number else "left", overflow="fold")
    for row in cells:
        table.add_row(*(Text(text) for text in row))
    return table


def _print_records(names: Sequence[str], cells: Sequence[Sequence[str]], console: Console) -> None:
    longest = max(cell_len(name) for name in names)
    for number, row in enumerate(cells, start=1):
        console.print(Text(f"row {number}", style="bold"))
        for name, text in zip(names, row, strict=True):
            console.print(Text.assemble((name.rjust(longest), "dim"), "  ", text), soft_wrap=True)


def write_csv(columns: Sequence[str], rows: Iterable[Sequence[object]], file: TextIO) -> None:
    """All rows; nothing where there is no value."""
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(columns)
    writer.writerows(["" if value is None else value for value in row] for row in rows)


def write_json(columns: Sequence[str], rows: Iterable[Sequence[object]], file: TextIO) -> None:
    """An array with an object a row, each on its own line; what is no number is null."""
    file.write("[")
    for number, row in enumerate(rows):
        made = {name: _plain(value) for name, value in zip(columns, row, strict=True)}
        file.write(f"{',' if number else ''}\n{json.dumps(made, ensure_ascii=False, allow_nan=False)}")
    file.write("\n]\n")


def _cell(value: object) -> str:
    if value is None or value == "":
        return ""
    if isinstance(value, float):
        return f"{value:.3f}" if abs(value) >= 1000 else f"{value:.6g}"
    return words.printable(str(value))


def _plain(value: object) -> object:
    """As JSON has it."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, Decimal):
        return int(value) if value == value.to_integral_value() else float(value)
    if isinstance(value, datetime | date | time):
        return value.isoformat()
    if isinstance(value, Mapping):
        return {str(key): _plain(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(one) for one in value]
    return str(value)
