"""How verdicts, mechanisms, times and amounts are said to people, in every report alike."""

from __future__ import annotations

import dataclasses
import shlex
from datetime import UTC, datetime
from enum import StrEnum

from stallscope.diagnosis.metrics import END_TO_END, IN_WORDS, METRICS
from stallscope.diagnosis.model import (
    Culprit,
    Diagnosis,
    Incident,
    Intervention,
    Prediction,
    Quantile,
    ReplayCheck,
    Verdict,
)
from stallscope.trace.rename import REDACTED_SOURCE

# What a mechanism means, as the end of the sentence "A stalled B: ...".
MECHANISM_WORDS = {
    "own_work": "its own prefill and decode",
    "intake": "it had not reached the engine's queue",
    "step_boundary": "they arrived while a step full of its work was in flight, and a step is not interrupted",
    "prefill_queue": "its prompts took the tokens of each step, and theirs had to queue",
    "kv_pinning": "its requests held the KV cache, and theirs did not fit",
    "slot_exhaustion": "its requests held the batch's slots",
    "head_of_line": "its request stood at the head of the queue and did not fit",
    "policy": "the scheduling policy served it first",
    "grammar_compile": "a grammar was compiled",
    "kv_transfer": "KV blocks were fetched from elsewhere",
    "adapter_swap": "an adapter was loaded",
    "encoder": "the encoder was busy",
    "prefill_interference": "its prefill ran in the same steps as their next tokens",
    "decode_drag": "its decodes made the steps they shared longer",
    "prefill_priority": "its prefills ran instead of their tokens",
    "preemption": "it took their KV blocks",
    "recompute": "what they lost to it had to be computed again",
    "cache_eviction": "it pushed the beginnings of their prompts out of the prefix cache",
    "step_fixed": "what a step costs whatever is in it",
    "unexplained": "the steps took longer than their work explains",
    "lockstep": "the steps waited for another data-parallel rank's batch",
    "host_gap": "the engine's host did not dispatch the next step",
    "delivery": "the output waited to be delivered",
    "unobserved": "telemetry is missing there",
}
METRIC_WORDS = dict(zip(METRICS, IN_WORDS, strict=True)) | {END_TO_END: "end to end"}
NO_REPLAY = "no replay"
OTHERS = "(others)"  # those that are not shown one by one
WORST_UNSEEN = 0.05  # share of a replay's steps beyond anything recorded from which on that is said


# --- names and amounts --------------------------------------------------------------------------------------------


def printable(text: str) -> str:
    """Text from a trace on one line, in which nothing is invisible and nothing is a command to a terminal."""
    if not text:
        return "(no name)"
    if text.isprintable():
        return text
    return "".join(one if one.isprintable() else one.encode("unicode_escape").decode("ascii") for one in text)


def legible(diagnosis: Diagnosis) -> Diagnosis:
    """The same diagnosis with every text in it ``printable``, for faces that write it out."""
    made = _legible(diagnosis)
    if not isinstance(made, Diagnosis):
        raise TypeError(type(made))
    return made


def _legible(value: object) -> object:
    if isinstance(value, StrEnum):
        return value
    if isinstance(value, str):
        return printable(value) if value else value
    if isinstance(value, tuple):
        return tuple(_legible(one) for one in value)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        changed = {field.name: _legible(getattr(value, field.name)) for field in dataclasses.fields(value)}
        return dataclasses.replace(value, **changed)
    return value


def shortened(text: str, most: int) -> str:
    """Text of at most ``most`` characters, with a mark where its middle is left out."""
    if len(text) <= most:
        return text
    head = (most - 1) // 2
    return f"{text[:head]}…{text[len(text) - (most - 1 - head) :]}"


def duration(seconds: float) -> str:
    """A length of time with its unit: ms below a second."""
    if abs(seconds) < 1.0:
        return f"{seconds * 1e3:.0f} ms" if abs(seconds) >= 0.01 else f"{seconds * 1e3:.1f} ms"
    return f"{seconds:.2f} s" if abs(seconds) < 10 else f"{seconds:,.0f} s"


def clock(time_ns: int, *, zone: bool = False) -> str:
    """A time of day in the local zone, to a tenth of a second."""
    local = datetime.fromtimestamp(time_ns / 1e9, tz=UTC).astimezone()
    text = f"{local:%H:%M:%S}.{local.microsecond // 100_000}"
    return f"{text} {local:%Z}" if zone else text


def iso(time_ns: int) -> str:
    """A time in UTC to a microsecond, as every ``--since`` takes it."""
    return datetime.fromtimestamp(time_ns // 1000 / 1e6, tz=UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")


def day(time_ns: int) -> str:
    """A date in the local zone."""
    return f"{datetime.fromtimestamp(time_ns / 1e9, tz=UTC).astimezone():%Y-%m-%d}"


def counted(number: int, noun: str) -> str:
    """``1 request``, ``2,000 requests``."""
    return f"{number:,} {noun}" if number == 1 else f"{number:,} {noun}s"


def listed(names: list[str], most: int | None = None) -> str:
    """``a``, ``a and b``, ``a, b and c``; where there are more than ``most``: ``a, b and 7 more``."""
    if most is not None and len(names) > most:
        names = [*names[: most - 1], f"{len(names) - most + 1} more"]
    return " and ".join([", ".join(names[:-1]), names[-1]]) if len(names) > 1 else "".join(names)


def quantile_name(quantile: float) -> str:
    """``p99``; the worst where too few requests are behind it for a percentile."""
    return "worst" if quantile >= 1 else f"p{quantile * 100:g}"


def quantile(value: Quantile) -> str:
    """``p99 1.20 s``."""
    return f"{quantile_name(value.quantile)} {duration(value.value_s)}"


# --- sentences ----------------------------------------------------------------------------------------------------

_NAMED = 6  # tenants in a sentence
_MUCH_OF_IT = 0.2  # of what was lost, which is said if it was lost by those who are blamed


def headline(diagnosis: Diagnosis) -> str:
    """The answer in one sentence; of many tenants, the first to name are those of the worst incidents."""
    incidents = diagnosis.incidents
    if not incidents:
        if diagnosis.verdict is Verdict.HEALTHY:
            return "nobody was stalled beyond the usual"
        return "too little was recorded to tell a stall from the usual"
    main = [incident for incident in incidents if incident.verdict is diagnosis.verdict]
    lost = sum(incident.lost_s for incident in main)
    victims = list(dict.fromkeys(victim.tenant for incident in main for victim in incident.victims))
    where = f"{counted(len(main), 'incident')}, {duration(lost)} lost"
    beside = len(incidents) - len(main)
    where += f" (and {counted(beside, 'incident')} of another kind)" if beside else ""
    culprits = list(dict.fromkeys(culprit.tenant for incident in main for culprit in incident.culprits))
    who, waited = listed(culprits, _NAMED), listed(victims, _NAMED)
    if diagnosis.verdict is Verdict.NOISY_NEIGHBOR:
        hit = [victim for victim in victims if victim not in culprits] or victims
        own = sum(one.lost_s for incident in main for one in incident.victims if one.tenant in culprits)
        of_it = f", {duration(own)} of it their own" if lost * _MUCH_OF_IT < own < lost else ""
        return f"{who} stalled {listed(hit, _NAMED)}: {where}{of_it}"
    if diagnosis.verdict is Verdict.SELF_INFLICTED:
        return f"{who} stalled itself: {where}"
    if diagnosis.verdict is Verdict.ENGINE_STALL:
        return f"the engine itself stalled {waited}: {where}"
    if diagnosis.verdict is Verdict.OUTSIDE_ENGINE:
        return f"{waited} waited outside the engine, which had done its part: {where}"
    if diagnosis.verdict is Verdict.COLD_CACHE:
        return f"{waited} waited for prompts that the cache had lost: {where}"
    if diagnosis.verdict is Verdict.OVERLOAD:
        return f"{waited} waited, but no tenant in particular caused it: {where}"
    return f"{waited} waited, but too little was recorded to say why: {where}"


_ESTIMATED = {1: " (requests only: batches are estimates)", 2: " (sums of steps: batches are estimates)"}


def evidence(diagnosis: Diagnosis) -> str:
    """How sure, and on what: the second line of every report."""
    c = diagnosis.coverage
    lost = "none lost" if not c.steps_lost else f"{c.steps_lost:,} lost"
    parts = [
        f"confidence {diagnosis.confidence} ({_basis(diagnosis)})",
        f"fidelity {c.fidelity}{_ESTIMATED.get(c.fidelity, '')}",
        f"{counted(c.steps, 'step')} ({lost})" if c.steps else "",
        counted(c.requests, "request") + (f" ({c.requests_open} still open)" if c.requests_open else ""),
        f"{c.known_tenant_share:.0%} of known tenant",
        f"step cost explained to {c.cost_model_error:.0%}",
    ]
    if c.requests_lost:
        parts.insert(4, f"{c.requests_lost} lost from sight")
    if c.kept_share < 1:
        parts.append(f"{c.kept_share:.0%} of the spans kept")
    if c.records_dropped:
        parts.append(f"{c.records_dropped:,} records dropped by the engine")
    return " · ".join(filter(None, parts))


def incident_when(incident: Incident) -> str:
    """When and where an incident was."""
    length = duration((incident.end_ns - incident.start_ns) / 1e9)
    return f"{clock(incident.start_ns)} to {clock(incident.end_ns, zone=True)} ({length}) on {incident.replica}"


def incident_line(incident: Incident) -> str:
    """The same, and what it was."""
    return f"{incident_when(incident)}: {incident.verdict}"


def tonight(diagnosis: Diagnosis) -> Intervention | None:
    """Of the worst incident, the first remedy that needs no change of the engine and helps by replay."""
    remedies = (remedy for incident in diagnosis.incidents[:1] for remedy in incident.remedies)
    return next((remedy for remedy in remedies if remedy.tonight and remedy.restored > 0), None)


def _basis(diagnosis: Diagnosis) -> str:
    """What a verdict rests on: a replay, or charges alone, and then why."""
    if any(check.trusted for check in diagnosis.replays):
        return "replayed"
    reasons = dict.fromkeys(check.reason for check in diagnosis.replays if check.reason)
    return f"charges only, {NO_REPLAY}" + "".join(f": {reason}" for reason in reasons)


def explain_command(diagnosis: Diagnosis) -> str:
    """What to type to see the worst request's time; "" where nobody was hit, and where the trace is not named."""
    worst = [victim.worst_request for incident in diagnosis.incidents[:1] for victim in incident.victims[:1]]
    if not worst or diagnosis.source == REDACTED_SOURCE:
        return ""
    return shlex.join(["stallscope", "explain", diagnosis.source, worst[0]])


def replay_line(check: ReplayCheck) -> str:
    """How well a replica could be replayed, or why it was not."""
    parts = [check.policy] if check.policy else []
    if check.forced_steps:
        parts.append(f"{check.forced_agreement:.1%} of {counted(check.forced_steps, 'step')} with the recorded batch")
    if check.free_error >= 0:
        parts.append(f"percentiles met within {check.free_error:.0%}")
    if check.step_cost_error >= 0:
        parts.append(f"step cost within {check.step_cost_error:.1%} on steps not fitted")
    if check.draws:
        parts.append(counted(check.draws, "draw"))
    if not check.trusted:
        parts.insert(0, f"not trusted: {check.reason}" if check.reason else "not trusted")
    return f"{check.replica}: {', '.join(parts)}"


def culprit_line(culprit: Culprit, incident: Incident) -> str:
    """What a culprit did, after its name."""
    source = f" (tenant named by {culprit.tenant_source})" if culprit.tenant_source else ""
    part = f"{culprit.share:.0%} of the {duration(incident.charged_s)} charged to anyone"
    replayed = "" if culprit.restored is None else f"; as usual, {culprit.restored:.0%} of the excess would be gone"
    blamed = "" if culprit.shapley is None or len(incident.culprits) < 2 else f" ({culprit.shapley:.0%} of the blame)"
    return f"{source}, {part}, by {culprit.mechanism}: {mechanism(culprit.mechanism)}{replayed}{blamed}"


def mechanism(name: str) -> str:
    """What a mechanism means, as the end of a sentence; its name where there are no words for it."""
    return MECHANISM_WORDS.get(name, name)


def restored(intervention: Intervention) -> str:
    """Share of the victims' excess that would have been gone, with the range of its draws."""
    low, high = f"{intervention.restored_low:.0%}", f"{intervention.restored_high:.0%}"
    spread = "" if low == high else f" ({low} to {high})"
    return f"{intervention.restored:.0%}{spread}"


def predictions(intervention: Intervention) -> list[str]:
    """``chat TTFT p99 1.20 s, then 21 ms (15 ms to 40 ms)``: the others first, then who was changed."""
    ordered = sorted(intervention.predictions, key=lambda one: one.tenant in intervention.tenants)
    return [_prediction(one) for one in ordered]


def _prediction(value: Prediction) -> str:
    name = f"{value.tenant} {METRIC_WORDS.get(value.metric, value.metric)} {quantile_name(value.quantile)}"
    then = f"{name} {duration(value.recorded_s)}, then"
    if value.high_s <= 0 < value.recorded_s:
        return f"{then} none: no request left"
    low, high = duration(value.low_s), duration(value.high_s)
    spread = "" if low == high else f" ({low} to {high})"
    return f"{then} {duration(value.predicted_s)}{spread}"


def caveat(intervention: Intervention) -> str:
    """A warning where a replay left what the recording has shown; "" elsewhere."""
    if intervention.unseen < WORST_UNSEEN:
        return ""
    return f"{intervention.unseen:.0%} of its steps are larger than any recorded"
