"""What a trace can answer: how much of what happened its telemetry shows, and which questions that leaves open."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc

from stallscope.diagnosis.incidents import TAIL_REQUESTS
from stallscope.diagnosis.partial import FEWEST_REQUESTS
from stallscope.diagnosis.reliance import LEAST_KEPT
from stallscope.diagnosis.replica import BATCHES_SEEN, OTHER, replicas
from stallscope.trace import Trace
from stallscope.trace.reserved import UNKNOWN
from stallscope.views.words import listed

_NEARLY_ALL, _MOST = 0.99, 0.5
_MOST_SOURCES = 20
_FEW_UNKNOWN, _WELL_EXPLAINED, _EXPLAINED = 0.1, 0.15, 0.4
_NEEDED_FOR_REPLAY = ("policy", "max_num_seqs", "max_num_batched_tokens", "kv_total", "block_size")


class Answer(StrEnum):
    """Whether a trace can answer a question."""

    YES = "yes"
    PARTLY = "partly"
    NO = "no"


@dataclass(frozen=True)
class Question:
    """What somebody may want to know of a trace, whether it can say, why not, and what would have to be done.

    ``main``: the trace is of no use where it can't say this.
    """

    question: str
    answer: Answer
    why: str
    remedy: str
    main: bool = False


@dataclass(frozen=True)
class ReplicaCheckup:
    """One replica's telemetry: steps and records, the least that is known of any stretch (``fidelity``), and the share
    of its time in which every batch is known."""

    replica: str
    engine: str
    model: str
    length_s: float
    steps: int
    steps_lost: int
    records_dropped: int
    fidelity: int
    fidelity_at_best: int
    batches_known: float
    kept_share: float
    cost_model_error: float  # median relative error of the step cost model


@dataclass(frozen=True)
class TenantSource:
    """Where tenants' names came from: how many requests have theirs from there, and how many tenants that are."""

    source: str
    requests: int
    tenants: int


@dataclass(frozen=True)
class Checkup:
    """A trace's health. ``requests_lost`` went from sight, ``requests_open`` had not ended."""

    source: str
    replicas: tuple[ReplicaCheckup, ...]
    requests: int
    requests_open: int
    requests_lost: int
    tenants: int
    known_tenant_share: float
    tenant_sources: tuple[TenantSource, ...]
    questions: tuple[Question, ...]
    usable: bool  # all main questions have an answer, in part at least
    notes: tuple[str, ...]


def check_up(trace: Trace) -> Checkup:
    """What the trace shows, and what it can't answer."""
    requests = trace.requests.select(["tenant", "tenant_source", "state", "delivered", "session", "predecessor"])
    table = requests.to_pandas()
    tenant, state = table["tenant"].astype(str), table["state"].astype(str)
    found = tuple(_replicas(trace))
    questions = tuple(_questions(trace, table, found))
    return Checkup(
        source=trace.source,
        replicas=found,
        requests=len(table),
        requests_open=int((state == "open").sum()),
        requests_lost=int((state == "lost").sum()),
        tenants=int(tenant[tenant != UNKNOWN].nunique()),
        known_tenant_share=float((tenant != UNKNOWN).mean()) if len(table) else 0.0,
        tenant_sources=tuple(_sources(table)),
        questions=questions,
        usable=all(one.answer is not Answer.NO for one in questions if one.main),
        notes=tuple(finding.line for finding in trace.findings),
    )


def _sources(requests: pd.DataFrame) -> Iterator[TenantSource]:
    """The sources of tenants' names, the commonest first; beyond ``_MOST_SOURCES`` the others as one."""
    source = requests["tenant_source"].astype(object).fillna("not said")
    commonest = source.value_counts().index[:_MOST_SOURCES]
    source = source.where(source.isin(commonest), OTHER)
    known = requests["tenant"].astype(object).where(lambda tenant: tenant != UNKNOWN)
    of_source = known.groupby(source, sort=False).agg(["size", "nunique"]).sort_values("size", ascending=False)
    for name, count, tenants in of_source.itertuples():
        yield TenantSource(str(name), int(count), int(tenants))


def _replicas(trace: Trace) -> Iterator[ReplicaCheckup]:
    settings = trace.replicas.to_pandas().drop_duplicates("replica", keep="last").set_index("replica")
    coverage = trace.coverage.to_pandas()
    for replica in replicas(trace):
        mine = coverage[coverage["replica"].astype(str) == replica.name]
        length = (mine["end"] - mine["start"]).to_numpy(np.float64)
        known = length[(mine["fidelity"] == BATCHES_SEEN).to_numpy()].sum()
        said = settings.loc[replica.name]
        engine = [str(said[name]) for name in ("engine", "engine_version") if isinstance(said[name], str)]
        yield ReplicaCheckup(
            replica=replica.name,
            engine=" ".join(engine),
            model=str(said["model"]) if isinstance(said["model"], str) else "",
            length_s=float(length.sum()) / 1e9,
            steps=int(mine["steps_seen"].sum()),
            steps_lost=int(mine["steps_lost"].sum()),
            records_dropped=int(mine["spans_dropped"].sum()),
            fidelity=int(mine["fidelity"].min()) if len(mine) else 0,
            fidelity_at_best=replica.fidelity,
            kept_share=replica.kept_share,
            batches_known=float(known / length.sum()) if length.sum() else 0.0,
            cost_model_error=replica.ledger.model.error,
        )


# --- questions ----------------------------------------------------------------------------------------------------


def _questions(trace: Trace, requests: pd.DataFrame, found: tuple[ReplicaCheckup, ...]) -> Iterator[Question]:
    known = _batches_known(found)
    best = max((one.fidelity_at_best for one in found), default=BATCHES_SEEN)
    yield _who(requests, known, best, min((one.kept_share for one in found), default=1.0))
    yield _how_long(trace, requests)
    yield _usual(requests)
    yield _which_request(known, best)
    yield _why(trace, best)
    yield _explained(found)
    yield _what_if(trace, known)
    yield _evicted(trace)
    yield _followers(requests)
    yield _outside(trace, requests)
    yield _gpu(trace)


def _batches_known(found: tuple[ReplicaCheckup, ...]) -> float:
    """Share of all replicas' time in which every batch is known."""
    length = sum(one.length_s for one in found)
    return sum(one.batches_known * one.length_s for one in found) / length if length else 0.0


def _who(requests: pd.DataFrame, known: float, fidelity: int, kept: float) -> Question:
    question = "Which tenant stalled which?"
    tenant = requests["tenant"].astype(str)
    unknown = float((tenant == UNKNOWN).mean()) if len(requests) else 1.0
    nameless = f"{unknown:.0%} of the requests are of no known tenant"
    name_them = "give the gateway's log (--tenants), or let the engine know tenants: API keys, a header that it reads"
    if tenant[tenant != UNKNOWN].nunique() < 2 and unknown > 0:
        return Question(question, Answer.NO, nameless, name_them, True)
    if kept < LEAST_KEPT:
        why = f"spans were sampled: those of {kept:.0%} of the requests are there"
        return Question(question, Answer.NO, why, "keep every span, or turn on the engine hook", True)
    if fidelity < BATCHES_SEEN:
        return Question(question, Answer.PARTLY, _ESTIMATES[fidelity], _HOOK, True)
    if known < _MOST:
        return Question(question, Answer.NO, _few_batches(known), _KEEP_STEPS, True)
    if unknown > _FEW_UNKNOWN:
        return Question(question, Answer.PARTLY, nameless, name_them, True)
    if known < _NEARLY_ALL:
        return Question(question, Answer.PARTLY, _few_batches(known), _KEEP_STEPS, True)
    if tenant.nunique() < 2:
        why = "all requests are of one tenant: it can only have stalled itself"
        return Question(question, Answer.PARTLY, why, "record the endpoint, not one tenant of it", True)
    return Question(question, Answer.YES, "", "", True)


_ESTIMATES = {
    1: "only requests tell of batches: who was in them is an estimate",
    2: "steps tell no more than sums: who was in the batches is an estimate",
}
_HOOK = "turn on stallscope's hook in the engine"
_KEEP_STEPS = "give the exporter a longer queue, and keep every engine.step span (no sampling)"


def _few_batches(known: float) -> str:
    return f"who was in the batch is known for {known:.0%} of the time"


def _how_long(trace: Trace, requests: pd.DataFrame) -> Question:
    question = "How long did requests wait?"
    answered = pc.sum(pc.is_valid(trace.requests["first_token"])).as_py() or 0
    lost = float((requests["state"].astype(str) == "lost").mean()) if len(requests) else 0.0
    if not answered:
        return Question(question, Answer.NO, "no request has a first token", "record for longer", True)
    if lost > 0.01:
        why = f"{lost:.0%} of the requests went from sight"
        return Question(question, Answer.PARTLY, why, _KEEP_STEPS, True)
    return Question(question, Answer.YES, "", "", True)


def _usual(requests: pd.DataFrame) -> Question:
    question = "Is that worse than usual?"
    counts = requests["tenant"].astype(str).value_counts()
    if len(requests) < FEWEST_REQUESTS:
        why = f"{len(requests)} requests, at least {FEWEST_REQUESTS} are needed"
        return Question(question, Answer.NO, why, "record for longer")
    few = [str(name) for name, count in counts.items() if count < TAIL_REQUESTS // 10]
    if few:
        shown = [*few[:3], f"{len(few) - 3} more"] if len(few) > 3 else few
        why = f"fewer than {TAIL_REQUESTS // 10} requests of {listed(shown)}: only their worst is known, no percentile"
        return Question(question, Answer.PARTLY, why, "record for longer")
    return Question(question, Answer.YES, "", "")


def _which_request(known: float, fidelity: int) -> Question:
    question = "Which request did it?"
    if fidelity < BATCHES_SEEN:
        return Question(question, Answer.PARTLY, _ESTIMATES[fidelity], _HOOK)
    if known < _NEARLY_ALL:
        answer = Answer.PARTLY if known >= _MOST else Answer.NO
        return Question(question, answer, _few_batches(known), _KEEP_STEPS)
    return Question(question, Answer.YES, "", "")


def _why(trace: Trace, fidelity: int) -> Question:
    question = "What did waiting requests lack: tokens, KV blocks, slots?"
    if fidelity < BATCHES_SEEN:
        return Question(question, Answer.PARTLY, "the reasons are guessed from who was there", _HOOK)
    waits = pc.is_in(trace.residency["phase"].cast(pa.string()), value_set=pa.array(["waiting", "preempted"]))
    rows = trace.residency.filter(waits)
    said = pc.sum(pc.is_valid(rows["reason"])).as_py() or 0
    if rows.num_rows and said < _NEARLY_ALL * rows.num_rows:
        why = f"{said / rows.num_rows:.0%} of the waits give a reason"
        return Question(question, Answer.PARTLY if said else Answer.NO, why, "use an engine hook that records reasons")
    return Question(question, Answer.YES, "", "")


def _explained(found: tuple[ReplicaCheckup, ...]) -> Question:
    question = "What did each request cost the others?"
    error = max((one.cost_model_error for one in found), default=1.0)
    why = f"the step cost model is off by {error:.0%}"
    if error <= _WELL_EXPLAINED:
        return Question(question, Answer.YES, "", "")
    answer = Answer.PARTLY if error <= _EXPLAINED else Answer.NO
    return Question(question, answer, why, "record for longer, with batches of more kinds")


def _what_if(trace: Trace, known: float) -> Question:
    question = "What would have been without it (replay)?"
    lacking = [name for name in _NEEDED_FOR_REPLAY if trace.replicas[name].null_count == trace.replicas.num_rows]
    if lacking:
        why = f"the engine did not say its {listed(lacking)}"
        return Question(question, Answer.NO, why, "have the engine tell its configuration")
    if known < _NEARLY_ALL:
        return Question(question, Answer.NO, _few_batches(known), _KEEP_STEPS)
    return Question(question, Answer.YES, "", "")


def _evicted(trace: Trace) -> Question:
    question = "Whose cached prefixes were evicted, and by whom?"
    caches = pc.any(pc.fill_null(trace.replicas["prefix_caching"], True)).as_py()
    if caches and not trace.evictions.num_rows:
        why = "no eviction was recorded: there was none, or the engine does not tell"
        return Question(question, Answer.PARTLY, why, "use an engine hook that records evictions")
    return Question(question, Answer.YES, "", "")


def _followers(requests: pd.DataFrame) -> Question:
    question = "Which requests follow others: chats, agents, retries?"
    follows = requests["session"].notna() | requests["predecessor"].notna()
    if not follows.any():
        why = "no request names a session or a predecessor"
        return Question(question, Answer.NO, why, "send session ids with requests that follow others")
    return Question(question, Answer.YES, "", "")


def _outside(trace: Trace, requests: pd.DataFrame) -> Question:
    question = "Did clients wait for longer than the engine took?"
    if trace.clients.num_rows:
        return Question(question, Answer.YES, "", "")
    remedy = "record the clients too: stallscope load -o writes their view into the same folder"
    if requests["delivered"].notna().any():
        return Question(question, Answer.PARTLY, "known up to the delivery of the output, not beyond", remedy)
    return Question(question, Answer.NO, "nothing is known of delivery or of clients", remedy)


def _gpu(trace: Trace) -> Question:
    question = "Was the GPU throttled?"
    if not trace.gpu.num_rows:
        return Question(question, Answer.NO, "no GPU samples", "run the GPU sampler beside the engine")
    return Question(question, Answer.YES, "", "")
