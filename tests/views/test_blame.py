"""The blame matrix and balance: nothing is lost on the way from the charges, and the culprit's part is the largest."""

from __future__ import annotations

import pytest

from stallscope.diagnosis.partition import MECHANISMS, Mechanism
from stallscope.views.blame import Blame, blame, blame_balance
from stallscope.views.words import OTHERS
from tests.views.recordings import diagnosed, replica, waits


def incidents() -> list[tuple[int, int]]:
    return [(incident.start_ns, incident.end_ns) for incident in diagnosed().incidents]


def matrix(most: int = 12) -> Blame:
    return blame(replica(), waits(), incidents(), most)


def test_the_matrix_holds_all_that_stalled_waits_are_charged_but_their_own_work() -> None:
    table, charges = waits().table, waits().charges
    begins = table[table["stalled"]]["begin"]
    inside = begins[[any(start <= begin <= end for start, end in incidents()) for begin in begins]]
    counted = charges["query"].isin(inside.index) & (charges["mechanism"] != MECHANISMS.index(Mechanism.OWN_WORK))
    assert matrix().seconds.sum() == pytest.approx(charges[counted]["ns"].sum() / 1e9)


def test_the_culprit_has_the_largest_column_by_its_mechanism() -> None:
    found = matrix()
    assert found.victims[0] == "chat"
    assert found.holders[0] == diagnosed().incidents[0].culprits[0].tenant == "archive"
    assert found.mechanisms[0][0] == "kv_pinning"
    assert list(found.seconds.sum(axis=1)) == sorted(found.seconds.sum(axis=1), reverse=True)


def test_rows_and_columns_beyond_the_most_are_one_and_keep_the_sum() -> None:
    whole, small = matrix(), matrix(most=1)
    assert (small.victims, small.holders) == (("chat", OTHERS), ("archive", OTHERS))
    assert small.seconds.sum() == pytest.approx(whole.seconds.sum())
    assert small.seconds[0, 0] == pytest.approx(whole.seconds[0, 0])
    assert sum(small.stalled) == sum(whole.stalled)


def test_without_a_window_nobody_is_blamed() -> None:
    empty = blame(replica(), waits(), [])
    assert (empty.victims, empty.holders, empty.seconds.shape) == ((), (), (0, 0))


def test_what_is_given_and_received_is_the_plain_sum_of_what_tenants_are_charged_for_one_another() -> None:
    for windows in (None, incidents(), incidents()[:1]):
        given, received = dict[tuple[str, str], float](), dict[tuple[str, str], float]()
        for row in waits().charges.itertuples():
            wait = waits().table.loc[row.query]
            inside = windows is None or any(start <= wait["begin"] <= end for start, end in windows)
            if row.holder >= 0 and row.holder != wait["tenant"] and wait["stalled"] and inside:
                mechanism = str(MECHANISMS[row.mechanism])
                for side, code in ((given, row.holder), (received, int(wait["tenant"]))):
                    key = (replica().tenants[code], mechanism)
                    side[key] = side.get(key, 0.0) + row.ns / 1e9
        found = blame_balance(replica(), waits(), windows)
        for side, expected in ((found.given, given), (found.received, received)):
            cells = {
                (tenant, mechanism): float(side[i, j])
                for i, tenant in enumerate(found.tenants)
                for j, mechanism in enumerate(found.mechanisms)
                if side[i, j]
            }
            assert cells == pytest.approx({key: seconds for key, seconds in expected.items() if seconds})


def test_all_that_is_given_is_received_and_who_gave_most_comes_first() -> None:
    found = blame_balance(replica(), waits(), incidents())
    assert found.given.sum(axis=0) == pytest.approx(found.received.sum(axis=0))
    balance = (found.given - found.received).sum(axis=1).tolist()
    assert found.tenants[0] == "archive"
    assert balance == sorted(balance, reverse=True)
    assert found.mechanisms[0] == "kv_pinning"


def test_the_balance_holds_what_lies_off_the_diagonal_of_the_matrix() -> None:
    whole, found = matrix(), blame_balance(replica(), waits(), incidents())
    for tenant, given in zip(found.tenants, found.given.sum(axis=1), strict=True):
        column = whole.seconds[:, whole.holders.index(tenant)]
        others = [seconds for victim, seconds in zip(whole.victims, column, strict=True) if victim != tenant]
        assert given == pytest.approx(sum(others))


def test_without_a_window_nothing_is_given() -> None:
    empty = blame_balance(replica(), waits(), [])
    assert (empty.tenants, empty.mechanisms, empty.given.shape, empty.received.shape) == ((), (), (0, 0), (0, 0))
