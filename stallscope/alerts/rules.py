"""Rules as values: what packs make and formats write out."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum

from stallscope.alerts.choices import FOLDER, RUNBOOKS, TEAM
from stallscope.alerts.texts import Text


class Severity(StrEnum):
    """Whom an alert reaches: ``PAGE`` somebody at night, ``TICKET`` somebody at work."""

    PAGE = "page"
    TICKET = "ticket"


@dataclass(frozen=True)
class RecordingRule:
    """``name`` is computed once for all who read it."""

    name: str
    expr: str
    labels: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Rule:
    """An alert. ``about``: the labels that it gets beside those of its expression; ``catches``: the verdicts that it is
    for; ``names``: whether the tenant that it names is a culprit or a victim. Annotations are texts, rendered by the
    formats."""

    name: str
    expr: str
    severity: Severity
    summary: Text
    description: Text
    evidence: Text
    threshold_reason: Text
    command: Text
    catches: tuple[str, ...]
    names: str = "culprit"
    about: Mapping[str, Text] = field(default_factory=dict)
    for_s: int = 0
    keep_firing_s: int = 0


@dataclass(frozen=True)
class Group:
    """Rules that are evaluated one after the other, every ``interval_s``: the first may be read by the next."""

    name: str
    interval_s: int
    recordings: tuple[RecordingRule, ...]
    rules: tuple[Rule, ...]


@dataclass(frozen=True)
class Owner:
    """What a team adds to every rule: its name, where runbooks are, and the folder that ``collect`` writes."""

    team: str = TEAM
    runbooks: str = RUNBOOKS
    folder: str = FOLDER

    def runbook(self, rule: Rule) -> str:
        return f"{self.runbooks.rstrip('/')}/{rule.name}.md"
