"""Diagnoses for the tests of reports: a recorded stall, the same under hostile names, and one with all that a replay
adds."""

from __future__ import annotations

from dataclasses import replace
from functools import cache

from stallscope.diagnosis import Diagnosis, diagnose
from stallscope.diagnosis.model import Confidence, Intervention, InterventionKind, Prediction, ReplayCheck
from stallscope.trace import Trace
from stallscope.trace.rename import renamed
from tests.views.recordings import recorded, without_replay

HOSTILE = (
    "</script><script>alert(1)</script>",
    '"><img src=x onerror=alert(2)>',
    "a|b`c*d_e\n# not a heading\n[link](http://example.org) @someone #7 \x1b[31m\u202e%{y} <b>bold</b> $x$",
)


@cache
def hostile_trace() -> Trace:
    """The recorded stall, in which tenants and requests are named to break what shows them."""
    tenants = sorted(set(recorded().requests.column("tenant").to_pylist()))
    names = dict(zip(tenants, HOSTILE, strict=True))
    return renamed(recorded(), {"tenant": lambda name: names[name], "request": lambda name: f"{HOSTILE[0]}{name}"})


@cache
def hostile_diagnosis() -> Diagnosis:
    return without_replay(diagnose(hostile_trace()))


def with_replay(diagnosis: Diagnosis) -> Diagnosis:
    """The diagnosis with a trusted replay: two interventions and two remedies for its worst incident."""
    worst = diagnosis.incidents[0]
    culprit, victim = worst.culprits[0].tenant, worst.victims[0].tenant
    predictions = (
        Prediction(victim, "ttft", 0.9, 103, 3.861, 3.7, 0.021, 0.014, 0.04),
        Prediction(culprit, "ttft", 1.0, 3, 4.2, 4.3, 6.1, 5.5, 7.25),
    )

    def changed(kind: InterventionKind, what: str, how: str, tonight: bool, restored: float) -> Intervention:
        spread = (restored - 0.06, restored + 0.03)
        unseen = 0.2 if kind is InterventionKind.REMEDY and not tonight else 0.0
        return Intervention(kind, what, how, (culprit,), restored, *spread, predictions, 0.97, tonight, unseen)

    interventions = (
        changed(InterventionKind.USUAL, f"{culprit} as usual", "", False, 0.93),
        changed(InterventionKind.WITHOUT_REQUEST, "without its largest request", "", False, 0.41),
    )
    remedies = (
        changed(
            InterventionKind.REMEDY,
            "chunks of at most 512 tokens",
            "vllm serve --max-num-batched-tokens 512",
            True,
            0.81,
        ),
        changed(InterventionKind.REMEDY, "a fair share of the KV cache", "", False, 0.88),
    )
    culprits = (replace(worst.culprits[0], restored=0.93, shapley=1.0), *worst.culprits[1:])
    incident = replace(
        worst,
        confidence=Confidence.HIGH,
        culprits=culprits,
        interventions=interventions,
        remedies=remedies,
        group="tenants that came in the same minute with prompts of one shape",
    )
    check = ReplayCheck(incident.replica, "fcfs", 0.991, 4076, 0.034, 0.021, 5, True, "")
    return replace(
        diagnosis, confidence=Confidence.HIGH, incidents=(incident, *diagnosis.incidents[1:]), replays=(check,)
    )
