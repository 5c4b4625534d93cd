"""A diagnosis as JSON (the schema of ``diagnosis.model``, with its version)."""

from __future__ import annotations

import orjson

from stallscope.diagnosis.model import Diagnosis


def to_json(diagnosis: Diagnosis) -> str:
    """Indented JSON with a line break at its end."""
    return orjson.dumps(diagnosis.to_dict(), option=orjson.OPT_INDENT_2 | orjson.OPT_APPEND_NEWLINE).decode()
