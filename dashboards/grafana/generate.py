"""Writes the boards of this folder from ``stallscope.alerts.boards`` (``make boards``); a test compares the two."""

from __future__ import annotations

import json
from pathlib import Path

from stallscope.alerts.boards import BOARDS
from stallscope.alerts.boards.grafana import Board, to_json

FOLDER = Path(__file__).parent


def text(board: Board) -> str:
    """A board as its file has it."""
    return json.dumps(to_json(board), indent=2, ensure_ascii=False) + "\n"


if __name__ == "__main__":
    for name, board in BOARDS.items():
        (FOLDER / name).write_text(text(board), encoding="utf-8")
