"""Portions: every wait of every stall is told by one of them, once."""

from __future__ import annotations

import numpy as np
import pandas as pd
from hypothesis import given
from hypothesis import strategies as st

from stallscope.diagnosis.incidents import Waits, Window
from stallscope.diagnosis.portion import AFTER_NS, BEFORE_NS, EVER, REACH_NS, WHOLE, Portion

S = 1_000_000_000
BORDER = 10_000 * S
BEFORE, AFTER = Portion(end=BORDER), Portion(start=BORDER)
times = st.integers(-600, 600).map(lambda seconds: BORDER + seconds * S)


def stalled(begins: list[int], longest: int = 2 * S) -> tuple[Window, Waits]:
    table = pd.DataFrame({"begin": begins, "end": [begin + longest for begin in begins]})
    return Window(min(begins), max(begins) + longest, table.index.to_numpy(np.int64)), Waits(table, pd.DataFrame())


@given(st.lists(times, min_size=1, max_size=20))
def test_each_wait_belongs_to_one_portion(begins: list[int]) -> None:
    window, waits = stalled(begins)
    own = [mine.waits.tolist() for each in (BEFORE, AFTER) if (mine := each.own(window, waits)) is not None]
    assert sorted(wait for some in own for wait in some) == list(range(len(begins)))


def test_what_began_before_the_border_and_is_soon_over_is_not_cut() -> None:
    window, waits = stalled([BORDER - 5 * S, BORDER - S, BORDER + S])
    assert BEFORE.own(window, waits) is window
    assert AFTER.own(window, waits) is None


def test_what_goes_on_for_longer_than_the_first_portion_sees_is_cut_at_the_border() -> None:
    window, waits = stalled([BORDER - 5 * S, BORDER + S, BORDER + AFTER_NS])
    first, rest = BEFORE.own(window, waits), AFTER.own(window, waits)
    assert first is not None
    assert rest is not None
    assert (first.waits.tolist(), rest.waits.tolist()) == ([0], [1, 2])
    assert first.start == window.start
    assert rest.end == window.end


def test_a_portion_sees_what_it_judges_as_a_whole() -> None:
    low, high = Portion(BORDER, 2 * BORDER).view
    assert low is not None
    assert high is not None
    assert (low, high) == (BORDER - BEFORE_NS, 2 * BORDER + AFTER_NS)
    assert high > 2 * BORDER + REACH_NS
    assert WHOLE.view == (None, None)
    assert WHOLE.holds(np.array([0, -EVER, EVER - 1])).all()
