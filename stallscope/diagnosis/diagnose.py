"""The whole analysis of a trace, from tables to a ``Diagnosis``; or of a portion of it, to what adds up to one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from stallscope.diagnosis.changes import find_changes
from stallscope.diagnosis.incidents import Waits, find_episodes, find_windows, measure_waits
from stallscope.diagnosis.levels import level_of
from stallscope.diagnosis.load import KV, STEP_TIME, Loads
from stallscope.diagnosis.metrics import METRICS, TTFT
from stallscope.diagnosis.model import Diagnosis, ReplayCheck
from stallscope.diagnosis.partial import CROWDED_NS, CROWDED_TIMES, Partial, Seen, TenantTotals, finish, merge
from stallscope.diagnosis.portion import WHOLE, Portion
from stallscope.diagnosis.replay.replayer import prepare_replay
from stallscope.diagnosis.replica import BATCHES_SEEN, Replica, replicas
from stallscope.diagnosis.sketch import Sketch
from stallscope.diagnosis.slo import Slo, check_tenants
from stallscope.diagnosis.stitch import Found
from stallscope.diagnosis.timeline import Ints, Mask
from stallscope.diagnosis.verdict import judge
from stallscope.trace import Trace
from stallscope.trace.reserved import UNKNOWN


@dataclass(frozen=True)
class Options:
    """``slos``: what counts as stalled, in place of the learned usual. ``replay``: judged by what would have been; then
    ``remedies`` may be tried too."""

    slos: Sequence[Slo] = ()
    replay: bool = True
    remedies: bool = False


def diagnose(
    trace: Trace,
    *,
    slos: Sequence[Slo] = (),
    replay: bool = True,
    remedies: bool = False,
    progress: Callable[[float], None] | None = None,
) -> Diagnosis:
    """Finds the incidents of a trace and judges each.

    The options are those of ``Options``. ``progress`` hears the share of the work that is done, in [0, 1]. Raises
    UsageError where an SLO is for a tenant that the trace doesn't have.
    """
    check_tenants(trace, slos)
    found = diagnose_portion(trace, WHOLE, Options(slos, replay, remedies), progress)
    return finish(merge(seen_in(trace, WHOLE), found), trace.source, notes_of(trace))


def notes_of(trace: Trace) -> list[str]:
    """What reading a trace left out, in words."""
    return [finding.line for finding in trace.findings]


def diagnose_portion(
    trace: Trace, portion: Portion, options: Options, progress: Callable[[float], None] | None = None
) -> Partial:
    """What a portion of a trace's time says, beside how much of it was seen; the trace may be cut to what it views.

    The sum of all portions' (``partial.merge``) is what ``partial.finish`` makes a diagnosis of.
    """
    total = Partial()
    all_of_them = max(len(pc.unique(trace.columns("steps", ["replica"])["replica"])), 1)
    for number, replica in enumerate(replicas(trace)):
        if not portion.holds(replica.timeline.start).any():
            continue
        incidents: list[Found] = []
        changes = find_changes(replica)
        waits = measure_waits(replica, options.slos, changes)
        episodes = find_episodes(waits)
        windows = find_windows(waits, episodes, replica, options.slos)
        replayer, checks = None, dict[str, ReplayCheck]()
        if options.replay and replica.fidelity >= BATCHES_SEEN and (windows or changes.found):
            replayer = prepare_replay(replica)
            checks[replica.name] = replayer.check
        for found, done in judge(
            replica, waits, changes, episodes, windows, replayer, remedies=options.remedies, portion=portion
        ):
            incidents += [found] if found is not None else []
            if progress is not None:
                progress((number + done) / all_of_them)
        told = Partial(incidents=tuple(incidents), checks=checks, seen=Seen(error=replica.ledger.model.error))
        total = merge(total, merge(told, _totals(replica, waits, portion)))
    return total


def seen_in(trace: Trace, portion: Portion) -> Partial:
    """When a portion's steps were, and how much of it the telemetry shows. The trace must not be cut within it.

    A stretch of telemetry counts in the portion in which it begins.
    """
    steps = trace.columns("steps", ["scheduled", "ready"])
    scheduled, ready = (steps[name].to_numpy() for name in ("scheduled", "ready"))
    mine = portion.holds(scheduled)
    stretches = trace.coverage.to_pandas()
    begun = stretches[portion.holds(stretches["start"].to_numpy(np.int64))]
    there = stretches[(stretches["start"] < portion.end) & (stretches["end"] >= portion.start)]
    requests = trace.columns("requests", ["arrival", "state", "tenant"])
    came = requests.filter(pa.array(portion.holds(requests["arrival"].to_numpy())))
    states = came["state"].cast(pa.string())
    named = pc.not_equal(pc.fill_null(came["tenant"].cast(pa.string()), UNKNOWN), UNKNOWN)
    seen = Seen(
        fidelity=int(there["fidelity"].min()) if len(there) else None,
        steps=int(begun["steps_seen"].sum()) if portion == WHOLE else int(mine.sum()),
        steps_lost=int(begun["steps_lost"].sum()),
        records_dropped=int(begun["spans_dropped"].sum()),
        requests=came.num_rows,
        requests_open=_count(pc.equal(states, "open")),
        requests_lost=_count(pc.equal(states, "lost")),
        requests_named=_count(named),
        kept_share=float(there["sampled_share"].min()) if len(there) else 1.0,
    )
    if not mine.any():
        return Partial(seen=seen)
    return Partial(int(scheduled[mine].min()), int(ready[mine].max()), seen=seen)


def _count(mask: pa.ChunkedArray) -> int:
    return int(pc.sum(mask).as_py() or 0)


def _totals(replica: Replica, waits: Waits, portion: Portion) -> Partial:
    """What the requests that came in the portion add up to, by tenant, and how long most of them waited."""
    requests = replica.requests
    mine = portion.holds(requests["arrival"].to_numpy(np.int64))
    tenant = replica.tenant_of_request
    start = max(int(replica.timeline.before[0]), portion.start)
    end = min(int(replica.timeline.end[-1]), portion.end)
    loads = Loads(replica, [])
    count = np.bincount(tenant[mine], minlength=len(replica.tenants))
    both = (requests["prompt_tokens"] + requests["output_tokens"]).to_numpy()
    tokens = np.bincount(tenant[mine], both[mine], len(replica.tenants))
    step_ns = loads.totals(STEP_TIME, start, end)
    kv = loads.totals(KV, start, end) * replica.ledger.most_kv_tokens
    longest = [_longest(waits, metric, len(requests)) for metric in range(len(METRICS))]
    waited = [mine & (each >= 0) for each in longest]
    tenants = {
        name: TenantTotals(
            {replica.sources[code]: int(count[code])},
            round(tokens[code]),
            round(step_ns[code]),
            round(kv[code]),
            tuple(Sketch.of(each[some & (tenant == code)]) for each, some in zip(longest, waited, strict=True)),
        )
        for code, name in enumerate(replica.tenants)
        if count[code] or step_ns[code] > 0
    }
    level = level_of(start, end, [each[some] for each, some in zip(longest, waited, strict=True)])
    return Partial(
        tenants=tenants, levels={replica.name: (level,)}, seen=Seen(requests_queued=_queued(waits, len(requests), mine))
    )


def _queued(waits: Waits, requests: int, mine: Mask) -> int:
    """How many of these requests waited far longer for their first token than their own work took, where nobody said
    how long is right."""
    table = waits.table[(waits.table["metric"] == TTFT) & ~waits.table["promised"]]
    delay = table["delay"].to_numpy()
    own = (table["end"] - table["begin"]).to_numpy() - delay
    queued = np.zeros(requests, dtype=np.bool_)
    queued[table["request"].to_numpy()] = (delay > CROWDED_NS) & (delay > CROWDED_TIMES * own)
    return int((queued & mine).sum())


def _longest(waits: Waits, metric: int, requests: int) -> Ints:
    """Each request's longest wait of a metric, ns; -1 where it has none."""
    table = waits.table
    rows = np.flatnonzero((table["metric"] == metric).to_numpy())
    longest = np.full(requests, -1, dtype=np.int64)
    length = (table["end"].to_numpy() - table["begin"].to_numpy())[rows]
    np.maximum.at(longest, table["request"].to_numpy()[rows], length)
    return longest
