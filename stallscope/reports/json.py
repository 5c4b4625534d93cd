"""Results as JSON: a diagnosis (the schema of ``diagnosis.model``, with its version), or what else a command found."""

from __future__ import annotations

import dataclasses

import orjson

from stallscope.diagnosis.model import Diagnosis
from stallscope.diagnosis.whatif import WhatIf
from stallscope.views.checkup import Checkup
from stallscope.views.comparison import Comparison


def to_json(result: Diagnosis | Checkup | Comparison | WhatIf) -> str:
    """Indented JSON with a line break at its end."""
    return orjson.dumps(dataclasses.asdict(result), option=orjson.OPT_INDENT_2 | orjson.OPT_APPEND_NEWLINE).decode()
