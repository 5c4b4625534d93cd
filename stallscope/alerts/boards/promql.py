"""PromQL of the boards: each series is filtered by the variables that its labels have, so that no panel forgets one."""

from __future__ import annotations

from collections.abc import Mapping

from stallscope.watch.families import LAG, Family, Kind

NOW = "1m"  # six scrapes: short enough to be now, long enough that a scrape may fail
WINDOW = "$__rate_interval"
RANGE = "$__range"
# Which variable chooses among the values of a label.
CHOSEN_BY: Mapping[str, str] = {"tenant": "tenant", "victim": "tenant", "culprit": "culprit", "replica": "replica"}


def series(family: Family, suffix: str = "", **equal: str) -> str:
    """A selector of a family's series, or of those with ``_bucket`` and the like; ``equal``: labels with one value."""
    matchers = [f'{label}="{value}"' for label, value in equal.items()]
    matchers += [f'{label}=~"${CHOSEN_BY[label]}"' for label in family.labels if label in CHOSEN_BY]
    return f"{family.name}{suffix}{{{', '.join(matchers)}}}" if matchers else f"{family.name}{suffix}"


def per_second(family: Family, by: str = "", window: str = WINDOW, **equal: str) -> str:
    """How fast a counter rises, summed by labels; all in one where none are named."""
    return f"{_sum(by)} (rate({series(family, **equal)}[{window}]))"


def risen(family: Family, by: str) -> str:
    """By how much a counter rose in the range shown, summed by labels; without those that did not."""
    return f"{_sum(by)} (increase({series(family)}[{RANGE}])) > 0"


def quantile(family: Family, by: str) -> str:
    """The percentile that the board's variable names, of a histogram, by labels."""
    if family.kind is not Kind.HISTOGRAM:
        raise ValueError(f"{family.name} is no histogram")
    rate = f"rate({series(family, '_bucket')}[{WINDOW}])"
    return f"histogram_quantile($percentile, sum by ({', '.join(['le', *by.split()])}) ({rate}))"


def or_nothing(expr: str) -> str:
    """Zero where no such series is there yet, but a watch is; without a watch no value, which is another thing."""
    return f"{expr} or 0 * max({series(LAG)})"


def most(number: int, expr: str) -> str:
    """The largest few, without those that are nothing."""
    return f"topk({number}, {expr} > 0)"


def _sum(by: str) -> str:
    return f"sum by ({', '.join(by.split())})" if by else "sum"
