"""Who waited for whom: a matrix of seconds, victims by holders, from the charges of the waits that were stalled."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from stallscope.diagnosis.incidents import Waits
from stallscope.diagnosis.partition import MECHANISMS, Mechanism, Party
from stallscope.diagnosis.replica import Replica
from stallscope.diagnosis.timeline import Floats
from stallscope.views.waterfall import holder_name

OTHERS = "(others)"
_OWN_WORK = MECHANISMS.index(Mechanism.OWN_WORK)


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


def blame(replica: Replica, waits: Waits, windows: Sequence[tuple[int, int]], most: int = 12) -> Blame:
    """The matrix of the stalled waits that began within ``windows`` (ns), with at most ``most`` rows and columns."""
    table = waits.table
    inside = np.zeros(len(table), dtype=bool)
    for start, end in windows:
        inside |= table["begin"].between(start, end).to_numpy()
    stalled = table[inside & table["stalled"].to_numpy()]
    charges = waits.charges[waits.charges["mechanism"] != _OWN_WORK]
    charges = charges.merge(stalled[["tenant"]], left_on="query", right_index=True)
    parties = np.array(sorted(Party), dtype=np.int64)
    first = int(parties[0])  # holders as positions: parties first, then tenants
    cube = np.zeros((len(replica.tenants), len(replica.tenants) - first, len(MECHANISMS)))
    np.add.at(cube, (charges["tenant"], charges["holder"] - first, charges["mechanism"]), charges["ns"] / 1e9)

    cube, rows, more_rows = _largest(cube, 0, most)
    cube, columns, more_columns = _largest(cube, 1, most)
    hit = stalled.drop_duplicates("request")["tenant"].value_counts()
    victims = [replica.tenants[row] for row in rows]
    counts = [int(hit.get(row, 0)) for row in rows]
    holders = [holder_name(replica, column + first) for column in columns]
    if more_rows:
        victims.append(OTHERS)
        counts.append(int(hit.sum()) - sum(counts))
    if more_columns:
        holders.append(OTHERS)
    seconds: Floats = cube.sum(axis=2)
    names = np.where(seconds > 0, np.array(MECHANISMS, dtype=object)[cube.argmax(axis=2)], "")
    mechanisms = tuple(tuple(str(name) for name in row) for row in names)
    return Blame(tuple(victims), tuple(holders), tuple(counts), seconds, mechanisms)


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
