"""What the process of a job does: the same as ``stallscope analyze`` and ``whatif``, without a word on the terminal."""

from __future__ import annotations

from pathlib import Path

from stallscope import asking
from stallscope.asking import Asked, Stages
from stallscope.diagnosis import Diagnosis
from stallscope.diagnosis.whatif import Question, WhatIf


def diagnosed(path: Path, asked: Asked, save: bool, stages: Stages) -> Diagnosis:
    """The diagnosis that was kept of an earlier question, or is found now, and is kept then if ``save``.

    Raises StallscopeError.
    """
    saved = asking.saved(path, asked)
    if save:
        saved.check()
    kept = saved.load()
    if kept is not None:
        return kept[0]
    diagnosis = asking.diagnosed(asking.read(path, asked.tenants, stages), asked, stages)
    if save:
        saved.keep(diagnosis)
    return diagnosis


def what_if(path: Path, asked: Asked, question: Question, stages: Stages) -> WhatIf:
    """What would have been in the part of a trace that was asked for. Raises StallscopeError."""
    return asking.what_if(asking.selected(asking.read(path, asked.tenants, stages), asked), question, stages)
