"""The pack on what a watch exposes: who stalls whom, what that is by, and whether telemetry is there to tell."""

from __future__ import annotations

from stallscope.alerts import replica_rules, telemetry_rules, tenant_rules
from stallscope.alerts.rules import Group, Owner
from stallscope.alerts.settings import INTERVAL_S
from stallscope.alerts.thresholds import Teacher


def blame_groups(teacher: Teacher, owner: Owner, *, recorded: bool = True) -> tuple[Group, ...]:
    """The pack but for SLOs, pages first; without recording rules where whoever evaluates has none."""
    rules = (
        tenant_rules.page(teacher, owner, recorded=recorded),
        replica_rules.page(teacher, owner),
        *tenant_rules.tickets(teacher, owner),
        *replica_rules.tickets(teacher, owner),
        *telemetry_rules.tickets(teacher, owner),
    )
    return (Group("stallscope", INTERVAL_S, tenant_rules.recordings() if recorded else (), rules),)
