"""KV occupancy: tenants add up to the blocks in use, peaks survive any width."""

from __future__ import annotations

import numpy as np
import pytest

from stallscope.views.occupancy import OTHERS, Occupancy, occupancy
from tests.views.recordings import replica


def whole(width: int, most_tenants: int = 8) -> Occupancy:
    r = replica()
    return occupancy(r, int(r.timeline.before[0]), int(r.timeline.end[-1]), width, most_tenants)


@pytest.mark.parametrize("most_tenants", [1, 8])
def test_tenants_add_up_to_the_blocks_in_use_at_each_moment(most_tenants: int) -> None:
    r, view = replica(), whole(100, most_tenants)
    used = r.steps["kv_used"].to_numpy(np.int64)[np.searchsorted(r.timeline.end, view.time_ns)]
    assert view.blocks.sum(axis=0) == pytest.approx(used)
    assert (view.blocks >= 0).all()


@pytest.mark.parametrize("width", [1, 7, 100])
def test_the_peak_is_shown_whatever_the_width(width: int) -> None:
    view = whole(width)
    assert view.blocks.sum(axis=0).max() == pytest.approx(replica().steps["kv_used"].max())
    assert len(view.time_ns) <= width
    assert (np.diff(view.time_ns) > 0).all()


def test_who_pins_the_cache_comes_first_and_the_rest_last() -> None:
    assert whole(50).tenants[0] == "archive"
    assert whole(50, most_tenants=1).tenants == ("archive", OTHERS)
    assert whole(50).total == int(replica().steps["kv_total"].max())


def test_the_most_that_waited_in_each_bin_is_kept() -> None:
    assert whole(10).waiting.max() == replica().steps["waiting"].max()


def test_a_window_without_steps_is_empty() -> None:
    view = occupancy(replica(), 0, 1, 10)
    assert (len(view.time_ns), view.tenants, view.blocks.shape) == (0, (), (0, 0))
