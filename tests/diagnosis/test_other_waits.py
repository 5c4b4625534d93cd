"""Waits that only other engines have: under their own names everywhere, and no tenant's doing."""

from __future__ import annotations

from functools import cache
from io import StringIO

import pandas as pd
import pyarrow as pa
import pytest
from rich.console import Console

from stallscope.diagnosis import Diagnosis, Verdict, diagnose
from stallscope.diagnosis.model import Confidence
from stallscope.diagnosis.partition import MECHANISMS, Mechanism, Party
from stallscope.reports.html import to_html
from stallscope.reports.text import print_diagnosis, print_waterfall
from stallscope.trace import Trace
from stallscope.trace.tables import with_columns
from stallscope.views.waterfall import waterfall
from stallscope.views.words import MECHANISM_WORDS
from stallscope_engine.config import EngineConfig
from stallscope_engine.engine import Engine
from stallscope_telemetry.records import WaitReason
from tests.diagnosis.runs import MS, held_between, only_replica, scripted_lines
from tests.trace.recording import START_NS, read

FROM_MS, UNTIL_MS = 15_000, 18_000
# What each is in charges, in a verdict, and in a request's life.
WAITS = {
    WaitReason.GRAMMAR: (Mechanism.GRAMMAR_COMPILE, Verdict.ENGINE_STALL, "compiling a grammar"),
    WaitReason.REMOTE_KV: (Mechanism.KV_TRANSFER, Verdict.OUTSIDE_ENGINE, "fetching KV blocks"),
    WaitReason.ADAPTER: (Mechanism.ADAPTER_SWAP, Verdict.ENGINE_STALL, "loading an adapter"),
    WaitReason.ENCODER: (Mechanism.ENCODER, Verdict.ENGINE_STALL, "encoding"),
}
CONFIG = EngineConfig(max_num_seqs=64, kv_blocks=100_000)


def traffic() -> list[tuple[str, int, int, int]]:
    """Two tenants as usual, and one whose decode never ends, so that there is always a step."""
    usual = [(("chat", "search")[code % 2], 100 * code, 30 + code % 40, 20 + code % 9) for code in range(300)]
    return [("resident", 0, 200, 28_000), *usual]


@cache
def recorded(reason: WaitReason, *more: tuple[str, int, int, int]) -> Trace:
    """For three seconds nobody gets into a batch."""
    requests = sorted([*traffic(), *more], key=lambda one: one[1])
    return read(scripted_lines(requests, held_between(FROM_MS, UNTIL_MS), CONFIG, reason))


def named(diagnosis: Diagnosis) -> set[str]:
    return {culprit.tenant for incident in diagnosis.incidents for culprit in incident.culprits}


@pytest.mark.parametrize("reason", WAITS)
@pytest.mark.parametrize("replay", [False, True])
def test_an_incident_of_such_waits_names_what_was_waited_for_and_nobody(reason: WaitReason, replay: bool) -> None:
    mechanism, verdict, _ = WAITS[reason]
    diagnosis = diagnose(recorded(reason), replay=replay)
    (incident,) = diagnosis.incidents
    assert (incident.verdict, incident.mechanism, incident.culprits) == (verdict, mechanism, ())
    assert {victim.tenant for victim in incident.victims} == {"chat", "search"}
    first = incident.charges[0]
    assert (first.holder, first.mechanism) == ("(own)", mechanism)
    assert first.share > 0.9


@pytest.mark.parametrize("reason", WAITS)
def test_who_came_just_then_is_not_to_blame(reason: WaitReason) -> None:
    newcomers = [("newcomer", FROM_MS + 40 * code, 400, 30) for code in range(60)]
    assert named(diagnose(recorded(reason, *newcomers))) == set()
    assert named(diagnose(recorded(reason, *newcomers), replay=False)) == set()


def test_who_did_stall_others_is_named_all_the_same() -> None:
    hog = [("hog", 24_000 + 20 * code, 60_000, 3) for code in range(8)]
    config = EngineConfig(max_num_seqs=64, kv_blocks=100_000, max_num_batched_tokens=70_000, chunked_prefill=False)
    requests = sorted([*traffic(), *hog], key=lambda one: one[1])
    trace = read(scripted_lines(requests, held_between(FROM_MS, UNTIL_MS), config, WaitReason.REMOTE_KV))
    diagnosis = diagnose(trace, replay=False)
    assert named(diagnosis) == {"hog"}
    assert {incident.mechanism for incident in diagnosis.incidents} >= {str(Mechanism.KV_TRANSFER)}


@pytest.mark.parametrize("reason", WAITS)
def test_every_face_shows_them_under_their_own_names(reason: WaitReason) -> None:
    mechanism, verdict, doing = WAITS[reason]
    trace = recorded(reason)
    diagnosis = diagnose(trace, replay=False)
    life = waterfall(trace, diagnosis.incidents[0].victims[0].worst_request)
    assert any(doing in row.doing for row in life.rows)
    with StringIO() as file:
        console = Console(file=file, width=300)
        print_diagnosis(diagnosis, console)
        print_waterfall(life, console)
        text = file.getvalue()
    page = to_html(diagnosis, trace)
    for face in (text, page):
        assert str(verdict) in face or str(verdict).replace("_", " ") in face
        assert str(mechanism) in face
        assert doing in face
    assert str(mechanism) in MECHANISM_WORDS


@pytest.mark.parametrize("reason", WAITS)
def test_nobody_pays_for_such_a_wait_but_the_request_itself(reason: WaitReason) -> None:
    replica = only_replica(recorded(reason))
    arrival = replica.requests["arrival"]
    inside = arrival[(arrival >= START_NS + FROM_MS * MS) & (arrival < START_NS + (UNTIL_MS - 1000) * MS)]
    waits = pd.DataFrame(
        {"query": inside.index, "request": inside.index, "begin": inside + 50 * MS, "end": START_NS + UNTIL_MS * MS}
    )
    charges = replica.partition.charge(waits.astype("int64"), replica.tenant_of_request)
    assert len(waits) == 20
    assert set(charges["holder"]) <= {int(Party.OWN), int(Party.ENGINE)}
    own = charges["mechanism"] == MECHANISMS.index(WAITS[reason][0])
    assert set(charges.loc[own, "holder"]) == {int(Party.OWN)}
    assert charges.loc[own, "ns"].sum() > 0.99 * (waits["end"] - waits["begin"]).sum()


# --- ranks that step together -------------------------------------------------------------------------------------


def slow_steps(engine: Engine, moment: str) -> None:
    """As if another rank computed a huge batch, for two seconds."""
    now_ns = engine.clock.now_ns()
    if moment == "in step" and START_NS + FROM_MS * MS <= now_ns < START_NS + (FROM_MS + 2000) * MS:
        engine.clock.wait_until(now_ns + 150 * MS)


@pytest.mark.parametrize(("ranks", "told"), [(1, False), (4, True)])
def test_a_data_parallel_rank_may_have_waited_for_another(ranks: int, told: bool) -> None:
    trace = read(scripted_lines(sorted(traffic(), key=lambda one: one[1]), slow_steps, CONFIG))
    replicas = with_columns(trace.replicas, {"dp_size": pa.array([ranks] * len(trace.replicas))})
    diagnosis = diagnose(Trace({**trace.tables, "replicas": replicas}, trace.source))
    assert diagnosis.verdict is Verdict.ENGINE_STALL
    assert named(diagnosis) == set()
    for incident in diagnosis.incidents:
        assert incident.mechanism == Mechanism.UNEXPLAINED
        assert (f"one of {ranks} data-parallel ranks" in incident.reasons[-1]) == told
        assert told is False or incident.confidence is not Confidence.HIGH
