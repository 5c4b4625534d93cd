"""What is different about some requests: each attribute, against the others of the same time and the usual ones."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from stallscope.diagnosis.incidents import Waits
from stallscope.diagnosis.model import Incident
from stallscope.diagnosis.replica import Replica
from stallscope.diagnosis.timeline import Floats, Intervals, Ints, Mask
from stallscope.views.words import OTHERS

NONE = "(none)"
CHANCE = 0.01  # probability that anything is shown where nothing is different
MOST_BINS, MOST_NAMES = 10, 8
_ARRIVAL = "arrival"
_NAMES, _INTS = ("model", "adapter", "session"), ("prefix", "priority", "cached_tokens")


@dataclass(frozen=True, eq=False)
class Numbers:
    """An attribute that is a number: shares of the ``chosen`` and of the ``others`` in bins.

    Bin j holds values up to ``upto[j]`` and above ``upto[j - 1]``: they are quantiles of both together. ``distance`` is
    that of Kolmogorov and Smirnov, the most by which the shares up to any value differ: there a bin ends, too.
    """

    attribute: str
    distance: float
    upto: Floats
    chosen: Floats
    others: Floats


@dataclass(frozen=True, eq=False)
class Names:
    """An attribute that is a name: shares of the ``chosen`` and of the ``others`` that have it.

    The ``names`` whose shares differ most come first, the rest is "(others)". ``distance`` is the total variation: half
    the sum of all differences.
    """

    attribute: str
    distance: float
    names: tuple[str, ...]
    chosen: Floats
    others: Floats


Difference = Numbers | Names


@dataclass(frozen=True, eq=False)
class Different:
    """How so many ``requests`` differ from the ``others`` of the same time and from their tenants' ``usual`` ones
    (numbers of requests).

    The attribute with the largest distance comes first. Attributes are "tenant", "model", "adapter", "session",
    "prefix", "prompt tokens", "output tokens" (as far as seen), "cached share" (of the prompt), "priority" and, among
    those of the same time, "arrival" (seconds after it began). Left out is what chance explains; requests that came
    together are often alike, so that what is left may still be no cause.
    """

    requests: int
    others: int
    usual: int
    from_others: tuple[Difference, ...]
    from_usual: tuple[Difference, ...]


def stalled_requests(waits: Waits, start_ns: int, end_ns: int) -> Ints:
    """Codes of the requests with a stalled wait that began between two times."""
    table = waits.table
    inside = table["begin"].between(start_ns, end_ns) & table["stalled"]
    return np.unique(table["request"].to_numpy()[inside])


def blamed_requests(replica: Replica, incident: Incident) -> Ints:
    """Codes of those requests of the culprits that an incident names: the ones that caused most."""
    named = [request.request for culprit in incident.culprits for request in culprit.requests]
    return np.flatnonzero(replica.requests["request"].isin(named))


def different(
    replica: Replica, chosen: Ints, start_ns: int, end_ns: int, windows: Sequence[tuple[int, int]]
) -> Different:
    """How the chosen requests (codes) differ from all others that were there between two times, and from those of their
    tenants that were not there in any of the ``windows`` (ns): the stretches that are not usual."""
    arrival, until = (replica.requests[name].to_numpy(np.int64) for name in ("arrival", "seen_until"))
    mine = np.zeros(len(arrival), dtype=np.bool_)
    mine[chosen] = True
    others = (arrival <= end_ns) & (until >= start_ns) & ~mine
    theirs = np.isin(np.arange(len(replica.tenants)), replica.tenant_of_request[mine])
    begin, end = np.array(windows, dtype=np.int64).reshape(-1, 2).T
    unusual = Intervals(begin, end + 1).merged().between(arrival, until + 1) > 0
    usual = theirs[replica.tenant_of_request] & ~unusual & ~mine
    attributes = list(_attributes(replica, start_ns))
    return Different(
        int(mine.sum()),
        int(others.sum()),
        int(usual.sum()),
        _differences(attributes, mine, others),
        _differences([one for one in attributes if one.name != _ARRIVAL], mine, usual),
    )


@dataclass(frozen=True, eq=False)
class _Attribute:
    """What requests (by code) have of it: numbers or, where these are ``called`` something, codes of names."""

    name: str
    values: Ints | Floats
    called: Callable[[int], str] | None = None


def _attributes(replica: Replica, start_ns: int) -> Iterator[_Attribute]:
    requests, rows = replica.requests, replica.read_requests((*_NAMES, *_INTS))
    yield _Attribute("tenant", replica.tenant_of_request, replica.tenants.__getitem__)
    for name in _NAMES:
        coded = rows[name].unify_dictionaries().combine_chunks()
        yield _Attribute(name, coded.indices.fill_null(-1).to_numpy(zero_copy_only=False), _names_of(coded.dictionary))
    prefix, priority, cached = (rows[name].fill_null(0).to_numpy() for name in _INTS)
    yield _Attribute("prefix", prefix, lambda code: str(code) if code else NONE)
    prompt = requests["prompt_tokens"].to_numpy()
    yield _Attribute("prompt tokens", prompt)
    yield _Attribute("output tokens", requests["output_tokens"].to_numpy())
    yield _Attribute("cached share", cached / np.maximum(prompt, 1))
    yield _Attribute("priority", priority)
    yield _Attribute(_ARRIVAL, (requests["arrival"].to_numpy() - start_ns) / 1e9)


def _names_of(dictionary: pa.Array) -> Callable[[int], str]:
    return lambda code: NONE if code < 0 else str(dictionary[code].as_py())


def _differences(attributes: Sequence[_Attribute], mine: Mask, others: Mask) -> tuple[Difference, ...]:
    """Those that chance does not explain, the largest distance first."""
    if not mine.any() or not others.any():
        return ()
    tallies = [(one, *_tally(one.values[mine], one.values[others])) for one in attributes]
    compared = [
        _numbers(one.name, values, counts) if one.called is None else _names(one.name, one.called, values, counts)
        for one, values, counts in tallies
        if len(values) > 1
    ]
    unlikely = [difference for difference, chance in compared if chance * len(compared) <= CHANCE]
    return tuple(sorted(unlikely, key=lambda difference: -difference.distance))


def _tally(mine: Ints | Floats, others: Ints | Floats) -> tuple[Ints | Floats, Ints]:
    """The values that occur, ascending, and how many of mine (row 0) and of the others (row 1) have each."""
    values, both = np.unique(np.concatenate([mine, others]), return_counts=True)
    occurring, count = np.unique(mine, return_counts=True)
    counts = np.zeros((2, len(values)), dtype=np.int64)
    counts[0, np.searchsorted(values, occurring)] = count
    counts[1] = both - counts[0]
    return values, counts


def _numbers(attribute: str, values: Ints | Floats, counts: Ints) -> tuple[Difference, float]:
    """The difference, and how likely chance makes one as large."""
    below = np.cumsum(counts.sum(axis=0))
    quantiles = np.searchsorted(below * MOST_BINS, np.arange(1, MOST_BINS + 1) * below[-1])
    last = np.union1d(quantiles, np.abs(np.cumsum(_apart(counts))).argmax())
    chosen, others = _shares(np.add.reduceat(counts, np.append(0, last[:-1] + 1), axis=1))
    distance, chance = distance_of_numbers(counts)
    return Numbers(attribute, distance, values[last].astype(np.float64), chosen, others), chance


def _names(
    attribute: str, called: Callable[[int], str], values: Ints | Floats, counts: Ints
) -> tuple[Difference, float]:
    """The same of names, which values are codes of."""
    shares = _shares(counts)
    order = np.argsort(-np.abs(shares[0] - shares[1]), kind="stable")
    shown, rest = order[:MOST_NAMES], order[MOST_NAMES:]
    names = [called(code) for code in values[shown].tolist()] + [OTHERS] * (len(rest) > 0)
    chosen, others = np.column_stack([shares[:, shown], shares[:, rest].sum(axis=1)])[:, : len(names)]
    distance, chance = distance_of_names(counts)
    return Names(attribute, distance, tuple(names), chosen, others), chance


def _shares(counts: Ints) -> Floats:
    shares: Floats = counts / counts.sum(axis=1, keepdims=True)
    return shares


# --- distances, and how likely chance makes them as large -----------------------------------------------------------


def distance_of_numbers(counts: Ints) -> tuple[float, float]:
    """Kolmogorov's and Smirnov's distance, and a bound on the probability that chance makes it as large.

    ``counts`` (2 x values, ascending): how many chosen and others have each value. Chance would draw either side from
    both together. To be so far apart at the x-th of the smaller side, at least x of it must then be among the first so
    many of all; these probabilities are added up. That holds for any sizes, and the more so where values are equal.
    """
    few, many = np.sort(counts.sum(axis=1))
    most = np.abs(np.cumsum(_apart(counts))).max()
    drawn = np.arange(1, few + 1)
    first = drawn + (many * drawn - most) // few
    apart = first >= drawn
    chance = 2 * float(at_least(drawn[apart], few, first[apart], few + many).sum())
    return float(most / (few * many)), chance


def distance_of_names(counts: Ints) -> tuple[float, float]:
    """The total variation, and a bound on the probability that chance makes any name's share differ as clearly.

    ``counts`` (2 x names): how many chosen and others have each name. The distance itself would not do: where nearly
    every request has a name of its own, it is large in any case.
    """
    with_name, sizes = counts.sum(axis=0), counts.sum(axis=1)
    chance = min(at_least(mine, size, with_name, sizes.sum()).min() for mine, size in zip(counts, sizes, strict=True))
    return float(np.abs(_apart(counts)).sum() / (2 * sizes.prod())), 2 * len(with_name) * float(chance)


def _apart(counts: Ints) -> Ints:
    """By how much the two sides' shares of each value differ, times the sizes of both: in whole numbers, 1 is 1."""
    mine, others = counts.sum(axis=1)
    differences: Ints = counts[0] * others - counts[1] * mine
    return differences


def at_least(found: Ints, drawn: int, marked: Ints, total: int) -> Floats:
    """A bound on the probability that of ``drawn`` out of ``total``, at least ``found`` are among the ``marked`` ones.

    It is hypergeometric, as in Fisher's exact test: each term is the one before it times a ratio that falls.
    """
    first = np.exp(_log_choose(marked, found) + _log_choose(total - marked, drawn - found) - _log_choose(total, drawn))
    ratio = (marked - found) * (drawn - found) / ((found + 1) * (total - marked - drawn + found + 1))
    tail: Floats = np.minimum(first / np.maximum(1 - ratio, 1e-300), 1.0)
    return tail


def _log_choose(total: Ints | int, chosen: Ints | int) -> Floats:
    from scipy.special import gammaln

    found: Floats = gammaln(total + 1.0) - gammaln(chosen + 1.0) - gammaln(total - chosen + 1.0)
    return found
