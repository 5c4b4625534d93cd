"""A request's record waits for its answer to leave, and is never lost for that."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from stallscope_engine.server.delivery import MOST_HELD, DeliveryRecorder
from stallscope_telemetry.records import FinishReason, RequestInfo, RequestRecord, StepRecord


class Recorded:
    """A Recorder that keeps the requests."""

    def __init__(self) -> None:
        self.requests: list[RequestRecord] = []

    def wants_keyframe(self, step: int) -> bool:
        return step == 7

    def step(self, record: StepRecord) -> None:
        raise AssertionError("no step was recorded")

    def request(self, record: RequestRecord) -> None:
        self.requests.append(record)


def ended(handle: int) -> RequestRecord:
    return RequestRecord(RequestInfo(handle, f"r{handle}", 0, 1, 1), 1, 2, 3, 4, 4, 0, 0, FinishReason.LENGTH)


def test_a_record_is_passed_on_with_the_time_of_its_delivery() -> None:
    recorded = Recorded()
    delivery = DeliveryRecorder(recorded)
    delivery.request(ended(1))
    assert recorded.requests == []
    delivery.delivered(1, 9)
    assert [(record.info.handle, record.delivered_ns) for record in recorded.requests] == [(1, 9)]
    assert delivery.wants_keyframe(7)
    assert not delivery.wants_keyframe(8)


@given(st.lists(st.tuples(st.booleans(), st.integers(0, 9)), max_size=40))
def test_each_record_is_passed_on_once_whatever_is_told(events: list[tuple[bool, int]]) -> None:
    recorded = Recorded()
    delivery = DeliveryRecorder(recorded)
    sent: set[int] = set()
    for has_ended, handle in events:
        if has_ended and handle not in sent:
            sent.add(handle)
            delivery.request(ended(handle))
        elif not has_ended:
            delivery.delivered(handle, 9)
    delivery.flush()
    assert sorted(record.info.handle for record in recorded.requests) == sorted(sent)


def test_readers_that_never_finish_hold_a_bounded_number() -> None:
    recorded = Recorded()
    delivery = DeliveryRecorder(recorded)
    for handle in range(MOST_HELD + 3):
        delivery.request(ended(handle))
    assert [record.info.handle for record in recorded.requests] == [0, 1, 2]
