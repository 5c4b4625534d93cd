"""Waits that only other engines have: under their own names everywhere, and no tenant's doing."""

from __future__ import annotations

from functools import cache
from io import StringIO

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
from rich.console import Console

from stallscope.diagnosis import Diagnosis, Verdict, diagnose
from stallscope.diagnosis.model import Confidence
from stallscope.diagnosis.partition import MECHANISMS, Mechanism, Party
from stallscope.reports.html import to_html
from stallscope.reports.text import print_diagnosis, print_waterfall
from stallscope.trace import Trace, rename
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


def slow_steps(engine: Engine, moment: str, step_ms: int = 150) -> None:
    """As if another rank computed a huge batch, for two seconds."""
    now_ns = engine.clock.now_ns()
    if moment == "in step" and START_NS + FROM_MS * MS <= now_ns < START_NS + (FROM_MS + 2000) * MS:
        engine.clock.wait_until(now_ns + step_ms * MS)


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
        assert not told or "may have waited" in incident.reasons[-1]
        assert told is False or incident.confidence is not Confidence.HIGH


LARGE = 150_000  # tokens: a step of 150 ms


@cache
def two_ranks(together: bool) -> Trace:
    """Rank 1 is flooded for two seconds; the steps of rank 0 end with its, or go on as if it were alone."""
    config = EngineConfig(max_num_seqs=64, kv_blocks=1_000_000, max_num_batched_tokens=2 * LARGE, chunked_prefill=False)
    flood = [("hog", FROM_MS + 150 * code, LARGE, 3) for code in range(13)]
    flooded = renamed(read(scripted_lines(sorted([*traffic(), *flood], key=lambda one: one[1]), None, config)), "r1")
    ready = flooded.steps["ready"].to_numpy()

    def lockstep(engine: Engine, moment: str) -> None:
        now_ns = engine.clock.now_ns()
        later = ready[np.searchsorted(ready, now_ns) :]
        if moment == "in step" and len(later) and together:
            engine.clock.wait_until(int(later[0]))
        elif not together:
            slow_steps(engine, moment, 97)

    own = renamed(read(scripted_lines(sorted(traffic(), key=lambda one: one[1]), lockstep, config)), "r0")
    both = {
        name: pa.concat_tables([own.tables[name], flooded.tables[name]]).unify_dictionaries() for name in own.tables
    }
    ranks = pa.array([0] * len(own.replicas) + [1] * len(flooded.replicas))
    sizes = pa.array([2] * len(both["replicas"]))
    return Trace({**both, "replicas": with_columns(both["replicas"], {"rank": ranks, "dp_size": sizes})}, "two ranks")


def renamed(trace: Trace, name: str) -> Trace:
    return rename.renamed(trace, {"replica": lambda _: name})


def test_a_rank_that_waited_for_another_says_for_which_and_the_other_names_who_filled_it() -> None:
    diagnosis = diagnose(two_ranks(together=True), replay=False)
    by_replica = {incident.replica: incident for incident in diagnosis.incidents}
    assert by_replica["r1"].culprits[0].tenant == "hog"
    assert (by_replica["r0"].verdict, by_replica["r0"].mechanism) == (Verdict.ENGINE_STALL, Mechanism.LOCKSTEP)
    assert by_replica["r0"].culprits == ()
    assert by_replica["r0"].confidence is not Confidence.HIGH
    assert "its steps ended with those of r1 (rank 1)" in by_replica["r0"].reasons[-1]


def test_a_rank_that_was_slow_by_itself_is_not_put_down_to_the_other() -> None:
    diagnosis = diagnose(two_ranks(together=False), replay=False)
    own = [incident for incident in diagnosis.incidents if incident.replica == "r0"]
    assert {incident.mechanism for incident in own} == {str(Mechanism.UNEXPLAINED)}
    assert not any("rank" in reason for incident in own for reason in incident.reasons)
