"""The requests hit hardest: each once, by its longest delay, with whom most of it is charged to."""

from __future__ import annotations

from stallscope.diagnosis.metrics import METRICS
from stallscope.diagnosis.partition import MECHANISMS
from stallscope.views.hardest_hit import hardest_hit
from stallscope.views.waterfall import holder_name
from tests.views.recordings import diagnosed, replica, waits


def test_each_request_comes_once_the_longest_delay_first() -> None:
    found = hardest_hit(replica(), waits(), diagnosed().incidents[0])
    assert len({one.request for one in found}) == len(found) > 20
    delays = [one.delay_s for one in found]
    assert delays == sorted(delays, reverse=True)
    victims = {victim.tenant for victim in diagnosed().incidents[0].victims}
    assert {one.tenant for one in found} <= victims


def test_a_hit_is_what_a_plain_loop_over_the_waits_finds() -> None:
    incident, r, table = diagnosed().incidents[0], replica(), waits().table
    names = [victim.tenant for victim in incident.victims]
    for hit in hardest_hit(r, waits(), incident)[:10]:
        mine = [
            (wait, row)
            for wait, row in table.iterrows()
            if row["stalled"]
            and r.requests["request"].iloc[row["request"]] == hit.request
            and r.tenants[row["tenant"]] in names
            and row["begin"] <= incident.end_ns
            and row["end"] >= incident.start_ns
        ]
        wait, row = max(mine, key=lambda one: one[1]["delay"])
        assert (hit.metric, hit.begin_ns) == (METRICS[row["metric"]], row["begin"])
        assert hit.waited_s == (row["end"] - row["begin"]) / 1e9
        held: dict[int, float] = {}
        for _, charge in waits().charges[waits().charges["query"] == wait].iterrows():
            if MECHANISMS[int(charge["mechanism"])] != "own_work":
                held[int(charge["holder"])] = held.get(int(charge["holder"]), 0.0) + charge["ns"]
        assert abs(hit.held_s - max(held.values()) / 1e9) < 1e-9
        assert hit.holder in {holder_name(r, holder) for holder, ns in held.items() if ns == max(held.values())}


def test_no_more_than_asked_for() -> None:
    assert len(hardest_hit(replica(), waits(), diagnosed().incidents[0], most=3)) == 3
