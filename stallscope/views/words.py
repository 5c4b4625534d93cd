"""How verdicts, mechanisms, times and amounts are said to people, in every report alike."""

from __future__ import annotations

from datetime import UTC, datetime

from stallscope.diagnosis.model import Diagnosis, Incident, Quantile, Verdict

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
    "host_gap": "the engine's host did not dispatch the next step",
    "delivery": "the output waited to be delivered",
    "unobserved": "telemetry is missing there",
}
METRIC_WORDS = {"ttft": "TTFT", "itl": "longest gap", "delivery": "delivery"}


def duration(seconds: float) -> str:
    """A length of time with its unit: ms below a second."""
    if abs(seconds) < 1.0:
        return f"{seconds * 1e3:.0f} ms" if abs(seconds) >= 0.01 else f"{seconds * 1e3:.1f} ms"
    return f"{seconds:.2f} s" if abs(seconds) < 10 else f"{seconds:.0f} s"


def clock(time_ns: int, *, zone: bool = False) -> str:
    """A time of day in the local zone, to a tenth of a second."""
    local = datetime.fromtimestamp(time_ns / 1e9, tz=UTC).astimezone()
    text = f"{local:%H:%M:%S}.{local.microsecond // 100_000}"
    return f"{text} {local:%Z}" if zone else text


def day(time_ns: int) -> str:
    """A date in the local zone."""
    return f"{datetime.fromtimestamp(time_ns / 1e9, tz=UTC).astimezone():%Y-%m-%d}"


def counted(number: int, noun: str) -> str:
    """``1 request``, ``2,000 requests``."""
    return f"{number:,} {noun}" if number == 1 else f"{number:,} {noun}s"


def listed(names: list[str]) -> str:
    """``a``, ``a and b``, ``a, b and c``."""
    return " and ".join([", ".join(names[:-1]), names[-1]]) if len(names) > 1 else "".join(names)


def quantile(value: Quantile) -> str:
    """``p99 1.20 s``; the worst where too few requests are behind it for a percentile."""
    name = "worst" if value.quantile >= 1 else f"p{value.quantile * 100:.0f}"
    return f"{name} {duration(value.value_s)}"


def headline(diagnosis: Diagnosis) -> str:
    """The answer in one sentence."""
    incidents = diagnosis.incidents
    if not incidents:
        if diagnosis.verdict is Verdict.HEALTHY:
            return "nobody was stalled beyond the usual"
        return "too little was recorded to tell a stall from the usual"
    main = [incident for incident in incidents if incident.verdict is diagnosis.verdict]
    lost = sum(incident.lost_s for incident in main)
    victims = list(dict.fromkeys(victim.tenant for incident in main for victim in incident.victims))
    where = f"{counted(len(main), 'incident')}, {duration(lost)} lost"
    culprits = list(dict.fromkeys(culprit.tenant for incident in main for culprit in incident.culprits))
    who = listed(culprits)
    if diagnosis.verdict is Verdict.NOISY_NEIGHBOR:
        hit = [victim for victim in victims if victim not in culprits] or victims
        return f"{who} stalled {listed(hit)}: {where}"
    if diagnosis.verdict is Verdict.SELF_INFLICTED:
        return f"{who} stalled itself: {where}"
    if diagnosis.verdict is Verdict.ENGINE_STALL:
        return f"the engine itself stalled {listed(victims)}: {where}"
    if diagnosis.verdict is Verdict.OUTSIDE_ENGINE:
        return f"{listed(victims)} waited outside the engine, which had done its part: {where}"
    if diagnosis.verdict is Verdict.COLD_CACHE:
        return f"{listed(victims)} waited for prompts that the cache had lost: {where}"
    if diagnosis.verdict is Verdict.OVERLOAD:
        return f"{listed(victims)} waited, but no tenant in particular caused it: {where}"
    return f"{listed(victims)} waited, but too little was recorded to say why: {where}"


def evidence(diagnosis: Diagnosis) -> str:
    """How sure, and on what: the second line of every report."""
    c = diagnosis.coverage
    lost = "none lost" if not c.steps_lost else f"{c.steps_lost:,} lost"
    parts = [
        f"confidence {diagnosis.confidence} ({replays(diagnosis)})",
        f"fidelity {c.fidelity}",
        f"{counted(c.steps, 'step')} ({lost})",
        counted(c.requests, "request") + (f" ({c.requests_open} still open)" if c.requests_open else ""),
        f"{c.known_tenant_share:.0%} of known tenant",
        f"step cost explained to {c.cost_model_error:.0%}",
    ]
    if c.requests_lost:
        parts.insert(4, f"{c.requests_lost} lost from sight")
    if c.records_dropped:
        parts.append(f"{c.records_dropped:,} records dropped by the engine")
    return " · ".join(parts)


def replays(diagnosis: Diagnosis) -> str:
    """Whether the verdict rests on replays."""
    if not diagnosis.replays:
        return "no replay"
    check = min(diagnosis.replays, key=lambda one: one.trusted)
    if check.trusted:
        return f"replayed: {check.forced_agreement:.0%} of batches chosen alike"
    return f"charges only, no replay: {check.reason}"


def incident_line(incident: Incident) -> str:
    """When and where an incident was, and what it was."""
    length = duration((incident.end_ns - incident.start_ns) / 1e9)
    return (
        f"{clock(incident.start_ns)} to {clock(incident.end_ns, zone=True)} ({length}) on {incident.replica}: "
        f"{incident.verdict}"
    )
