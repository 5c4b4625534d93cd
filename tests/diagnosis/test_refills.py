"""Prompts that the cache had lost: a cold start is nobody's fault, an evictor is named, and no time is made or lost."""

from __future__ import annotations

import numpy as np
import pytest

from stallscope.diagnosis import Diagnosis, Verdict, diagnose
from stallscope.diagnosis.incidents import measure_waits
from stallscope.diagnosis.metrics import TTFT
from stallscope.diagnosis.partition import MECHANISMS, Mechanism, Party
from stallscope.diagnosis.refills import Refills, read_refills
from stallscope.diagnosis.replica import Replica
from tests.diagnosis.replay.recorded import CHAT, only_replica, recorded

# The helpers' prompts begin with one of a few long texts, which the cache usually has.
HELPERS = """
name: helpers
duration_s: 40
engine: {max_num_seqs: 32, max_num_batched_tokens: 1024, ENGINE, prefix_caching: true}
tenants:
  chat: {arrivals: {poisson_per_s: RATE}, prompt_tokens: {uniform: [40, 200]}, output_tokens: {uniform: [10, 20]}}
  helpers:
    arrivals: {poisson_per_s: 2}
    prompt_tokens: {uniform: [4050, 4200]}
    shared_prefix_tokens: 4000
    shared_prefixes: 4
    output_tokens: {uniform: [5, 10]}
"""
CRAWLER = """
inject:
  - {tenant: crawler, from_s: 20, to_s: 30, poisson_per_s: 3, prompt_tokens: {uniform: [1500, 2000]}, output_tokens: 4}
"""
# Room for everything that is ever sent; and room for the texts, but not for what the crawler sends beside them.
COLD_START = HELPERS.replace("RATE", "2"), "kv_blocks: 4000"
PUSHED_OUT = HELPERS.replace("RATE", "4") + CRAWLER, "kv_blocks: 1500"


def refills_of(story: tuple[str, str]) -> tuple[Replica, Refills]:
    replica = only_replica(recorded(*story))
    refills = read_refills(replica)
    assert refills is not None
    return replica, refills


def cached(replica: Replica) -> np.ndarray:
    return replica.clients["cached_tokens"].to_numpy()


def diagnosed(story: tuple[str, str]) -> Diagnosis:
    return diagnose(recorded(*story))


def test_without_prefix_caching_there_is_nothing_to_refill() -> None:
    assert read_refills(only_replica(recorded(CHAT))) is None


def test_what_a_tenant_usually_finds_and_once_did_not_is_a_refill() -> None:
    replica, refills = refills_of(COLD_START)
    helpers = replica.tenant_of_request == replica.tenants.index("helpers")
    cold = helpers & (cached(replica) == 0)
    assert 1 <= cold.sum() <= 4  # one for each of the texts
    assert (refills.share[cold] > 0.9).all()
    assert (refills.share[~helpers] == 0).all()
    warm = helpers & (cached(replica) >= 4000)
    assert (refills.share[warm] == 0).all()


def test_a_cold_start_is_nobodys_fault() -> None:
    replica, refills = refills_of(COLD_START)
    assert replica.evictions.empty
    assert set(refills.causes["holder"]) == {int(Party.ENGINE)}
    diagnosis = diagnosed(COLD_START)
    assert diagnosis.verdict is Verdict.COLD_CACHE
    (incident,) = diagnosis.incidents
    assert (incident.culprits, incident.mechanism) == ((), "cache_eviction")
    assert {victim.tenant for victim in incident.victims} >= {"helpers"}
    assert incident.start_ns < diagnosis.start_ns + 10_000_000_000


def test_who_pushed_a_text_out_is_its_refills_cause() -> None:
    replica, refills = refills_of(PUSHED_OUT)
    crawler = replica.tenants.index("crawler")
    begin = int(replica.timeline.before[0])
    since = (replica.requests["arrival"].to_numpy() - begin) / 1e9
    causes = refills.causes.assign(since=since[refills.causes["request"]])
    during = causes[causes["since"].between(22, 31)]
    by_holder = during.groupby("holder")["part"].sum()
    assert by_holder.idxmax() == crawler
    assert by_holder[crawler] > 0.6 * by_holder.sum()
    assert crawler not in set(causes.loc[causes["since"] < 20, "holder"])


@pytest.mark.parametrize("story", [COLD_START, PUSHED_OUT])
def test_the_parts_of_a_refill_are_one(story: tuple[str, str]) -> None:
    replica, refills = refills_of(story)
    assert refills.causes.groupby("request")["part"].sum().to_numpy() == pytest.approx(1.0)
    assert set(refills.causes["request"]) == set(np.flatnonzero(refills.share > 0))
    everything = refills.causes_of(np.arange(len(replica.requests)))
    spared = (refills.share * refills.computed).sum() / refills.computed.sum()
    assert sum(everything.values()) == pytest.approx(spared)


def test_who_takes_its_own_blocks_had_its_room_taken_by_others() -> None:
    replica, refills = refills_of(PUSHED_OUT)
    causes = refills.causes.assign(own=replica.tenant_of_request[refills.causes["request"]])
    several = causes[causes.groupby("request")["holder"].transform("size") > 1]
    assert len(several)
    assert (several["holder"] != several["own"]).all()


@pytest.mark.parametrize("story", [COLD_START, PUSHED_OUT])
def test_the_charges_of_a_wait_still_sum_to_its_length(story: tuple[str, str]) -> None:
    waits = measure_waits(only_replica(recorded(*story)))
    total = waits.charges.groupby("query")["ns"].sum()
    table = waits.table.loc[total.index]
    assert (total == table["end"] - table["begin"]).all()
    assert (waits.charges["ns"] > 0).all()


def test_a_refill_is_a_delay_and_charged_to_who_made_it_necessary() -> None:
    replica, refills = refills_of(PUSHED_OUT)
    waits = measure_waits(replica)
    ttft = waits.table[(waits.table["metric"] == TTFT) & waits.table["charged"]]
    cold = ttft[refills.share[ttft["request"]] > 0.5]
    charges = waits.charges[waits.charges["query"].isin(cold.index)]
    evicted = charges[charges["mechanism"] == MECHANISMS.index(Mechanism.CACHE_EVICTION)]
    assert set(evicted["query"]) == set(cold.index)
    assert replica.tenants.index("crawler") in set(evicted["holder"])
    assert cold["delay"].median() > 3 * ttft.loc[ttft.index.difference(cold.index), "delay"].median()


def test_the_evictor_is_the_culprit() -> None:
    incident = diagnosed(PUSHED_OUT).incidents[0]
    assert incident.verdict is Verdict.NOISY_NEIGHBOR
    assert [culprit.tenant for culprit in incident.culprits] == ["crawler"]
    assert incident.mechanism == "cache_eviction"
