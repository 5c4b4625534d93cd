"""The partition of a request's time once more, slow and plain: one step after the other, by the table of the design.

An independent check of ``stallscope.diagnosis.partition``, from which it takes only the names of the mechanisms.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from stallscope.diagnosis.partition import Mechanism
from stallscope.trace import Trace, batches

OWN, ENGINE, FRONTEND, TELEMETRY = "(own)", "(engine)", "(frontend)", "(telemetry)"
Charges = dict[tuple[str, str], float]  # ns by (holder, mechanism)

OWN_CONDITIONS = {
    "grammar": Mechanism.GRAMMAR_COMPILE,
    "remote_kv": Mechanism.KV_TRANSFER,
    "adapter": Mechanism.ADAPTER_SWAP,
    "encoder": Mechanism.ENCODER,
}
WAITING_FOR = {
    "budget": Mechanism.PREFILL_QUEUE,
    "quota": Mechanism.POLICY,
    "priority": Mechanism.POLICY,
    "kv": Mechanism.KV_PINNING,
    "slots": Mechanism.SLOT_EXHAUSTION,
}


@dataclass(frozen=True)
class Doing:
    """What one request does in one step."""

    request: str
    phase: str
    reason: str | None
    holder: str | None
    tokens: int
    context: int

    @property
    def computes(self) -> bool:
        return self.phase in ("prefill", "decode")

    @property
    def is_resident(self) -> bool:
        return self.phase in ("prefill", "decode", "paused")


@dataclass(frozen=True)
class Step:
    """A step: slice [start, end), the gap [gap_start, start) before it with its idle part, and who was there."""

    index: int
    gap_start: int
    idle_start: int
    idle_end: int
    start: int
    end: int
    follows: bool  # the step before it was seen
    there: Mapping[str, Doing]

    @property
    def is_known(self) -> bool:
        return bool(self.there)


class Reference:
    """Charges of one replica's requests, given the cost model's coefficients (ns), groups by request, and heads."""

    def __init__(
        self,
        trace: Trace,
        replica: str,
        coefficients: Sequence[float],
        group: Mapping[str, str],
        heads: Mapping[int, str],
    ) -> None:
        self.coefficients = coefficients
        self.group = group
        self.heads = heads
        there: dict[int, dict[str, Doing]] = defaultdict(dict)
        for row in batches(trace, replica).to_pylist():
            step = row.pop("step")
            there[step][row["request"]] = Doing(**row)
        arrivals = [row["arrival"] for row in trace.requests.to_pylist() if row["replica"] == replica]
        self.steps: list[Step] = []
        for row in trace.steps.to_pylist():
            if row["replica"] == replica:
                last = self.steps[-1] if self.steps else None
                self.steps.append(_step(row, last, arrivals, there[row["step"]]))

    def charge(self, request: str, begin: int, end: int) -> Charges:
        """Who pays for [begin, end) in the life of ``request``, ns."""
        charges: Charges = defaultdict(float)

        def add(holder: str, mechanism: Mechanism, ns: float) -> None:
            if ns > 0:
                charges[holder, str(mechanism)] += ns

        def overlap(low: int, high: int) -> int:
            return max(0, min(high, end) - max(low, begin))

        present = [position for position, step in enumerate(self.steps) if request in step.there]
        first, last = (present[0], present[-1]) if present else (len(self.steps), len(self.steps))
        add(TELEMETRY, Mechanism.UNOBSERVED, overlap(begin, self.steps[0].gap_start))
        add(TELEMETRY, Mechanism.UNOBSERVED, overlap(self.steps[-1].end, end))
        for position, step in enumerate(self.steps):
            is_missed = (first < position or position > last) and request not in step.there
            whole = step.end - step.start
            aborted_here = position == last + 1 and step.follows
            if is_missed and not aborted_here:
                add(TELEMETRY, Mechanism.UNOBSERVED, overlap(step.gap_start, step.start))
            else:
                idle = overlap(step.idle_start, step.idle_end)
                gap = overlap(step.gap_start, step.start) - idle
                add(FRONTEND, Mechanism.INTAKE, idle)
                if step.follows:
                    add(ENGINE, Mechanism.HOST_GAP, gap)
                else:
                    add(TELEMETRY, Mechanism.UNOBSERVED, gap)
            part = overlap(step.start, step.end)
            if not part:
                continue
            if is_missed or not step.is_known:
                add(TELEMETRY, Mechanism.UNOBSERVED, part)
                continue
            for (holder, mechanism), ns in self._slice(step, request).items():
                charges[holder, mechanism] += ns * part / whole
        return charges

    def _slice(self, step: Step, request: str) -> Charges:
        """Who pays for the whole slice of ``step``, from the point of view of ``request``."""
        charges: Charges = defaultdict(float)

        def add(holder: str, mechanism: Mechanism, ns: float) -> None:
            charges[holder, str(mechanism)] += ns

        duration = step.end - step.start
        marginal = {one.request: self._marginal(one) for one in step.there.values() if one.computes}
        fixed = self.coefficients[0]
        predicted = fixed + sum(marginal.values())
        if predicted > duration:
            fixed *= duration / predicted
            marginal = {name: ns * duration / predicted for name, ns in marginal.items()}
        unexplained = duration - fixed - sum(marginal.values())

        def add_marginal(prefills: Mechanism, decodes: Mechanism) -> None:
            for name, ns in marginal.items():
                if name != request:
                    add(self.group[name], prefills if step.there[name].phase == "prefill" else decodes, ns)

        me = step.there.get(request)
        if me is not None and me.phase == "waiting" and me.reason in OWN_CONDITIONS:
            add(OWN, OWN_CONDITIONS[me.reason], duration)
            return charges
        add(ENGINE, Mechanism.UNEXPLAINED, unexplained)
        if me is not None and me.computes:
            if me.phase == "prefill" and me.holder is not None:
                add(self.group[me.holder], Mechanism.RECOMPUTE, marginal[request] + fixed)
            else:
                add(OWN, Mechanism.OWN_WORK, marginal[request] + fixed)
            add_marginal(Mechanism.PREFILL_INTERFERENCE, Mechanism.DECODE_DRAG)
            return charges
        add(ENGINE, Mechanism.STEP_FIXED, fixed)
        if me is None:
            add_marginal(Mechanism.STEP_BOUNDARY, Mechanism.STEP_BOUNDARY)
        elif me.phase == "paused":
            add_marginal(Mechanism.PREFILL_PRIORITY, Mechanism.PREFILL_PRIORITY)
        elif me.phase == "preempted":
            holder = TELEMETRY if me.holder is None else self.group[me.holder]
            add(holder, Mechanism.PREEMPTION, sum(marginal.values()))
        elif me.reason == "head":
            add(self.group[self.heads[step.index]], Mechanism.HEAD_OF_LINE, sum(marginal.values()))
        else:
            assert me.reason is not None
            held = {one.request: _held(one, me.reason) for one in step.there.values()}
            for name, amount in held.items():
                share = amount / sum(held.values())
                add(self.group[name], WAITING_FOR[me.reason], share * sum(marginal.values()))
        return charges

    def _marginal(self, one: Doing) -> float:
        _, b1, b2, b3, b4 = self.coefficients
        if one.phase == "prefill":
            return b1 * one.tokens + b2 * one.tokens * (one.context + one.tokens / 2)
        return b3 + b4 * one.context


def _step(row: dict[str, int], last: Step | None, arrivals: Sequence[int], there: Mapping[str, Doing]) -> Step:
    gap_start = row["scheduled"] - row["idle_ns"] if last is None else last.end
    start = max(gap_start, row["dispatched"])
    follows = last is None or row["step"] == last.index + 1
    # Idle is time without any request: it was over when one arrived, whatever else held the host up before the step.
    woken = min((time for time in arrivals if follows and gap_start <= time), default=row["scheduled"])
    idle_end = min(max(woken, gap_start + row["idle_ns"]), row["scheduled"])
    return Step(
        row["step"], gap_start, max(gap_start, idle_end - row["idle_ns"]), idle_end, start, row["ready"], follows, there
    )


def _held(one: Doing, reason: str) -> int:
    """How much of what ``reason`` names a request holds in a step."""
    if reason in ("budget", "quota", "priority"):
        return one.tokens if one.computes else 0
    if not one.is_resident:
        return 0
    return one.context + one.tokens if reason == "kv" else 1
