"""Who waited for whom, from the charges of the waits that were stalled: a matrix of seconds, and each one's balance."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd

from stallscope.diagnosis.incidents import Waits
from stallscope.diagnosis.partition import MECHANISMS, Mechanism, Party
from stallscope.diagnosis.replica import Replica
from stallscope.diagnosis.timeline import Floats
from stallscope.views.waterfall import holder_name
from stallscope.views.words import OTHERS

_OWN_WORK = MECHANISMS.index(Mechanism.OWN_WORK)
_FIRST = int(min(Party))  # code of the first holder


@dataclass(frozen=True, eq=False)
class Blame:
    """``seconds[i, j]``: time that stalled waits of ``victims[i]`` are charged to ``holders[j]``, own work left out.

    ``mechanisms[i][j]`` is the one that makes up most of it ("" where there is nothing), ``stalled[i]`` the number of
    requests. Both are sorted by their sums; those beyond the most shown are one, "(others)", at the end.
    """

    victims: tuple[str, ...]
    holders: tuple[str, ...]
    stalled: tuple[int, ...]
    seconds: Floats
    mechanisms: tuple[tuple[str, ...], ...]


@dataclass(frozen=True, eq=False)
class Balance:
    """What tenants caused one another, in seconds of stalled waits: what a tenant caused itself is left out, and so are
    the engine and others that are no tenants. So what is given is what is received, of each mechanism too.

    ``given[i, j]``: time that others' waits are charged to ``tenants[i]`` by ``mechanisms[j]``; ``received[i, j]``:
    time that its own waits are charged to other tenants. Tenants are sorted by what they gave less what they received,
    mechanisms by their sums.
    """

    tenants: tuple[str, ...]
    mechanisms: tuple[str, ...]
    given: Floats
    received: Floats


def blame(replica: Replica, waits: Waits, windows: Sequence[tuple[int, int]], most: int = 12) -> Blame:
    """The matrix of the stalled waits that began within ``windows`` (ns), with at most ``most`` rows and columns."""
    stalled = _stalled(waits, windows)
    cube = _cube(replica, waits, stalled)
    cube, rows, more_rows = _largest(cube, 0, most)
    cube, columns, more_columns = _largest(cube, 1, most)
    hit = stalled.drop_duplicates("request")["tenant"].value_counts()
    victims = [replica.tenants[row] for row in rows]
    counts = [int(hit.get(row, 0)) for row in rows]
    holders = [holder_name(replica, column + _FIRST) for column in columns]
    if more_rows:
        victims.append(OTHERS)
        counts.append(int(hit.sum()) - sum(counts))
    if more_columns:
        holders.append(OTHERS)
    seconds: Floats = cube.sum(axis=2)
    names = np.where(seconds > 0, np.array(MECHANISMS, dtype=object)[cube.argmax(axis=2)], "")
    mechanisms = tuple(tuple(str(name) for name in row) for row in names)
    return Blame(tuple(victims), tuple(holders), tuple(counts), seconds, mechanisms)


def blame_balance(replica: Replica, waits: Waits, windows: Sequence[tuple[int, int]] | None = None) -> Balance:
    """The balance of the stalled waits that began within ``windows`` (ns), or of all."""
    cube = _cube(replica, waits, _stalled(waits, windows))[:, -_FIRST:]
    codes = np.arange(len(replica.tenants))
    cube[codes, codes] = 0.0
    given, received = cube.sum(axis=0), cube.sum(axis=1)
    took_part = np.flatnonzero((given + received).sum(axis=1) > 0)
    tenants = took_part[np.argsort((received - given).sum(axis=1)[took_part], kind="stable")]
    by_mechanism = given.sum(axis=0)
    mechanisms = np.argsort(-by_mechanism, kind="stable")[: np.count_nonzero(by_mechanism)]
    return Balance(
        tuple(replica.tenants[code] for code in tenants),
        tuple(str(MECHANISMS[code]) for code in mechanisms),
        given[np.ix_(tenants, mechanisms)],
        received[np.ix_(tenants, mechanisms)],
    )


def _stalled(waits: Waits, windows: Sequence[tuple[int, int]] | None) -> pd.DataFrame:
    """The rows of the table of waits that are stalled and began within the windows; None: whenever."""
    table = waits.table
    inside = np.full(len(table), windows is None)
    for start, end in windows or ():
        inside |= table["begin"].between(start, end).to_numpy()
    stalled: pd.DataFrame = table[inside & table["stalled"].to_numpy()]
    return stalled


def _cube(replica: Replica, waits: Waits, stalled: pd.DataFrame) -> Floats:
    """Seconds by victim (tenant), holder and mechanism that these waits are charged, own work left out.

    Holders as positions: parties first, then tenants, whose codes are their positions less ``-_FIRST``.
    """
    charges = waits.charges[waits.charges["mechanism"] != _OWN_WORK]
    charges = charges.merge(stalled[["tenant"]], left_on="query", right_index=True)
    cube: Floats = np.zeros((len(replica.tenants), len(replica.tenants) - _FIRST, len(MECHANISMS)))
    np.add.at(cube, (charges["tenant"], charges["holder"] - _FIRST, charges["mechanism"]), charges["ns"] / 1e9)
    return cube


def _largest(cube: Floats, axis: int, most: int) -> tuple[Floats, list[int], bool]:
    """The slices along ``axis`` that are not zero, the largest first; those beyond ``most`` summed into one more.

    Returns the cube, which slices were kept, and whether there is one more.
    """
    sums = cube.sum(axis=tuple(one for one in range(cube.ndim) if one != axis))
    order = [int(position) for position in np.argsort(-sums, kind="stable") if sums[position] > 0]
    kept, rest = order[:most], order[most:]
    parts = [cube.take(kept, axis=axis)]
    if rest:
        parts.append(cube.take(rest, axis=axis).sum(axis=axis, keepdims=True))
    return np.concatenate(parts, axis=axis), kept, bool(rest)
