"""The blame matrix: nothing is lost on the way from the charges, and the culprit's column is the largest."""

from __future__ import annotations

import pytest

from stallscope.diagnosis.partition import MECHANISMS, Mechanism
from stallscope.views.blame import OTHERS, Blame, blame
from tests.views.recordings import diagnosed, replica, waits


def matrix(most: int = 12) -> Blame:
    windows = [(incident.start_ns, incident.end_ns) for incident in diagnosed().incidents]
    return blame(replica(), waits(), windows, most)


def test_the_matrix_holds_all_that_stalled_waits_are_charged_but_their_own_work() -> None:
    table, charges = waits().table, waits().charges
    windows = [(incident.start_ns, incident.end_ns) for incident in diagnosed().incidents]
    begins = table[table["stalled"]]["begin"]
    inside = begins[[any(start <= begin <= end for start, end in windows) for begin in begins]]
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
