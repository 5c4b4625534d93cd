"""What the process of a job does: the same as ``stallscope analyze`` and ``whatif``, without a word on the terminal."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from stallscope import asking
from stallscope.asking import Asked, Stages
from stallscope.diagnosis import Diagnosis
from stallscope.diagnosis.whatif import Question, WhatIf
from stallscope.errors import StallscopeError
from stallscope.trace import Trace

if TYPE_CHECKING:
    from stallscope.alerts.preview import PreviewedAlert, Trial


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


@dataclass(frozen=True)
class TriedAlerts:
    """The rules that a trace would be given (``text``), what is to be said of them, and when each fires on the trace:
    None where nothing can evaluate them, which ``missing`` says."""

    text: str
    notes: tuple[str, ...]
    alerts: tuple[PreviewedAlert, ...]
    trial: Trial | None
    missing: str


def tried_alerts(path: Path, asked: Asked, stages: Stages) -> TriedAlerts:
    """The rules for what was asked for of a trace, tried on it. Raises StallscopeError where there are none."""
    from stallscope.alerts.preview import preview, trial

    def part(trace: Trace) -> Trace:
        return asking.selected(asking.with_logs(trace, asked.tenants, stages), asked)

    with stages("watching the trace as a collector would") as advance:
        made = preview(path, asked.slos, part=part if asked.is_part else None, progress=advance)
    tried, missing = None, ""
    try:
        with stages("trying the rules on it") as advance:
            tried = trial(made, progress=advance)
    except StallscopeError as error:
        missing = str(error)
    return TriedAlerts(made.text, made.notes, made.alerts, tried, missing)
