"""What must not matter to a verdict by replay: what tenants are called, and who is there without doing anything."""

from __future__ import annotations

import json

from stallscope.diagnosis import Diagnosis, Verdict, diagnose
from stallscope.trace.rename import renamed
from tests.diagnosis.replay.recorded import CHAT, FLOOD, recorded

IDLE = CHAT + "  idle: {arrivals: {every_s: 25}, prompt_tokens: 16, output_tokens: 1}\n"


def as_text(diagnosis: Diagnosis) -> str:
    return json.dumps(diagnosis.to_dict())


def test_other_names_change_the_names_and_nothing_else() -> None:
    # Other names sort otherwise.
    first = {"batch": "Tenant A", "chat": "Tenant B", "search": "Tenant C"}
    second = {"Tenant A": "Zebra", "Tenant B": "Yak", "Tenant C": "Aardvark"}
    trace = renamed(recorded(CHAT + FLOOD), {"tenant": lambda name: first[name]})
    again = renamed(trace, {"tenant": lambda name: second[name]})
    told, retold = (as_text(diagnose(one)) for one in (trace, again))
    assert '"Tenant A"' in told
    for name, other in second.items():
        told = told.replace(name, other)
    assert told == retold


def test_an_idle_tenant_changes_no_verdict() -> None:
    without, with_it = (diagnose(recorded(text + FLOOD)) for text in (CHAT, IDLE))
    assert {one.tenant for one in with_it.tenants} - {one.tenant for one in without.tenants} == {"idle"}
    for diagnosis in (without, with_it):
        (incident,) = diagnosis.incidents
        assert (incident.verdict, diagnosis.confidence) == (Verdict.NOISY_NEIGHBOR, "high")
        assert [culprit.tenant for culprit in incident.culprits] == ["batch"]
        assert incident.mechanism == "prefill_queue"
    lost = [diagnosis.incidents[0].lost_s for diagnosis in (without, with_it)]
    assert abs(lost[0] / lost[1] - 1) < 0.1
