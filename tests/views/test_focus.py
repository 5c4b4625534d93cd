"""A diagnosis from one tenant's side."""

from __future__ import annotations

from dataclasses import replace

import pytest

from stallscope.diagnosis import Verdict
from stallscope.errors import UsageError
from stallscope.views.focus import concerning
from tests.views.recordings import diagnosed


def test_only_incidents_that_the_tenant_was_part_of_are_left() -> None:
    diagnosis = diagnosed()
    mine = concerning(diagnosis, "search")
    assert 0 < len(mine.incidents) <= len(diagnosis.incidents)
    assert all("search" in {victim.tenant for victim in incident.victims} for incident in mine.incidents)
    assert concerning(diagnosis, "archive").incidents  # the culprit was part of them too


def test_charges_and_culprits_of_an_incident_are_not_cut() -> None:
    mine = concerning(diagnosed(), "search")
    assert set(mine.incidents) <= set(diagnosed().incidents)


def test_for_a_tenant_without_incidents_all_was_well() -> None:
    diagnosis = diagnosed()
    spared = replace(diagnosis.tenants[0], tenant="spared")
    mine = concerning(replace(diagnosis, tenants=(*diagnosis.tenants, spared)), "spared")
    assert (mine.verdict, mine.incidents) == (Verdict.HEALTHY, ())


def test_an_unknown_tenant_is_told_the_nearest() -> None:
    with pytest.raises(UsageError, match="no tenant 'serch'; it has search"):
        concerning(diagnosed(), "serch")
