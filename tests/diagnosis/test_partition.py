"""The partition of a request's time: exact, equal to a plain reference, and blind to names, order and the clock."""

from __future__ import annotations

import random
from collections import Counter
from itertools import pairwise

import numpy as np
import orjson
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from stallscope.diagnosis.partition import MECHANISMS, Mechanism, Party
from stallscope.diagnosis.replica import Replica
from stallscope.trace import Trace
from stallscope_engine.config import EngineConfig
from stallscope_engine.engine import Engine
from stallscope_telemetry import names
from stallscope_telemetry.records import FinishReason
from tests.diagnosis.reference import ENGINE, FRONTEND, OWN, TELEMETRY, Charges, Reference
from tests.diagnosis.runs import MS, Host, all_waits, each, only_replica, random_run, scripted_lines
from tests.trace.recording import START_NS, Arrival, Workload, read, run

seeds = st.integers(0, 2**32)
PARTIES = {Party.OWN: OWN, Party.ENGINE: ENGINE, Party.FRONTEND: FRONTEND, Party.UNSEEN: TELEMETRY}


def some_lines(seed: int, lost: float = 0.0) -> list[bytes]:
    """The spans of a random run, a share of them lost."""
    rng = random.Random(seed)
    lines = [one for one in random_run(seed).recording.lines() if rng.random() >= lost]
    assume(any(names.STEP_SPAN.encode() in one for one in lines))
    return lines


def charge(replica: Replica, queries: pd.DataFrame, group: np.ndarray | None = None) -> pd.Series:
    """ns by query, holder and mechanism; holders are tenants unless ``group`` says otherwise."""
    found = replica.partition.charge(queries, replica.tenant_of_request if group is None else group)
    return found.set_index(["query", "holder", "mechanism"])["ns"]


def by_name(replica: Replica, queries: pd.DataFrame) -> dict[int, Charges]:
    """Each query's charges by the names of holder and mechanism."""
    result: dict[int, Charges] = {int(query): {} for query in queries["query"]}
    for query, holder, mechanism, ns in charge(replica, queries).reset_index().to_numpy().tolist():
        name = replica.tenants[holder] if holder >= 0 else PARTIES[Party(holder)]
        result[query][name, str(MECHANISMS[mechanism])] = ns
    return result


def rounding(replica: Replica, queries: pd.DataFrame) -> dict[int, int]:
    """By how many ns a charge of each query may be off: one for each piece of the life, since each is rounded."""
    return dict(Counter(replica.partition.cut(queries)["query"].tolist()))


def charges_until(replica: Replica, request: str, column: str) -> Charges:
    row = replica.requests[replica.requests["request"] == request]
    query = pd.DataFrame({"query": [0], "request": row.index, "begin": row["arrival"], "end": row[column]})
    return by_name(replica, query.reset_index(drop=True))[0]


def ttft_of(replica: Replica, request: str) -> Charges:
    return charges_until(replica, request, "first_token")


def life_of(replica: Replica, request: str) -> Charges:
    return charges_until(replica, request, "seen_until")


def assert_same(one: Charges, other: Charges, tolerance: float) -> None:
    different = {
        key: (one.get(key, 0), other.get(key, 0))
        for key in {*one, *other}
        if abs(one.get(key, 0) - other.get(key, 0)) > tolerance
    }
    assert different == {}


# --- against the reference ----------------------------------------------------------------------------------------


@settings(max_examples=30)
@given(seeds, st.sampled_from([0.0, 0.1, 0.3]))
def test_every_charge_is_that_of_the_plain_reference(seed: int, lost: float) -> None:
    trace, heads = read(some_lines(seed, lost)), random_run(seed).heads
    replica = only_replica(trace)
    requests = replica.requests
    tenants = [replica.tenants[code] for code in replica.tenant_of_request]
    group = dict(zip(requests["request"], tenants, strict=True))
    reference = Reference(trace, "r0", replica.ledger.model.coefficients, group, heads)
    queries = all_waits(replica)
    pieces = rounding(replica, queries)
    charges = by_name(replica, queries)
    for row in each(queries):
        length = row.end - row.begin
        expected = reference.charge(str(requests.at[row.request, "request"]), row.begin, row.end)
        assert sum(expected.values()) == pytest.approx(length)
        assert_same(charges[row.query], expected, pieces.get(row.query, 0) + 1 + 1e-6 * length)


# --- invariants ---------------------------------------------------------------------------------------------------


@settings(max_examples=15)
@given(seeds, st.sampled_from([0.0, 0.1, 0.3]))
def test_parts_sum_to_the_latency_and_none_is_negative(seed: int, lost: float) -> None:
    replica = only_replica(read(some_lines(seed, lost)))
    queries = all_waits(replica)
    charges = charge(replica, queries)
    assert (charges > 0).all()
    sums = charges.groupby("query").sum().reindex(queries["query"], fill_value=0).to_numpy()
    assert sums.tolist() == (queries["end"] - queries["begin"]).tolist()


@settings(max_examples=8)
@given(seeds)
def test_charges_of_the_two_parts_of_a_wait_add_up_to_those_of_the_whole(seed: int) -> None:
    replica = only_replica(read(some_lines(seed)))
    queries = all_waits(replica)
    rng = random.Random(seed)
    cut = [rng.randint(begin, end) for begin, end in zip(queries["begin"], queries["end"], strict=True)]
    whole = by_name(replica, queries)
    parts = [by_name(replica, queries.assign(end=cut)), by_name(replica, queries.assign(begin=cut))]
    pieces = rounding(replica, queries)
    for query, charges in whole.items():
        summed = {key: sum(part[query].get(key, 0) for part in parts) for part in parts for key in part[query]}
        assert_same(charges, summed, pieces.get(query, 0) + 2)


@settings(max_examples=8)
@given(seeds)
def test_renaming_tenants_permutes_the_charges_and_nothing_else(seed: int) -> None:
    new_names = {"chat": "zulu", "batch": "alpha"}
    lines = some_lines(seed)
    before = only_replica(read(lines))
    renamed = [one.replace(b'"chat"', b'"zulu"').replace(b'"batch"', b'"alpha"') for one in lines]
    after = only_replica(read(renamed))
    assert after.ledger.model == before.ledger.model
    queries = all_waits(before)
    assert all_waits(after).equals(queries)
    pieces, charges = rounding(before, queries), by_name(after, queries)
    for query, old in by_name(before, queries).items():
        expected = {(new_names.get(holder, holder), mechanism): ns for (holder, mechanism), ns in old.items()}
        assert_same(charges[query], expected, pieces.get(query, 0))


@settings(max_examples=8)
@given(seeds)
def test_splitting_a_tenant_splits_its_charges(seed: int) -> None:
    replica = only_replica(read(some_lines(seed)))
    queries = all_waits(replica)
    whole = replica.tenant_of_request
    moves = np.array([random.Random(f"{seed}/{request}").random() < 0.5 for request in replica.requests["request"]])
    tenants = len(replica.tenants)
    halves = np.where((whole == 0) & moves, tenants, whole)
    split = charge(replica, queries, halves).reset_index()
    split["holder"] = split["holder"].replace(tenants, 0)
    merged = split.groupby(["query", "holder", "mechanism"])["ns"].sum()
    old, new = merged.align(charge(replica, queries), fill_value=0)
    allowed = pd.Series(rounding(replica, queries)).reindex(old.index.get_level_values("query"), fill_value=0)
    assert ((old - new).abs().to_numpy() <= 2 * allowed.to_numpy()).all()


@settings(max_examples=4)
@given(seeds)
def test_an_idle_tenant_changes_nothing(seed: int) -> None:
    replica = only_replica(read(some_lines(seed)))
    queries = all_waits(replica)
    beside_an_idle_one = replica.tenant_of_request + 1  # code 0 is nobody's
    shifted = charge(replica, queries, beside_an_idle_one).reset_index()
    shifted["holder"] -= shifted["holder"] >= 0
    assert shifted.set_index(["query", "holder", "mechanism"])["ns"].equals(charge(replica, queries))


def later(line: bytes, shift_ns: int) -> bytes:
    document = orjson.loads(line)
    for resource in document["resourceSpans"]:
        for span in resource["scopeSpans"][0]["spans"]:
            for key in ("startTimeUnixNano", "endTimeUnixNano"):
                span[key] = str(int(span[key]) + shift_ns)
    return orjson.dumps(document)


@settings(max_examples=6)
@given(seeds, st.integers(-(10**18), 10**18))
def test_neither_the_clock_nor_the_order_of_spans_matters(seed: int, shift_ns: int) -> None:
    lines = some_lines(seed, 0.05)
    before = only_replica(read(lines))
    queries = all_waits(before)
    charges = charge(before, queries)
    moved = only_replica(read([later(one, shift_ns) for one in lines]))
    shifted = queries.assign(begin=queries["begin"] + shift_ns, end=queries["end"] + shift_ns)
    assert all_waits(moved).equals(shifted)
    assert charge(moved, shifted).equals(charges)
    random.Random(seed).shuffle(lines)
    assert charge(only_replica(read(lines)), queries).equals(charges)


@settings(max_examples=12)
@given(seeds, st.sampled_from([0.05, 0.3]))
def test_time_in_which_steps_are_missing_is_unobserved(seed: int, lost: float) -> None:
    replica = only_replica(read(some_lines(seed, lost)))
    queries = all_waits(replica)
    seen = replica.steps[["step", "scheduled", "ready", "idle_ns"]].astype("int64").to_numpy().tolist()
    missing = [
        (ready, scheduled - idle)
        for (before, _, ready, _), (step, scheduled, _, idle) in pairwise(seen)
        if step > before + 1
    ]
    charges = by_name(replica, queries)
    for row in each(queries):
        unseen = sum(max(0, min(row.end, high) - max(row.begin, low)) for low, high in missing)
        assert charges[row.query].get((TELEMETRY, "unobserved"), 0) >= unseen


def test_a_step_whose_batch_is_not_known_is_unobserved_and_no_fault_of_the_engine() -> None:
    """After a lost step, a request that came before the next keyframe is not known to wait or to run."""
    lines = run(Workload(EngineConfig(), [Arrival(0, 8, 40, "a"), Arrival(5 * MS, 8, 4, "b")], 12, 10_000)).lines()
    replica = only_replica(read([one for index, one in enumerate(lines) if index != 2]))
    charges = life_of(replica, "req-1")
    assert charges[TELEMETRY, "unobserved"] > 0
    assert (ENGINE, "unexplained") not in charges
    assert not [key for key in charges if key[1] == "step_boundary"]


# --- worked by hand -----------------------------------------------------------------------------------------------


def scripted(
    requests: list[tuple[str, int, int, int]], host: Host | None = None, config: EngineConfig | None = None
) -> Replica:
    return only_replica(read(scripted_lines(requests, host, config)))


def test_a_request_that_arrives_during_a_huge_prefill_waits_for_its_owner() -> None:
    quiet = [("chat", 40 + 3 * number, 50 + number, 2) for number in range(20)]
    replica = scripted([*quiet, ("hog", 200, 1900, 1), ("chat", 201, 60, 2)])
    charges = ttft_of(replica, "21")
    # The step of 2.9 ms had gone on for 1 ms: of its 1.9 ms of prefill, 1.9 / 2.9 lie in the wait.
    assert charges["hog", "step_boundary"] == pytest.approx(1.9 * MS * 1.9 / 2.9, rel=0.02)
    assert charges[ENGINE, "step_fixed"] == pytest.approx(1.0 * MS * 1.9 / 2.9, rel=0.02)
    assert charges[OWN, "own_work"] == pytest.approx(1.06 * MS, rel=0.02)
    assert sum(charges.values()) == 2.96 * MS


def test_waiting_for_blocks_is_charged_to_those_who_hold_them() -> None:
    quiet = [("chat", 3 * number, 20 + number, 3 + number % 5) for number in range(20)]
    config = EngineConfig(kv_blocks=45, max_num_batched_tokens=1000)
    replica = scripted([*quiet, ("hog", 100, 600, 50), ("chat", 105, 200, 4)], config=config)
    charges = ttft_of(replica, "21")
    assert {holder for holder, mechanism in charges if mechanism == "kv_pinning"} == {"hog"}
    # The holder's decode is a tenth of what each step costs anyhow.
    assert charges["hog", "kv_pinning"] == pytest.approx(charges[ENGINE, "step_fixed"] / 10, rel=0.05)
    assert charges["hog", "kv_pinning"] > 4 * MS


def test_a_pause_before_the_dispatch_is_the_engines_host_gap() -> None:
    def pause(engine: Engine, moment: str) -> None:
        if moment == "before dispatch" and engine.steps == 10:
            engine.clock.wait_until(engine.clock.now_ns() + 500 * MS)

    replica = scripted([("chat", 0, 20, 30), ("chat", 3, 30, 4)], pause)
    assert life_of(replica, "0")[ENGINE, "host_gap"] == 500 * MS


def test_a_pause_that_holds_up_the_first_request_after_an_idle_time_is_no_idle_time() -> None:
    """The step says only how long the engine was idle; that this ended with the arrival must be put together."""

    def pause(engine: Engine, moment: str) -> None:
        if moment == "before step" and engine.clock.now_ns() >= START_NS + 900 * MS:
            engine.clock.wait_until(START_NS + 1200 * MS)

    replica = scripted([("chat", 0, 20, 2), ("chat", 900, 20, 2)], pause)
    assert replica.steps["idle_ns"].max() > 800 * MS
    charges = ttft_of(replica, "1")
    assert charges[ENGINE, "host_gap"] == 300 * MS
    assert (FRONTEND, "intake") not in charges


def test_an_abort_between_two_steps_leaves_the_time_since_the_last_one_to_the_engine() -> None:
    def abort(engine: Engine, moment: str) -> None:
        if moment == "after step" and engine.steps == 5:
            engine.clock.wait_until(engine.clock.now_ns() + 7 * MS)
            engine.abort(engine.scheduler.running[0], FinishReason.ABORT)

    replica = scripted([("chat", 0, 20, 30), ("chat", 0, 30, 30)], abort)
    charges = life_of(replica, "0")
    assert charges[ENGINE, "host_gap"] == 7 * MS
    assert (FRONTEND, "intake") not in charges


def test_without_a_known_head_what_is_due_to_the_head_is_unobserved() -> None:
    runs = (random_run(seed).recording for seed in range(100))
    trace = next(trace for one in runs if one.steps and "head" in reasons(trace := read(one.lines())))
    nobody = dict.fromkeys(("kv", "budget", "slots"), "encoder")
    column = [nobody.get(reason, reason) for reason in trace.residency.column("reason").to_pylist()]
    phase = ["waiting" if one == "preempted" else one for one in trace.residency.column("phase").to_pylist()]
    schema = trace.residency.schema
    table = trace.residency.set_column(schema.get_field_index("reason"), schema.field("reason"), coded(column))
    table = table.set_column(schema.get_field_index("phase"), schema.field("phase"), coded(phase))
    replica = only_replica(Trace({**trace.tables, "residency": table}, trace.source))
    queries = all_waits(replica)
    charges = by_name(replica, queries)
    assert not [key for parts in charges.values() for key in parts if key[1] == Mechanism.HEAD_OF_LINE]
    assert [key for parts in charges.values() for key in parts if key == (TELEMETRY, "unobserved")]
    assert [sum(charges[row.query].values()) for row in each(queries)] == [row.end - row.begin for row in each(queries)]


def reasons(trace: Trace) -> set[str]:
    return set(pc.unique(trace.residency.column("reason").cast(pa.string())).to_pylist())


def coded(values: list[str | None]) -> pa.Array:
    return pa.array(values, pa.string()).dictionary_encode()


# --- what was missed once -----------------------------------------------------------------------------------------


def test_times_stay_exact_where_some_request_has_no_first_token() -> None:
    """As floats, which a column with nulls becomes, times since the epoch are only good to 256 ns."""
    workload = Workload(EngineConfig(), [Arrival(0, 7, 3, "a"), Arrival(MS + 7, 9, 1000, "a")], 10, 20)
    trace = read(run(Workload(workload.config, [*workload.arrivals, Arrival(18 * MS, 9, 9, "b")], 10, 20)).lines())
    assert trace.requests.column("end").null_count > 0
    replica = only_replica(trace)
    for column in ("arrival", "first_token", "end"):
        assert replica.requests[column].tolist() == trace.requests.column(column).fill_null(-1).to_pylist()


def test_a_trace_without_any_request_has_no_charges() -> None:
    recording = run(Workload(EngineConfig(), [Arrival(0, 8, 30, "a")], 100, 10_000))
    replica = only_replica(read(recording.step_lines()[5:]))
    assert len(all_waits(replica)) == len(replica.requests) == 0
    assert charge(replica, all_waits(replica)).empty


def test_a_tenant_that_was_never_in_a_batch_costs_nobody_anything() -> None:
    arrivals = [Arrival(0, 40, 30, "a"), Arrival(0, 40, 30, "b"), Arrival(0, 40, 30, "late", abort_after=3)]
    replica = only_replica(read(run(Workload(EngineConfig(max_num_seqs=1), arrivals, 10, 10_000)).lines()))
    charges = by_name(replica, all_waits(replica))
    assert {holder for parts in charges.values() for holder, _ in parts} == {"a", OWN, ENGINE}
