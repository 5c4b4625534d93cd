"""However spans are delivered (out of order, twice, late, replicas mixed), the trace is that of the clean file."""

import random

import orjson
from hypothesis import assume, given
from hypothesis import strategies as st

from stallscope.trace import Trace
from tests.trace.recording import Recording, Workload, read, run, workloads
from tests.trace.test_forms import message
from tests.trace.test_forms import read as read_bytes

DUPLICATES = {"duplicate_step", "duplicate_request"}


def batched(draw: random.Random, lines: list[bytes]) -> list[bytes]:
    """Several of the lines in one, as a Collector puts them together: resources one after the other."""
    batches = []
    while lines:
        size = draw.randint(1, 5)
        resources = [one for line in lines[:size] for one in orjson.loads(line)["resourceSpans"]]
        batches.append(orjson.dumps({"resourceSpans": resources}))
        lines = lines[size:]
    return batches


def mixed(first: Recording, second: Recording) -> tuple[list[bytes], list[bytes]]:
    """Steps, and requests, of two replicas."""
    return [*first.step_lines("a"), *second.step_lines("b")], [*first.request_lines("a"), *second.request_lines("b")]


def kinds(trace: Trace) -> set[str]:
    return {one.kind for one in trace.findings}


@given(workloads(5), workloads(5), st.integers(0, 1 << 32), st.booleans())
def test_order_repeats_and_mixture_change_nothing(one: Workload, other: Workload, seed: int, protobuf: bool) -> None:
    first, second = run(one), run(other)
    assume(first.steps and second.steps)
    steps, requests = mixed(first, second)
    clean = read([*first.lines("a"), *second.lines("b")])
    draw = random.Random(seed)
    repeats = draw.sample(steps, len(steps) // 3) + draw.sample(requests, len(requests) // 3)
    sent = [*steps, *requests, *repeats]
    draw.shuffle(sent)
    sent = batched(draw, sent)
    trace = read_bytes(b"".join(map(message, sent))) if protobuf else read(sent)
    assert trace.tables == clean.tables
    assert kinds(trace) - kinds(clean) <= DUPLICATES
    told = {kind: sum(one.count for one in trace.findings if one.kind == kind) for kind in DUPLICATES}
    assert sum(told.values()) == len(repeats)


@given(workloads(5), workloads(5))
def test_requests_may_come_long_after_all_steps(one: Workload, other: Workload) -> None:
    first, second = run(one), run(other)
    assume(first.steps and second.steps)
    steps, requests = mixed(first, second)
    clean = read([line for pair in ((first, "a"), (second, "b")) for line in pair[0].lines(pair[1])])
    for sent in ([*steps, *requests], [*requests, *steps]):
        trace = read(sent)
        assert (trace.tables, trace.findings) == (clean.tables, clean.findings)
