"""What makes the analysis fast changes no result: chunks, stored columns, samples, and running totals of own work."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from stallscope.diagnosis import incidents, ledger, partition
from stallscope.diagnosis.incidents import measure_waits
from stallscope.diagnosis.partition import MECHANISMS, Mechanism, Party
from stallscope.diagnosis.replica import Replica, replicas
from stallscope.trace import Trace, read_trace, write_parquet
from stallscope_engine.config import EngineConfig
from stallscope_telemetry import names
from tests.diagnosis.runs import MS, all_waits, only_replica, random_run, scripted_lines
from tests.trace.recording import read

seeds = st.integers(0, 2**32)
SMALL = 7


def random_trace(seed: int) -> Trace:
    lines = random_run(seed).recording.lines()
    assume(any(names.STEP_SPAN.encode() in one for one in lines))
    return read(lines)


def charges_of(replica: Replica, queries: pd.DataFrame) -> pd.DataFrame:
    return replica.partition.charge(queries, replica.tenant_of_request)


def crowded_lines() -> list[bytes]:
    """A crowd that a hog's prompts hold up twice."""
    config = EngineConfig(kv_blocks=20_000, max_num_batched_tokens=110_000, chunked_prefill=False)
    crowd = [(f"tenant-{code % 3}", 4 * code, 30 + code % 50, 5 + code % 9) for code in range(1000)]
    hog = [("hog", at, 100_000, 2) for at in (1500, 3100)]
    return scripted_lines(sorted([*crowd, *hog], key=lambda one: one[1]), config=config)


@settings(max_examples=5)
@given(seeds)
def test_the_size_of_chunks_changes_no_charge(seed: int) -> None:
    trace = random_trace(seed)
    whole = only_replica(trace)
    queries = all_waits(whole)
    with pytest.MonkeyPatch.context() as patch:
        for module, name in ((ledger, "CHUNK"), (partition, "CHUNK"), (partition, "BLOCK")):
            patch.setattr(module, name, SMALL)
        cut = only_replica(trace)
        charges = charges_of(cut, queries)
        own = cut.partition.own_work(queries)
    key = ["query", "holder", "mechanism"]
    old, new = (each.set_index(key)["ns"] for each in (charges_of(whole, queries), charges))
    old, new = old.align(new, fill_value=0)
    # Sums in another order: a piece may be rounded the other way.
    pieces = np.bincount(whole.partition.cut(queries)["query"], minlength=len(queries))
    assert ((old - new).abs().to_numpy() <= pieces[old.index.get_level_values("query")]).all()
    assert (np.abs(own - whole.partition.own_work(queries)) <= 1).all()


@settings(max_examples=10)
@given(seeds)
def test_own_work_is_what_the_charges_say_it_is(seed: int) -> None:
    replica = only_replica(random_trace(seed))
    queries = all_waits(replica)
    charges = charges_of(replica, queries)
    own = charges[(charges["holder"] == Party.OWN) & (charges["mechanism"] == MECHANISMS.index(Mechanism.OWN_WORK))]
    expected = own.set_index("query")["ns"].reindex(queries["query"], fill_value=0).to_numpy()
    pieces = np.bincount(replica.partition.cut(queries)["query"], minlength=len(queries))
    assert (np.abs(replica.partition.own_work(queries) - expected) <= pieces + 1).all()


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_a_stored_trace_is_analysed_like_the_one_it_was_made_from(tmp_path: Path, seed: int) -> None:
    # Two replicas whose requests have the same ids.
    runs = [random_run(seed + shift).recording.lines(replica) for shift, replica in ((0, "r0"), (10, "r1"))]
    trace = read([line for lines in runs for line in lines])
    write_parquet(trace, tmp_path / "stored")
    for made, stored in zip(replicas(trace), replicas(read_trace(tmp_path / "stored")), strict=True):
        # Of its states, a part has only those that occur in it.
        pd.testing.assert_frame_equal(made.requests, stored.requests, check_dtype=False, check_categorical=False)
        pd.testing.assert_frame_equal(made.gaps, stored.gaps, check_dtype=False)
        pd.testing.assert_frame_equal(made.steps, stored.steps, check_dtype=False)
        queries = all_waits(made)
        assert charges_of(stored, queries).equals(charges_of(made, queries))


def test_a_part_of_the_steps_teaches_the_same_cost_model(monkeypatch: pytest.MonkeyPatch) -> None:
    trace = read(crowded_lines())
    whole = only_replica(trace).ledger.model.coefficients
    monkeypatch.setattr(ledger, "FITTED_SPANS", 20)
    monkeypatch.setattr(ledger, "FITTED_SPAN", 5)
    sampled = only_replica(trace).ledger.model
    assert sampled.steps == 100
    # What a step and a decode cost; the rest is told apart only by more kinds of batches.
    assert sampled.coefficients[0] == pytest.approx(whole[0], rel=0.05)
    assert sampled.coefficients[3] == pytest.approx(whole[3], rel=0.05)


def test_all_stalled_waits_are_charged_and_of_the_others_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(incidents, "USUAL_WAITS", 20)
    replica = only_replica(read(crowded_lines()))
    waits = measure_waits(replica)
    table = waits.table
    assert table["stalled"].any()
    assert table.loc[table["stalled"], "charged"].all()
    assert set(waits.charges["query"]) == set(table.index[table["charged"]])
    usual = table[table["charged"] & ~table["stalled"] & (table["metric"] == incidents.TTFT)]
    assert (usual.groupby("tenant").size() >= 10).sum() >= 3
    assert table["charged"].sum() < len(table) / 2
    lengths = (table["end"] - table["begin"])[table["charged"]]
    assert waits.charges.groupby("query")["ns"].sum().tolist() == lengths[lengths > 0].tolist()


def test_waits_of_any_length_are_measured_in_the_order_of_time() -> None:
    """A request that waits for minutes while thousands come and go costs them nothing it did not."""
    requests = [("long", 0, 20, 900), *(("short", 2 * code, 20, 2) for code in range(300))]
    replica = only_replica(read(scripted_lines(requests)))
    queries = all_waits(replica)
    lengths = (queries["end"] - queries["begin"]).tolist()
    sums = charges_of(replica, queries).groupby("query")["ns"].sum().reindex(queries["query"], fill_value=0)
    assert max(lengths) > 900 * MS
    assert sums.tolist() == lengths
