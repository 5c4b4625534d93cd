"""Attributes of spans: only declared ones, of the declared types, and nothing where there is nothing to say."""

from __future__ import annotations

from dataclasses import replace

import pytest

from stallscope_telemetry import names
from stallscope_telemetry.records import GpuSample, RequestRecord, StepRecord
from stallscope_telemetry.spans import (
    Attributes,
    gpu_attributes,
    request_attributes,
    resource_attributes,
    step_attributes,
)

from .conftest import DESCRIPTION, START_NS, full_info, make_info, make_request, make_step

DECLARED = {(attribute.on, attribute.name): attribute.type for attribute in names.ATTRIBUTES}
SCALARS = {int: "int", str: "str", bool: "bool", float: "float"}


def type_of(value: object) -> str:
    if isinstance(value, list):
        kinds = {SCALARS[type(item)] for item in value}
        assert len(kinds) == 1, f"mixed or empty: {value}"
        return f"{kinds.pop()}[]"
    return SCALARS[type(value)]  # exactly: an enum is not what OpenTelemetry allows


def assert_declared(on: names.On, attributes: Attributes) -> None:
    assert {name: type_of(value) for name, value in attributes.items()} == {
        name: DECLARED.get((on, name)) for name in attributes
    }


@pytest.mark.parametrize(
    "record",
    [make_step(0), make_step(1, keyframe=True), make_step(2, full=True), make_step(3, keyframe=True, full=True)],
)
def test_step_attributes_are_declared_with_their_types(record: StepRecord) -> None:
    assert_declared("step", step_attributes(record, dropped=3))


@pytest.mark.parametrize(
    "record", [make_request(full_info(1)), make_request(make_info(2)), make_request(make_info(3), tokens=0)]
)
def test_request_attributes_are_declared_with_their_types(record: RequestRecord) -> None:
    assert_declared("request", request_attributes(record))


def test_every_declared_attribute_is_emitted_by_a_step_or_request_that_has_it() -> None:
    step = step_attributes(make_step(0, keyframe=True), 1) | step_attributes(make_step(1, full=True), 1)
    request = request_attributes(make_request(full_info(1)))
    assert {name for on, name in DECLARED if on == "step"} == set(step)
    assert {name for on, name in DECLARED if on == "request"} == set(request)


def test_a_gpu_sample_says_what_is_declared_and_nothing_that_it_does_not_know() -> None:
    full = gpu_attributes(GpuSample("GPU-a", START_NS, 0.5, 1980, 2619, 512.3, 61, 7, ("sw_power_cap", "gpu_idle")))
    assert_declared("gpu", full)
    assert {name for on, name in DECLARED if on == "gpu"} == set(full)
    assert gpu_attributes(GpuSample("GPU-a", START_NS)) == {names.GPU_DEVICE: "GPU-a"}
    assert gpu_attributes(GpuSample("GPU-a", START_NS, throttle=()))[names.GPU_THROTTLE] == ""


def test_the_resource_carries_all_that_is_declared() -> None:
    attributes = resource_attributes(DESCRIPTION)
    assert_declared("resource", attributes)
    assert {name for on, name in DECLARED if on == "resource"} == set(attributes)
    assert names.GROUP not in resource_attributes(replace(DESCRIPTION, group=""))


def test_a_quiet_step_says_no_more_than_its_counts() -> None:
    assert set(step_attributes(make_step(5), dropped=0)) == {
        names.STEP,
        names.DISPATCH_DELAY,
        names.SCHED,
        names.PREFILL_TOKENS,
        names.DECODE_TOKENS,
        names.BATCH_SIZE,
        names.RUNNING,
        names.WAITING,
        names.KV_USED,
    }


def test_token_times_give_every_gap_to_the_nanosecond() -> None:
    record = make_request(make_info(1), tokens=2)
    record.token_times_ns = [record.info.arrival_ns + 11, record.info.arrival_ns + 11, record.info.arrival_ns + 18]
    assert request_attributes(record)[names.TOKEN_TIMES] == "11,0,7"


def test_a_keyframe_says_why_everybody_waits() -> None:
    attributes = step_attributes(make_step(0, keyframe=True), dropped=0)
    assert attributes[names.R_HANDLE] == [7, 8, 9]
    assert attributes[names.R_STATE] == [1, 2, 0]
    assert attributes[names.R_WAITS] == [8, 2, 5, 9, 4, 0]
