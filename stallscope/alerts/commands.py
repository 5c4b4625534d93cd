"""The command that opens what an alert is about: the folder that ``collect`` writes, from some minutes before it on."""

from __future__ import annotations

import shlex

from stallscope.alerts.promql import span
from stallscope.alerts.rules import Owner
from stallscope.alerts.settings import BEFORE_S, COMMAND_LOOKBACK_S, INTERVAL_S
from stallscope.alerts.texts import ShellWord, Since, Text

_OPTIONS = {"culprit": "--tenant", "tenant": "--tenant", "replica": "--replica"}


def command(owner: Owner, label: str = "", began: str = "") -> Text:
    """``label`` of the alert says which tenant or replica. ``began``: an expression that has had values since the
    incident began; ``%[1]q`` in it is that label's value.
    """
    fallback = f"-{span(COMMAND_LOOKBACK_S + BEFORE_S)}"
    if began:
        earliest = f"min_over_time(timestamp({began})[{span(COMMAND_LOOKBACK_S)}:{span(INTERVAL_S)}])"
        since = Since(f"{earliest} - {BEFORE_S}", label, fallback)
    else:
        since = Since(f"time() - {COMMAND_LOOKBACK_S + BEFORE_S}", "", fallback)
    start = f"stallscope analyze {shlex.quote(owner.folder)} --since "
    return (start, since, ShellWord(_OPTIONS[label], label)) if label else (start, since)
