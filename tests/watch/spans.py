"""Spans made by hand, for what no engine of ours would send."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from stallscope.trace.otlp import Resource, Span, SpanGroup
from stallscope.trace.otlp.spans import Attributes, Value
from stallscope.watch.families import WINDOW_S, Family
from stallscope.watch.scores import Scores
from stallscope.watch.watch import Watch
from stallscope_telemetry import names

S = 10**9
START_NS = 1_790_000_000 * S
WINDOW_NS = WINDOW_S * S


def group(replica: str, spans: Iterable[Span], **resource: Value) -> SpanGroup:
    return SpanGroup(Resource({names.REPLICA: replica, names.BLOCK_SIZE: 16, **resource}), list(spans), "", "")


def span(name: str, start: int, end: int, attributes: Attributes, state: str = "") -> Span:
    return Span(name, f"{1:032x}", state, start, end, attributes)


def step(number: int, at_ns: int, length_ns: int = S // 50, **more: Value) -> Span:
    """A step without a batch; ``more`` attributes by the names of their constants."""
    attributes: Attributes = dict.fromkeys(
        (
            *(names.DISPATCH_DELAY, names.SCHED, names.PREFILL_TOKENS, names.DECODE_TOKENS, names.BATCH_SIZE),
            *(names.RUNNING, names.WAITING, names.KV_USED),
        ),
        0,
    )
    attributes[names.STEP] = number
    attributes |= {getattr(names, name): value for name, value in more.items()}
    return span(names.STEP_SPAN, at_ns, at_ns + length_ns, attributes)


def joining(number: int, at_ns: int, handles: Sequence[int], tenants: Sequence[str], prompt: int = 10) -> Span:
    """A step in which these join, and their prompts are computed."""
    chunks = [value for handle in handles for value in (handle, prompt)]
    return step(
        number,
        at_ns,
        R_HANDLE=list(handles),
        R_ID=[f"request-{handle}" for handle in handles],
        R_PROMPT=[prompt] * len(handles),
        R_MAX=[100] * len(handles),
        R_TENANT=list(tenants),
        CHUNKS=chunks,
    )


def request(name: str, arrival: int, end: int, state: str = "", **more: Value) -> Span:
    attributes: Attributes = {names.REQUEST_ID: name} | {getattr(names, key): value for key, value in more.items()}
    return span(names.REQUEST_SPAN, arrival, end, attributes, state)


class Watched:
    """A watch and its scores, under a clock of the test's own."""

    def __init__(self, **options: int) -> None:
        self.now_ns = START_NS
        self.scores = Scores(clock=lambda: self.now_ns, **options)
        self.watch = Watch(self.scores)

    def window(self, *groups: SpanGroup, seconds: float = WINDOW_S) -> None:
        """A window in which these came."""
        self.now_ns += int(seconds * S)
        self.watch.take(groups)
        self.watch.close_window(self.now_ns)

    def total(self, family: Family, suffix: str = "", **labels: str) -> float:
        """The sum of a family's series with these labels, as a scraper that has come before sees them."""
        self.scores.exposed()
        self.now_ns += 1
        return sum(
            value
            for (name, named), value in self.scores.exposed().items()
            if name == family.name + suffix and labels.items() <= dict(named).items()
        )
