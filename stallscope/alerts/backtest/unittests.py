"""Writes samples and expectations as promtool's unit tests (Prometheus' documentation, "Unit testing for rules").

The file is JSON-quoted YAML, so that any name survives; what a name holds that cannot be printed is escaped as PromQL
has it.
"""

from __future__ import annotations

import json
import math
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from stallscope.alerts.backtest.timeline import Grid, Timeline
from stallscope.errors import InconclusiveError
from stallscope.watch.samples import Labels, Samples, Series

MOST_SAMPLES = 10_000_000  # of one timeline; each takes 0.25 kB and, in both runs, 17 µs (docs/backtest.md)
# Prometheus' convention for values that are times; promtool's clock starts at 1970, and so must they.
TIMESTAMPS = "_timestamp_seconds"


@dataclass(frozen=True)
class Expectation:
    """What an expression gives at a time: labels (``__name__`` among them) and values."""

    expression: str
    elapsed_ms: int
    samples: Sequence[tuple[Labels, float]] = ()


def document(rule_files: Sequence[str], evaluation_ms: int, tests: Iterable[str]) -> Iterator[str]:
    """The lines of a file of unit tests, each of ``tests`` made by ``unit_test``."""
    yield f"rule_files: {json.dumps(rule_files, ensure_ascii=False)}"
    yield f"evaluation_interval: {_duration(evaluation_ms)}"
    yield "tests:"
    yield from tests


def unit_test(
    timeline: Timeline, grid: Grid, chosen: Collection[Series], expected: Iterable[Expectation]
) -> Iterator[str]:
    """The lines of one test: a timeline's ``chosen`` series, and what is expected of them.

    Raises InconclusiveError where there are more samples than promtool can be given.
    """
    samples = timeline.samples
    count = len(chosen) * (int(grid.slots[-1]) + 1)
    if count > MOST_SAMPLES:
        raise InconclusiveError(
            f"{timeline.name}: {count:,} samples of {len(chosen):,} series, more than the {MOST_SAMPLES:,} "
            "that promtool is given at once; give a shorter trace (stallscope convert --since), or fewer rules"
        )
    step_ms = math.gcd(grid.scrape_ms, grid.phase_ms)
    yield f"- name: {json.dumps(quoted(timeline.name)[1:-1], ensure_ascii=False)}"
    yield f"  interval: {_duration(step_ms)}"
    yield "  input_series:" if chosen else "  input_series: []"
    for name, labels in sorted(chosen):
        values = samples.values[name, labels]
        shifted = values - grid.start_ns / 1e9 if name.endswith(TIMESTAMPS) else values
        series = json.dumps(name + selector(dict(labels)), ensure_ascii=False)
        yield f"  - series: {series}"
        yield f'    values: "{_values(shifted, grid, step_ms)}"'
    yield "  promql_expr_test:"
    for one in expected:
        yield f"  - expr: {json.dumps(one.expression, ensure_ascii=False)}"
        yield f"    eval_time: {_duration(one.elapsed_ms)}"
        yield "    exp_samples:" if one.samples else "    exp_samples: []"
        for own, value in one.samples:
            yield f"    - labels: {json.dumps(_metric(dict(own)), ensure_ascii=False)}"
            yield f"      value: {number(value)}"


def quoted(text: str) -> str:
    """A string of PromQL, in double quotes, whatever is in it."""
    return '"' + "".join(_escaped(one) for one in text) + '"'


def selector(labels: Mapping[str, str]) -> str:
    """``{tenant="chat"}``; "" where there are no labels."""
    if not labels:
        return ""
    return "{" + ", ".join(f"{name}={quoted(value)}" for name, value in sorted(labels.items())) + "}"


def number(value: float) -> str:
    """The shortest decimal that is exactly this number."""
    if math.isinf(value):
        return "Inf" if value > 0 else "-Inf"
    return str(int(value)) if value.is_integer() and abs(value) < 2**53 else repr(value)


def named(samples: Samples, names: Collection[str]) -> list[Series]:
    """The series of these names."""
    return [series for series in samples.values if series[0] in names]


def _metric(labels: dict[str, str]) -> str:
    name = labels.pop("__name__", "")
    return (name + selector(labels)) or "{}"


def _escaped(one: str) -> str:
    if one in '\\"':
        return f"\\{one}"
    if one.isprintable():
        return one
    return f"\\u{ord(one):04x}" if ord(one) < 0x10000 else f"\\U{ord(one):08x}"


def _values(values: npt.NDArray[np.float64], grid: Grid, step_ms: int) -> str:
    """A series in promtool's notation: ``_`` where there is no sample, ``stale`` where a scrape has it no more."""
    words: list[str] = []
    filled = 0  # steps of step_ms so far
    was = False
    per_scrape, first = grid.scrape_ms // step_ms, grid.phase_ms // step_ms
    for slot, value in zip(grid.slots.tolist(), values.tolist(), strict=True):
        absent = math.isnan(value)
        if absent and not was:
            continue
        at = first + slot * per_scrape
        words += _blanks(at - filled)
        words.append("stale" if absent else number(value))
        filled = at + 1
        was = not absent
    return " ".join(words) or "_"


def _blanks(count: int) -> list[str]:
    if count < 2:
        return ["_"] * count
    return [f"_x{count}"]


def _duration(milliseconds: int) -> str:
    """As Prometheus writes it: whole seconds, and what is left."""
    whole, rest = divmod(milliseconds, 1000)
    return (f"{whole}s" if whole or not rest else "") + (f"{rest}ms" if rest else "")
