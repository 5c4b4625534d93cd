"""From packs to a file: which groups, what a user should know of them, and their text in a format."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from stallscope.alerts import plain_pack, slo
from stallscope.alerts.blame_pack import blame_groups
from stallscope.alerts.choices import Format, Pack
from stallscope.alerts.formats.grafana import provisioning
from stallscope.alerts.formats.prometheus import prometheus_rule, rule_file
from stallscope.alerts.plain_pack import plain_groups
from stallscope.alerts.quantities import Quantity
from stallscope.alerts.rules import Group, Owner, Rule
from stallscope.alerts.settings import Limit
from stallscope.alerts.slo import objectives, slo_groups
from stallscope.alerts.thresholds import NoTeacher, Teacher, Threshold
from stallscope.diagnosis.slo import Slo


@dataclass(frozen=True)
class Export:
    """``text`` in the format that was asked for; ``checkable``: the same rules as a rule file, for promtool; ``notes``
    for the user; ``rules``: the alerts, in the order of the file; ``learned``: how many of their thresholds are."""

    text: str
    checkable: str
    notes: tuple[str, ...]
    rules: tuple[Rule, ...]
    learned: int


_HEADING = "Alert rules of stallscope: written by `stallscope alerts export`, to be made anew rather than edited.\n"


@dataclass
class _Heard:
    """A teacher that another one stands behind: remembers how many thresholds were learned."""

    teacher: Teacher
    learned: int = 0
    asked: int = 0

    def threshold(self, quantity: Quantity, limit: Limit) -> Threshold:
        found = self.teacher.threshold(quantity, limit)
        self.asked += 1
        self.learned += found.otherwise.learned
        return found


def export(teacher: Teacher, slos: Sequence[Slo], owner: Owner, pack: Pack, format_: Format) -> Export:
    """Rules with thresholds that the teacher knows. Raises UsageError for objectives that make no sense."""
    found, heard = objectives(slos), _Heard(teacher)
    recorded = format_ is not Format.GRAFANA
    groups: list[Group] = []
    notes: list[str] = []
    if pack is not Pack.PLAIN:
        groups += [*blame_groups(heard, owner, recorded=recorded), *slo_groups(found, owner, recorded=recorded)]
        notes += slo.notes(found)
    if pack is not Pack.BLAME:
        groups += plain_groups(heard, owner, found)
        notes += plain_pack.notes(found)
    if heard.learned < heard.asked and not isinstance(teacher, NoTeacher):
        notes.append(
            f"{heard.learned} of {heard.asked} thresholds were learned, the others are floors: each rule's "
            "threshold_reason says why"
        )
    written = rule_file(groups, owner, _HEADING)
    texts = {
        Format.PROMETHEUS: lambda: written,
        Format.PROMETHEUSRULE: lambda: prometheus_rule(groups, owner, _HEADING),
        Format.GRAFANA: lambda: provisioning(groups, owner, _HEADING),
    }
    rules = tuple(rule for group in groups for rule in group.rules)
    return Export(texts[format_](), written, tuple(notes), rules, heard.learned)
