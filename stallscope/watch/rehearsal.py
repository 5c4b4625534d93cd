"""A recorded trace watched in virtual time, as if its spans came now: what a scraper would have seen, and when.

A span reaches a collector some time after its end (``DELAY_NS``: the exporter's batches); windows and scrapes are those
of a live watch.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from tempfile import TemporaryDirectory

from stallscope.diagnosis import diagnose
from stallscope.diagnosis.model import Incident
from stallscope.diagnosis.slo import Slo
from stallscope.trace import Trace, read_trace
from stallscope.trace.findings import Findings
from stallscope.trace.otlp import Reader, Resource, Span, SpanGroup, find_sources
from stallscope.trace.parquet import is_trace_folder
from stallscope.watch.families import BUCKETS, SCRAPE_S, WINDOW_S
from stallscope.watch.samples import Samples, Series, samples_of
from stallscope.watch.scores import Scores
from stallscope.watch.watch import FORGOTTEN_NS, Watch

DELAY_NS = 1_000_000_000
SECOND_NS = 1_000_000_000
_REHEARSED, _DIAGNOSED = 0.5, 1.0  # shares of the work

Progress = Callable[[float], None]
Part = Callable[[Trace], Trace]  # chooses what is looked at of a trace


@dataclass(frozen=True, eq=False)
class Rehearsal:
    """``samples``: what a scraper saw from before the first span until the last one had been judged; ``incidents``:
    those of the trace as a whole."""

    samples: Samples
    incidents: tuple[Incident, ...]


def rehearse(
    path: str | Path, *, slos: Sequence[Slo] = (), part: Part | None = None, progress: Progress | None = None
) -> Rehearsal:
    """Watches the trace at ``path``, or the ``part`` of it, and diagnoses that as a whole.

    ``progress`` hears the share of the work that is done, in [0, 1]. Raises UsageError where there is nothing sound.
    """
    trace = read_trace(path) if part is None else part(read_trace(path))
    told = progress or (lambda share: None)
    spans = spans_of(trace) if part is not None or is_trace_folder(Path(path)) else read_spans(path)
    samples = watch_spans(spans, slos, lambda share: told(share * _REHEARSED))
    rest = _DIAGNOSED - _REHEARSED
    found = diagnose(trace, slos=slos, progress=lambda share: told(_REHEARSED + share * rest))
    return Rehearsal(samples, found.incidents)


def watch_spans(groups: Iterable[SpanGroup], slos: Sequence[Slo] = (), progress: Progress | None = None) -> Samples:
    """What a scraper sees of a watch whose spans come ``DELAY_NS`` after their ends."""
    by_window = _by_window(groups)
    numbers = _watched_windows(by_window)
    now = 0
    scores = Scores(bounds=bounds_with(slos), clock=lambda: now)
    watch = Watch(scores, slos)
    scrapes: list[tuple[int, dict[Series, float]]] = []
    every = SCRAPE_S // WINDOW_S
    for done, number in enumerate(numbers, 1):
        now = (number + 1) * WINDOW_S * SECOND_NS
        watch.take(by_window.get(number, ()))
        watch.close_window(now)
        if (number + 1) % every == 0:
            scrapes.append((now, scores.exposed()))
        if progress is not None:
            progress(done / len(numbers))
    return samples_of(scrapes)


def bounds_with(slos: Iterable[Slo]) -> dict[str, tuple[float, ...]]:
    """The buckets of histograms, with the limits of objectives among them."""
    bounds = {name: set(some) for name, some in BUCKETS.items()}
    for slo in slos:
        name = f"stallscope_{slo.metric}_seconds"
        if name in bounds:
            bounds[name].add(slo.limit_ns / 1e9)
    return {name: tuple(sorted(some)) for name, some in bounds.items()}


def read_spans(path: str | Path) -> Iterator[SpanGroup]:
    """The spans at a path."""
    return Reader(Findings()).read(find_sources(path))


def spans_of(trace: Trace) -> Iterator[SpanGroup]:
    """The spans that a trace would be written as."""
    from stallscope.trace.to_otlp import write_otlp

    with TemporaryDirectory() as scratch:
        file = Path(scratch) / "trace.otlp.jsonl"
        write_otlp(trace, file)
        yield from read_spans(file)


def _by_window(groups: Iterable[SpanGroup]) -> dict[int, list[SpanGroup]]:
    """Spans by the number of the window in which they arrive."""
    sorted_in: dict[int, dict[Resource, list[Span]]] = defaultdict(lambda: defaultdict(list))
    for group in groups:
        for span in group.spans:
            sorted_in[(span.end + DELAY_NS) // (WINDOW_S * SECOND_NS)][group.resource].append(span)
    return {
        number: [SpanGroup(resource, spans, "", "") for resource, spans in of_window.items()]
        for number, of_window in sorted_in.items()
    }


def _watched_windows(arrive: Collection[int]) -> list[int]:
    """From the first in which spans ``arrive`` until the last stall has been judged. Of a long silence among them, or
    of the years to a damaged time, only what a watch needs to forget who is silent."""
    numbers = sorted(arrive)
    watched: list[int] = []
    for number, following in zip_longest(numbers, numbers[1:]):
        last = number + _AFTER_S // WINDOW_S + 1
        watched.extend(range(number, last if following is None else min(following, number + _SILENCE_S // WINDOW_S)))
    return watched


_AFTER_S = 120  # until the last stall has been judged, and its alerts have resolved
_SILENCE_S = FORGOTTEN_NS // SECOND_NS + 2 * WINDOW_S
