"""A recorded trace watched in virtual time: the same from its spans as from its tables, whatever times are in it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from stallscope.errors import UsageError
from stallscope.trace import Trace, read_trace
from stallscope.trace.parquet import write_parquet
from stallscope.trace.select import select
from stallscope.watch import families
from stallscope.watch.rehearsal import rehearse, watch_spans
from stallscope.watch.samples import Samples
from tests.watch.spans import START_NS, S, group, joining, step

SAMPLES = Path(__file__).parents[2] / "sample_traces"


def last(samples: Samples, family: families.Family, suffix: str = "") -> dict[tuple[str, ...], float]:
    return {
        tuple(labels.values()): float(values[~np.isnan(values)][-1])
        for labels, values in samples.of(family.name + suffix)
    }


def test_a_trace_and_its_conversion_are_rehearsed_alike(tmp_path: Path) -> None:
    recorded = SAMPLES / "pinned.otlp.jsonl.zst"
    write_parquet(read_trace(recorded), tmp_path / "tables")
    shares: list[float] = []
    one, other = rehearse(recorded, progress=shares.append), rehearse(tmp_path / "tables")
    assert shares == sorted(shares)
    assert shares[-1] == pytest.approx(1.0)
    assert one.incidents == other.incidents
    assert (one.samples.times_ns == other.samples.times_ns).all()
    exact = (
        *(families.STEPS, families.STEPS_LOST, families.REQUESTS, families.TOKENS, families.RECOMPUTED),
        *(families.PREEMPTIONS, families.BLAME, families.JUDGED, families.INCIDENTS, families.COVERAGE),
    )
    for family in exact:
        assert last(one.samples, family) == pytest.approx(last(other.samples, family)), family.name
    for family in (families.BUSY, families.KV, families.STALLED, families.STEP_TIME, families.HOST_GAP):
        assert last(one.samples, family) == pytest.approx(last(other.samples, family), rel=1e-3, abs=1e-3), family.name
    for family in (families.TTFT, families.ITL, families.E2E):
        assert last(one.samples, family, "_bucket") == last(other.samples, family, "_bucket"), family.name


def test_a_part_of_a_trace_is_rehearsed_as_if_it_were_all_of_it(tmp_path: Path) -> None:
    def part(trace: Trace) -> Trace:
        return select(trace, since="+5s", until="+15s")

    recorded = SAMPLES / "pinned.otlp.jsonl.zst"
    write_parquet(part(read_trace(recorded)), tmp_path / "part")
    one, other, whole = rehearse(recorded, part=part), rehearse(tmp_path / "part"), rehearse(recorded)
    assert one.incidents == other.incidents
    assert last(one.samples, families.STEPS) == last(other.samples, families.STEPS)
    assert 0 < sum(last(one.samples, families.STEPS).values()) < sum(last(whole.samples, families.STEPS).values())


def test_a_time_of_another_century_does_not_make_a_rehearsal_endless() -> None:
    spans = [joining(0, START_NS, [0], ["t"]), *(step(number, START_NS + number * S) for number in range(1, 40))]
    spans += [step(40, 1), step(41, START_NS + 10**18)]
    samples = watch_spans([group("r", spans)])
    assert len(samples.times_ns) < 500
    assert last(samples, families.STEPS)["r",] >= 40


def test_silence_between_spans_is_watched_and_a_long_one_left_out() -> None:
    day_ns = 86_400 * S
    spans = [
        *(step(number, START_NS + number * S) for number in range(30)),
        *(step(number, START_NS + number * S + 300 * S) for number in range(30, 60)),
        *(step(number, START_NS + number * S + 30 * day_ns) for number in range(60, 90)),
    ]
    times = watch_spans([group("r", spans)]).times_ns
    gaps = np.diff(times)
    assert (gaps[times[:-1] < START_NS + 400 * S] == 10 * S).all()
    assert (gaps > day_ns).sum() == 1
    assert len(times) < 200


def test_nothing_to_watch_is_told_in_a_line(tmp_path: Path) -> None:
    path = tmp_path / "t.otlp.jsonl"
    path.write_text('{"resourceSpans": []}\n')
    with pytest.raises(UsageError):
        rehearse(path)
