"""One request's life as rows of a waterfall: what it was doing in each stretch, and who is charged for it."""

from __future__ import annotations

import difflib
from dataclasses import dataclass

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc

from stallscope.diagnosis.incidents import NOTICEABLE_NS
from stallscope.diagnosis.lives import State
from stallscope.diagnosis.partition import MECHANISMS, Party
from stallscope.diagnosis.replica import BATCHES_SEEN, Replica, replica_of
from stallscope.diagnosis.timeline import Ints
from stallscope.errors import UsageError
from stallscope.trace import Trace
from stallscope.trace.gaps import GAP_FLOOR_STEPS

_MOST_COMPARED = 20_000  # ids, to name those that are nearest to one that is not there
OWN, ENGINE, FRONTEND, TELEMETRY = "(own)", "(engine)", "(frontend)", "(telemetry)"
NO_TENANTS = frozenset((ENGINE, FRONTEND, TELEMETRY))  # holders for whom nobody is to blame
_PARTIES = {Party.OWN: OWN, Party.ENGINE: ENGINE, Party.FRONTEND: FRONTEND, Party.UNSEEN: TELEMETRY}
_DOING = {
    State.BOUNDARY: "arrived during a step",
    State.BUDGET: "waiting for tokens",
    State.KV: "waiting for KV blocks",
    State.SLOTS: "waiting for a slot",
    State.HEAD: "waiting behind the head",
    State.POLICY: "held back by policy",
    State.GRAMMAR: "compiling a grammar",
    State.REMOTE_KV: "fetching KV blocks",
    State.ADAPTER: "loading an adapter",
    State.ENCODER: "encoding",
    State.RECOMPUTE: "recomputing",
    State.PAUSED: "paused",
    State.PREEMPTED: "preempted, waiting",
    State.UNSEEN: "not seen",
    State.BETWEEN: "between two steps",
}


@dataclass(frozen=True)
class Part:
    """Seconds charged to a holder (a tenant, or "(own)", "(engine)", ...) by a mechanism."""

    holder: str
    mechanism: str
    seconds: float


@dataclass(frozen=True)
class Row:
    """A stretch of the request's life: offset from its arrival and length in seconds; its parts sum to the length."""

    offset_s: float
    length_s: float
    doing: str
    stalled: bool  # a single inter-token gap far above the engine's usual step
    parts: tuple[Part, ...]


@dataclass(frozen=True)
class Waterfall:
    """A request and the rows of its life, in order; ``parts`` are summed over the rows, the largest first."""

    replica: str
    request: str
    tenant: str
    tenant_source: str
    state: str
    arrival_ns: int
    prompt_tokens: int
    output_tokens: int
    ttft_s: float | None  # none while it waits
    length_s: float
    rows: tuple[Row, ...]
    parts: tuple[Part, ...]
    estimated: bool  # nobody saw the batches


def waterfall(trace: Trace, request: str) -> Waterfall:
    """The life of ``request``. Raises UsageError where the trace has no such request, naming the nearest ids."""
    replica = replica_of(trace, find_request(trace, request))
    return waterfall_of(replica, code_of(replica, request))


def find_request(trace: Trace, request: str, likely: str = "") -> str:
    """The replica with steps that had this request, the ``likely`` one where several had.

    Raises UsageError where none had, naming the nearest ids.
    """
    names = trace.columns("requests", ["replica", "request"])
    found = names.filter(pc.equal(names["request"].cast(pa.string()), request))["replica"].cast(pa.string())
    running = pc.unique(trace.columns("steps", ["replica"])["replica"].cast(pa.string())).to_pylist()
    for replica in sorted(found.to_pylist(), key=lambda one: one != likely):
        if replica in running:
            return str(replica)
    known = names["request"].cast(pa.string()).drop_null()
    near = known.filter(pc.match_substring(known, request, ignore_case=True))[:3].to_pylist() if request else []
    if not near:
        alike = known.filter(pc.starts_with(known, request[: len(request) // 2]))[:_MOST_COMPARED].to_pylist()
        near = difflib.get_close_matches(request, alike, n=3, cutoff=0.5)
    hint = f"; did you mean {', '.join(near)}?" if near else "; copy an id from `stallscope analyze`"
    raise UsageError(f"{trace.source}: no request {request!r} among {len(known):,}{hint}")


def code_of(replica: Replica, request: str) -> int:
    """The code of a request that the replica had."""
    return int((replica.requests["request"] == request).to_numpy().argmax())


def waterfall_of(replica: Replica, code: int) -> Waterfall:
    """The life of the request with this code."""
    facts = replica.facts(code)
    queries = _stretches(replica, code, facts.arrival, facts.seen_until)
    charges = replica.partition.charge(queries, replica.tenant_of_request)
    columns = (queries[name].to_list() for name in ("query", "begin", "end", "doing", "stalled"))
    rows = tuple(
        Row(
            (begin - facts.arrival) / 1e9,
            (end - begin) / 1e9,
            doing,
            stalled,
            _parts(replica, charges[charges["query"] == query]),
        )
        for query, begin, end, doing, stalled in zip(*columns, strict=True)
    )
    return Waterfall(
        estimated=replica.fidelity < BATCHES_SEEN,
        replica=replica.name,
        request=facts.request,
        tenant=replica.tenants[facts.tenant],
        tenant_source=replica.sources[facts.tenant],
        state=facts.state,
        arrival_ns=facts.arrival,
        prompt_tokens=facts.prompt_tokens,
        output_tokens=facts.output_tokens,
        ttft_s=(facts.first_token - facts.arrival) / 1e9 if facts.first_token >= 0 else None,
        length_s=(facts.seen_until - facts.arrival) / 1e9,
        rows=rows,
        parts=_parts(replica, charges),
    )


def _stretches(replica: Replica, code: int, arrival: int, end: int) -> pd.DataFrame:
    """The life cut where its state changes and around each single gap: query, request, begin, end, doing, stalled."""
    whole = pd.DataFrame({"query": [0], "request": [code], "begin": [arrival], "end": [end]})
    pieces = replica.partition.cut(whole)
    doing = doing_in(replica, pieces["state"].to_numpy(np.int64), pieces["stretch"].to_numpy(np.int64))
    # A short gap that has its bin for itself is single, too; and hundreds of rows that nobody noticed hide the one.
    floor = max(GAP_FLOOR_STEPS * np.median(replica.steps["ready"] - replica.steps["scheduled"]), NOTICEABLE_NS)
    single = (replica.gaps["count"] == 1) & (replica.gaps["length_ns"] >= floor)
    gaps = replica.gaps[(replica.gaps["request"] == code) & single]
    starts = gaps["start"].to_numpy(np.int64)
    ends = starts + gaps["length_ns"].to_numpy(np.int64)
    # Chunks of one prefill follow each other as rows of the same kind: shown as one.
    kind = pd.Series(doing, dtype=object)
    changes = pieces["begin"].to_numpy(np.int64)[(kind != kind.shift()).to_numpy()]
    cuts = np.unique(np.concatenate([changes, starts, ends, [arrival, end]]))
    cuts = cuts[(cuts >= arrival) & (cuts <= end)]
    begin, finish = cuts[:-1], cuts[1:]
    at = np.searchsorted(pieces["begin"].to_numpy(np.int64), begin, side="right") - 1
    stalled = np.isin(begin, starts) & np.isin(finish, ends)
    return pd.DataFrame(
        {
            "query": np.arange(len(begin)),
            "request": code,
            "begin": begin,
            "end": finish,
            "doing": [doing[i] for i in at],
            "stalled": stalled,
        }
    )


def doing_of(replica: Replica, stretches: Ints) -> list[str]:
    """What the request of each of these stretches (rows of the ledger's) was doing in it."""
    states = np.append(replica.partition.lives.state.astype(np.int64), int(State.UNSEEN))
    return doing_in(replica, states[stretches], stretches)


def doing_in(replica: Replica, states: Ints, stretches: Ints) -> list[str]:
    """What a request was doing in each of these segments of lives (``Partition.cut``)."""
    prefill = np.append(replica.ledger.stretches.prefill, False)  # what lies outside all stretches has row -1
    return [
        _DOING.get(State(state), "prefill" if prefill[stretch] else "decoding")
        for state, stretch in zip(states.tolist(), stretches.tolist(), strict=True)
    ]


def holder_name(replica: Replica, holder: int) -> str:
    """A holder of charges (a tenant's code or a ``Party``) by its name."""
    return replica.tenants[holder] if holder >= 0 else _PARTIES[Party(holder)]


def _parts(replica: Replica, charges: pd.DataFrame) -> tuple[Part, ...]:
    total: pd.DataFrame = charges.groupby(["holder", "mechanism"])["ns"].sum().reset_index()
    total = total.sort_values("ns", ascending=False, kind="stable")
    return tuple(
        Part(holder_name(replica, holder), str(MECHANISMS[mechanism]), ns / 1e9)
        for holder, mechanism, ns in zip(*(total[name].to_list() for name in total.columns), strict=True)
    )
