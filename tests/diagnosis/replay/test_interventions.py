"""What a change restores: all where the culprit is as usual, next to nothing where a bystander is."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest

from stallscope.diagnosis.model import InterventionKind
from stallscope.diagnosis.replay.interventions import DRAWS, MEDIAN, Effect, IncidentReplays
from stallscope.diagnosis.replay.relaxations import relaxations
from tests.diagnosis.replay.recorded import CHAT, FLOOD, PINNED, SMALL_CACHE, only_incident

STORIES = [(CHAT + FLOOD, "max_num_seqs: 32, kv_blocks: 4096", "batch"), (PINNED, SMALL_CACHE, "archive")]


def codes(replays: IncidentReplays, *names: str) -> list[int]:
    return [replays.history.replica.tenants.index(name) for name in names]


@pytest.mark.parametrize(("text", "engine", "culprit"), STORIES)
def test_an_unchanged_replay_has_about_the_recorded_excess(text: str, engine: str, culprit: str) -> None:
    replays = only_incident(text, engine)
    assert replays.replayed_excess == pytest.approx(replays.recorded_excess, rel=0.25)


@pytest.mark.parametrize(("text", "engine", "culprit"), STORIES)
def test_the_culprits_return_to_usual_restores_all_and_a_bystanders_nothing(
    text: str, engine: str, culprit: str
) -> None:
    replays = only_incident(text, engine)
    assert min(replays.usual(codes(replays, culprit)).restored) > 0.95
    assert abs(replays.usual(codes(replays, "search")).mean) < 0.3


def without(replays: IncidentReplays, tenants: Sequence[int]) -> Effect:
    return replays.effect([replays.stretch.without(tenants, (), DRAWS[0])], DRAWS[:1], tenants)


def test_what_is_restored_is_of_the_others_not_of_who_was_changed() -> None:
    replays = only_incident(CHAT + FLOOD)
    chat, search = (replays.excess_of(codes(replays, name)) for name in ("chat", "search"))
    assert 0 < search < chat < replays.replayed_excess
    everybody = codes(replays, "chat", "search", "batch")
    assert replays.excess_of(everybody) == pytest.approx(replays.replayed_excess)
    # Where nobody is left to be restored, nothing is.
    assert without(replays, everybody).restored == (0.0,)


def test_without_its_requests_is_without_the_tenant() -> None:
    replays = only_incident(CHAT + FLOOD)
    (culprit,) = codes(replays, "batch")
    its = np.flatnonzero(replays.history.requests["tenant"] == culprit)
    assert replays.without_requests(its.tolist()).restored == without(replays, [culprit]).restored


def test_the_same_settings_restore_nothing() -> None:
    replays = only_incident(CHAT + FLOOD)
    effect = replays.configured(replays.history.config)
    assert effect.restored == (0.0,)
    harm = replays.harm(effect)
    assert harm is not None
    assert not harm.counts


@pytest.mark.parametrize(("text", "engine", "culprit"), STORIES)
def test_what_the_culprit_did_has_moved_a_percentile_of_the_others(text: str, engine: str, culprit: str) -> None:
    replays = only_incident(text, engine)
    tenants = codes(replays, culprit)
    harm = replays.harm(replays.usual(tenants), tenants)
    assert harm is not None
    assert harm.counts
    assert harm.tenant not in tenants
    assert harm.with_s > 3 * harm.without_s


@pytest.mark.parametrize(
    ("text", "engine", "culprit", "lacking"),
    [(*STORIES[0], "prompts cost nothing"), (*STORIES[1], "endless KV cache")],
)
def test_what_the_engine_was_short_of_restores_most(text: str, engine: str, culprit: str, lacking: str) -> None:
    replays = only_incident(text, engine)
    restored = {
        one.name: replays.relaxed(one, codes(replays, culprit)).mean for one in relaxations(replays.history.config)
    }
    assert max(restored, key=lambda name: restored[name]) == lacking
    assert restored[lacking] > 0.7
    assert abs(restored["endless slots"]) < 0.1


def test_a_replay_is_made_once_and_by_the_same_draw_again_the_same() -> None:
    replays = only_incident(CHAT + FLOOD)
    tenants = codes(replays, "batch")
    first, again = replays.usual(tenants), replays.usual(tenants)
    assert all(one is other for one, other in zip(first.outcomes, again.outcomes, strict=True))
    assert len(first.restored) == len(DRAWS)


def test_a_described_effect_has_the_percentiles_of_all_who_were_there() -> None:
    replays = only_incident(CHAT + FLOOD)
    tenants = codes(replays, "batch")
    shown = replays.describe(InterventionKind.USUAL, "batch as usual", tenants, replays.usual(tenants))
    assert (shown.kind, shown.what, shown.tenants) == (InterventionKind.USUAL, "batch as usual", ("batch",))
    assert shown.restored_low <= shown.restored <= shown.restored_high
    everything = [(tenant, metric) for tenant in ("batch", "chat", "search") for metric in ("itl", "ttft")]
    assert sorted((one.tenant, one.metric) for one in shown.predictions) == everything
    chat = next(one for one in shown.predictions if (one.tenant, one.metric) == ("chat", "ttft"))
    assert chat.replayed_s == pytest.approx(chat.recorded_s, rel=0.3)
    assert chat.low_s <= chat.predicted_s <= chat.high_s < 0.3 * chat.recorded_s
    # A newcomer's usual is nothing: none of its requests is left.
    gone = next(one for one in shown.predictions if (one.tenant, one.metric) == ("batch", "ttft"))
    assert (gone.predicted_s, gone.high_s) == (0.0, 0.0)
    assert shown.throughput == pytest.approx(1.0, abs=0.05)


def test_medians_are_described_where_they_are_wanted_beside_the_same_tails() -> None:
    replays = only_incident(CHAT + FLOOD)
    effect = replays.usual(codes(replays, "batch"))
    tails, both = (
        replays.describe(InterventionKind.USUAL, "batch as usual", (), effect, medians=medians).predictions
        for medians in (False, True)
    )
    assert tuple(one for one in both if one.quantile != MEDIAN) == tails
    medians = [one for one in both if one.quantile == MEDIAN]
    assert [(one.tenant, one.metric, one.requests) for one in medians] == [
        (one.tenant, one.metric, one.requests) for one in tails
    ]
    for median, tail in zip(medians, tails, strict=True):
        for name in ("recorded_s", "replayed_s", "predicted_s", "low_s", "high_s"):
            assert getattr(median, name) <= getattr(tail, name)
    assert sum(median.recorded_s < tail.recorded_s for median, tail in zip(medians, tails, strict=True)) > 3
