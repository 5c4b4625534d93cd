"""What the hook for vLLM notes of a request, and what is left of it once the request has ended."""

from __future__ import annotations

import gc
import weakref

from stallscope_telemetry.prefixes import PrefixGroups
from stallscope_telemetry.records import FinishReason
from stallscope_telemetry.vllm.lives import Infos, Life, ReadyTimes

from .conftest import make_info


class _Request:
    block_hashes = (b"first", b"second")


def life(handle: int = 1) -> Life:
    return Life(_Request(), handle, lambda _, number: make_info(number))


def ready_times(steps: int) -> ReadyTimes:
    found = ReadyTimes()
    for step in range(steps):
        found.add(step, 100 + step)
    return found


def test_a_record_tells_what_was_when_the_request_ended_whatever_comes_after() -> None:
    ready, one = ready_times(5), life()
    one.scheduled_ns, one.decodes_from = 99, 1
    one.skip(3)
    one.end(FinishReason.STOP, 104, ready, PrefixGroups())
    ready.add(5, 105)
    ready.keep_for([])
    ready.add(6, 106)
    record = one.record()
    assert record.token_times_ns == [101, 102, 104]
    assert record.events == [("scheduled", 99), ("first_token", 101), ("finished", 104)]
    assert (record.first_token_ns, record.prefix, ready.steps) == (101, 1, 7)


def test_who_has_ended_holds_no_prompt_while_its_record_waits_for_a_slow_exporter() -> None:
    one = life()
    prompt = weakref.ref(one.request)
    one.end(FinishReason.ABORT, 7, ready_times(0), PrefixGroups())
    gc.collect()
    assert prompt() is None
    assert one.record().info == make_info(1)


def test_who_joined_is_described_when_a_step_is_written() -> None:
    lives = [life(1), life(2)]
    infos = Infos(lives)
    assert len(infos) == 2
    assert [one.handle for one in infos] == [1, 2]
    assert list(infos[1:]) == [make_info(2)]
