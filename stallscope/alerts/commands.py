"""The commands that open what an alert is about, in the folder that ``collect`` writes."""

from __future__ import annotations

import shlex

from stallscope.alerts.promql import span
from stallscope.alerts.rules import Owner
from stallscope.alerts.settings import BEFORE_S, COMMAND_LOOKBACK_S, INTERVAL_S
from stallscope.alerts.texts import ShellWord, Since, Text
from stallscope.watch.families import STEPS

_OPTIONS = {"culprit": "--tenant", "tenant": "--tenant", "replica": "--replica"}


def command(owner: Owner, label: str = "", began: str = "") -> Text:
    """What analyzes an incident, from some minutes before it on.

    ``label`` of the alert says which tenant or replica. ``began``: an expression that has had values since the
    incident began; ``%[1]q`` in it is that label's value.
    """
    back = COMMAND_LOOKBACK_S + BEFORE_S
    before = f"{_earliest(began, COMMAND_LOOKBACK_S)} - {BEFORE_S}" if began else f"vector(time() - {back})"
    # A time before the first span is none of the trace: a collector that has just begun saw its first step at "known".
    known = f'label_replace({_earliest(f"sum ({STEPS.name})", back)}, "of", "steps", "", "")'
    since = Since(f"max({before} or {known})", label if began else "", f"-{span(back)}")
    start = f"stallscope analyze {shlex.quote(owner.folder)} --since "
    return (start, since, ShellWord(_OPTIONS[label], label)) if label else (start, since)


def _earliest(expr: str, back_s: int) -> str:
    """When an expression had its first value, as far back as that."""
    return f"min_over_time(timestamp({expr})[{span(back_s)}:{span(INTERVAL_S)}])"


def doctor(owner: Owner) -> Text:
    """What says which telemetry is missing."""
    return (f"stallscope doctor {shlex.quote(owner.folder)}",)
