"""What an analyzer said of a trace: ours from its diagnosis, anybody's from JSON."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from stallscope.diagnosis.model import Diagnosis, Incident, InterventionKind, Verdict
from stallscope.errors import UsageError


@dataclass(frozen=True, slots=True)
class Predicted:
    """A tenant's percentile over the requests that arrived in a stretch, and as it would be with ``changed`` as usual.

    Seconds; the stretch in seconds from the start of the run.
    """

    changed: tuple[str, ...]
    tenant: str
    metric: str
    quantile: float
    from_s: float
    to_s: float
    recorded_s: float
    predicted_s: float


@dataclass(frozen=True, slots=True)
class Answer:
    """``culprits`` of what was worst, the first first; ``accused`` are all whom it blames for anything.

    ``request`` is the one that did it, "" where none is named.
    """

    verdict: str
    culprits: tuple[str, ...] = ()
    accused: tuple[str, ...] = ()
    mechanism: str = ""
    request: str = ""
    confidence: str = ""
    predictions: tuple[Predicted, ...] = ()


def answer_of(diagnosis: Diagnosis, start_ns: int) -> Answer:
    """What a diagnosis says of a run that began at ``start_ns``, by its most harmful incident."""
    incidents = diagnosis.incidents
    if not incidents:
        return Answer(str(diagnosis.verdict), confidence=str(diagnosis.confidence))
    worst = incidents[0]
    first = worst.culprits[0] if worst.culprits else None
    requests = first.requests if first else ()
    return Answer(
        str(diagnosis.verdict),
        tuple(culprit.tenant for culprit in worst.culprits),
        tuple(dict.fromkeys(culprit.tenant for one in incidents if _accuses(one) for culprit in one.culprits)),
        worst.mechanism or "",
        (first and first.dominating_request) or (requests[0].request if requests else ""),
        str(diagnosis.confidence),
        tuple(
            Predicted(
                intervention.tenants,
                one.tenant,
                one.metric,
                one.quantile,
                (incident.start_ns - start_ns) / 1e9,
                (incident.end_ns - start_ns) / 1e9,
                one.recorded_s,
                one.predicted_s,
            )
            for incident in incidents
            for intervention in incident.interventions
            if intervention.kind in (InterventionKind.USUAL, InterventionKind.FAIR_SHARE)
            for one in intervention.predictions
        ),
    )


def _accuses(incident: Incident) -> bool:
    """Whether it blames somebody for what happened to others."""
    return incident.verdict is Verdict.NOISY_NEIGHBOR


def read_answers(path: Path) -> dict[str, Answer]:
    """Answers by case, from a JSON object of {"verdict", "culprits", "mechanism", "request", "confidence"}.

    Raises UsageError where it holds anything else.
    """
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise UsageError(f"{path}: cannot be read as JSON: {error}") from error
    if not isinstance(raw, dict):
        raise UsageError(f"{path}: must be an object of answers by case")
    return {case: _read_answer(path, case, one) for case, one in raw.items()}


def _read_answer(path: Path, case: str, raw: object) -> Answer:
    if not isinstance(raw, dict) or not isinstance(raw.get("verdict"), str):
        raise UsageError(f"{path}: {case}: an answer is an object with a verdict")
    culprits = raw.get("culprits", [])
    if not isinstance(culprits, list) or not all(isinstance(name, str) for name in culprits):
        raise UsageError(f"{path}: {case}: culprits must be a list of tenants, the first first")
    mechanism, request, confidence = (str(raw.get(name) or "") for name in ("mechanism", "request", "confidence"))
    return Answer(raw["verdict"], tuple(culprits), tuple(culprits), mechanism, request, confidence)
