"""Traces that are too small, too wide, cut or damaged: right, or an honest "insufficient data", never a wrong name."""

from __future__ import annotations

import random
from io import StringIO

import numpy as np
import orjson
import pyarrow as pa
import pyarrow.compute as pc
import pytest
from rich.console import Console

from stallscope.diagnosis import Diagnosis, Verdict, diagnose
from stallscope.diagnosis.replica import MOST_TENANTS, OTHER
from stallscope.reports.checkup import print_checkup
from stallscope.reports.html import to_html
from stallscope.reports.text import print_diagnosis
from stallscope.trace import Trace
from stallscope.trace.reserved import tenant_name
from stallscope.trace.schema import TABLES
from stallscope.trace.tables import Column, encode, plain_schema, plain_table, same
from stallscope.views.checkup import check_up
from stallscope_engine.config import EngineConfig
from stallscope_telemetry import names
from tests.diagnosis.runs import all_waits, only_replica, scripted_lines
from tests.trace.recording import read

CONFIG = EngineConfig(max_num_seqs=64, kv_blocks=100_000, max_num_batched_tokens=110_000, chunked_prefill=False)
HOG_AT_MS = 4000


def crowd(tenants: int, requests: int, every_ms: int = 4) -> list[tuple[str, int, int, int]]:
    """Usual traffic: each request of the next tenant, with its own length."""
    return [(f"t{code % tenants:05d}", every_ms * code, 30 + code % 50, 6 + code % 9) for code in range(requests)]


def burst(tenant: str = "hog", prompts: int = 8) -> list[tuple[str, int, int, int]]:
    return [(tenant, HOG_AT_MS + code, 100_000, 3) for code in range(prompts)]


def recorded(requests: list[tuple[str, int, int, int]]) -> list[bytes]:
    return scripted_lines(sorted(requests, key=lambda one: one[1]), config=CONFIG)


def culprits(diagnosis: Diagnosis) -> set[str]:
    return {culprit.tenant for incident in diagnosis.incidents for culprit in incident.culprits}


def named_right(diagnosis: Diagnosis, culprit: str) -> bool:
    return diagnosis.incidents[0].verdict is Verdict.NOISY_NEIGHBOR and culprits(diagnosis) == {culprit}


@pytest.fixture(scope="module")
def stalled() -> list[bytes]:
    return recorded([*crowd(5, 2500), *burst()])


def test_a_burst_is_named_where_nothing_is_wrong_with_the_trace(stalled: list[bytes]) -> None:
    assert named_right(diagnose(read(stalled)), "hog")


def test_among_ten_thousand_tenants_the_one_that_did_it_is_named() -> None:
    trace = read(recorded([*crowd(10_000, 10_000, every_ms=2), *burst()]))
    replica = only_replica(trace)
    assert len(replica.tenants) == MOST_TENANTS
    assert replica.tenants[0] == "hog"
    assert replica.tenants[-1] == OTHER
    assert named_right(diagnose(trace), "hog")


def test_ten_thousand_alike_tenants_are_no_incident() -> None:
    diagnosis = diagnose(read(recorded(crowd(10_000, 10_000, every_ms=2))))
    assert diagnosis.verdict is Verdict.HEALTHY


def with_visitors(trace: Trace, count: int) -> Trace:
    """The trace with so many more requests, each of a tenant of its own, named by a source of its own."""
    known = trace.requests.cast(plain_schema(TABLES["requests"]))
    first, last = pc.min(known["arrival"]).as_py(), pc.max(known["arrival"]).as_py()
    arrival = np.linspace(first, last, count).astype(np.int64)
    number = np.arange(count)
    columns: dict[str, Column] = {
        "replica": same("r0", count), "handle": number + 10_000_000, "state": same("finished", count),
        "request": pc.binary_join_element_wise("x", pa.array(number).cast(pa.string()), "-"),
        "tenant": pc.binary_join_element_wise("<script>alert(", pa.array(number).cast(pa.string()), ""),
        "tenant_source": pc.binary_join_element_wise("claim:<b>", pa.array(number).cast(pa.string()), ""),
        "arrival": arrival, "scheduled": arrival, "first_token": arrival + 1_000_000, "end": arrival + 5_000_000,
        "prompt_tokens": np.full(count, 3), "output_tokens": np.full(count, 2), "finish_reason": same("stop", count),
    }  # fmt: skip
    requests = pa.concat_tables([known, plain_table("requests", columns, count)]).sort_by("arrival")
    return Trace({**trace.tables, "requests": encode("requests", [requests])}, trace.source)


def test_a_crowd_of_tenants_costs_little_and_hides_nobody(stalled: list[bytes]) -> None:
    """What grows with their number is columns: a million take 10 s. Every list of them ends in the others."""
    trace = with_visitors(read(stalled), 200_000)
    checkup = check_up(trace)
    assert checkup.tenants == 200_006
    assert len(checkup.tenant_sources) == 21
    assert checkup.tenant_sources[0].tenants + checkup.tenant_sources[1].tenants >= 200_006 - 20
    diagnosis = diagnose(trace, replay=False)
    assert named_right(diagnosis, "hog")
    assert len(diagnosis.tenants) == MOST_TENANTS
    page = to_html(diagnosis, trace)
    assert len(page) < 12_000_000
    assert "<script>alert(" not in page
    with StringIO() as text:
        print_checkup(checkup, Console(file=text, width=200))
        print_diagnosis(diagnosis, Console(file=text, width=200))
        assert len(text.getvalue()) < 50_000


def test_a_tenant_alone_has_no_neighbour() -> None:
    requests = [("only", at, prompt, output) for _, at, prompt, output in [*crowd(1, 2500), *burst()]]
    diagnosis = diagnose(read(recorded(requests)))
    assert Verdict.NOISY_NEIGHBOR not in {incident.verdict for incident in diagnosis.incidents}
    assert {victim.tenant for incident in diagnosis.incidents for victim in incident.victims} == {"only"}


def test_one_request_is_too_little() -> None:
    diagnosis = diagnose(read(recorded([("only", 0, 50, 20)])))
    assert diagnosis.verdict is Verdict.INSUFFICIENT_DATA
    assert diagnosis.incidents == ()


@pytest.mark.parametrize(
    "kept", [slice(1500, None), slice(None, 2700), slice(1200, 2800)], ids=["begin", "end", "both"]
)
def test_a_trace_cut_in_the_middle_of_everything_names_nobody_else(stalled: list[bytes], kept: slice) -> None:
    steps = [line for line in stalled if names.STEP_SPAN.encode() in line]
    requests = [line for line in stalled if names.STEP_SPAN.encode() not in line]
    diagnosis = diagnose(read([*steps[kept], *requests]))
    assert culprits(diagnosis) <= {"hog"}
    assert diagnosis.coverage.steps == len(steps[kept])


@pytest.mark.parametrize("lost", [0.01, 0.1, 0.5])
def test_with_steps_missing_nobody_else_is_named(stalled: list[bytes], lost: float) -> None:
    rng = random.Random(7)
    lines = [line for line in stalled if names.STEP_SPAN.encode() not in line or rng.random() >= lost]
    diagnosis = diagnose(read(lines))
    assert culprits(diagnosis) <= {"hog"}
    assert diagnosis.coverage.steps_lost > 0


def test_rows_over_steps_that_are_gone_are_charged_to_the_nanosecond(stalled: list[bytes]) -> None:
    """Tables that were filtered by hand: residency still speaks of steps that are no longer there."""
    trace = read(stalled)
    tables = {**trace.tables, "steps": trace.steps.filter([step % 7 < 5 for step in range(trace.steps.num_rows)])}
    replica = only_replica(Trace(tables, trace.source))
    queries = all_waits(replica)
    charges = replica.partition.charge(queries, replica.tenant_of_request)
    sums = charges.groupby("query")["ns"].sum().reindex(queries["query"], fill_value=0)
    assert sums.tolist() == (queries["end"] - queries["begin"]).tolist()


def test_requests_of_which_no_batch_is_known_are_too_little() -> None:
    trace = read(recorded(crowd(2, 12)))
    diagnosis = diagnose(Trace({**trace.tables, "residency": trace.residency.slice(0, 0)}, trace.source))
    assert diagnosis.verdict is Verdict.INSUFFICIENT_DATA
    assert diagnosis.incidents == ()


def test_replicas_with_skewed_clocks_are_judged_each_by_its_own(stalled: list[bytes]) -> None:
    alone = diagnose(read(stalled))
    calm = recorded(crowd(5, 2500))
    skewed = [_as_replica(line, "r1", -3_600_000_000_000) for line in calm]
    both = diagnose(read([*stalled, *skewed]))
    assert both.incidents == alone.incidents
    assert {incident.replica for incident in both.incidents} == {"r0"}


def _as_replica(line: bytes, name: str, shift_ns: int) -> bytes:
    document = orjson.loads(line.replace(b'"r0"', f'"{name}"'.encode()))
    for resource in document["resourceSpans"]:
        for span in resource["scopeSpans"][0]["spans"]:
            for key in ("startTimeUnixNano", "endTimeUnixNano"):
                span[key] = str(int(span[key]) + shift_ns)
    return orjson.dumps(document)


@pytest.mark.parametrize("name", ["", "<b>&amp;</b>", "a\"b'c", "two\nlines", "#" * 3000, "(other)", "ключ"])
def test_a_tenant_may_be_called_anything(name: str) -> None:
    diagnosis = diagnose(read(recorded([*crowd(5, 2500), *burst(name)])))
    assert culprits(diagnosis) <= {tenant_name(name), "(unknown)"}
    assert diagnosis.incidents[0].verdict is Verdict.NOISY_NEIGHBOR
