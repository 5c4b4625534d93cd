"""The GPU sampler: what NVML says becomes samples, and whatever NVML does, the rest goes on."""

# ruff: noqa: N802 (the names are NVML's)

from __future__ import annotations

import logging
import random
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from types import SimpleNamespace

import pynvml
import pytest

from stallscope_telemetry import gpu as gpu_module
from stallscope_telemetry import names
from stallscope_telemetry.emitter import Emitter
from stallscope_telemetry.gpu import GpuSampler
from stallscope_telemetry.spans import Attributes

from .conftest import START_NS, Kept, make_step

DEADLOCK_S = 60  # no test waits that long unless something is stuck


@dataclass(eq=False)
class Gpu:
    """A device as the driver has it. ``refused``: functions that fail with this error. ``board``: of a MIG instance."""

    uuid: str
    percent: int = 42
    used: int = 7_000_000_000
    reasons: int = 0
    refused: dict[str, int] = field(default_factory=dict)
    board: Gpu | None = None


class Driver:
    """Stands in for nvidia-ml-py with a driver below it: its functions by its names, its own errors and constants."""

    def __init__(self, *gpus: Gpu, instances: tuple[Gpu, ...] = ()) -> None:
        self.gpus = list(gpus)
        self.instances = list(instances)
        self.is_loaded = True
        self.opened = 0
        self.opens = 0

    def __getattr__(self, name: str) -> object:
        return getattr(pynvml, name)

    def _check(self, function: str, gpu: Gpu | None = None) -> None:
        if not self.is_loaded:
            raise pynvml.NVMLError(pynvml.NVML_ERROR_DRIVER_NOT_LOADED)
        if not self.opened:
            raise pynvml.NVMLError(pynvml.NVML_ERROR_UNINITIALIZED)
        if gpu is not None and (error := gpu.refused.get(function, gpu.refused.get("*"))) is not None:
            raise pynvml.NVMLError(error)

    def _only_of_boards(self, function: str, gpu: Gpu) -> None:
        self._check(function, gpu)
        if gpu.board is not None:
            raise pynvml.NVMLError(pynvml.NVML_ERROR_NOT_SUPPORTED)

    def nvmlInit(self) -> None:
        if not self.is_loaded:
            raise pynvml.NVMLError(pynvml.NVML_ERROR_DRIVER_NOT_LOADED)
        self.opened += 1
        self.opens += 1

    def nvmlShutdown(self) -> None:
        self._check("nvmlShutdown")
        self.opened -= 1

    def nvmlDeviceGetCount(self) -> int:
        self._check("nvmlDeviceGetCount")
        return len(self.gpus)

    def nvmlDeviceGetHandleByIndex(self, index: int) -> Gpu:
        if index >= len(self.gpus):
            raise pynvml.NVMLError(pynvml.NVML_ERROR_INVALID_ARGUMENT)
        self._check("nvmlDeviceGetHandleByIndex", self.gpus[index])
        return self.gpus[index]

    def nvmlDeviceGetHandleByUUID(self, uuid: str) -> Gpu:
        self._check("nvmlDeviceGetHandleByUUID")
        for gpu in [*self.gpus, *self.instances]:
            if gpu.uuid == uuid:
                self._check("nvmlDeviceGetHandleByUUID", gpu)
                return gpu
        raise pynvml.NVMLError(pynvml.NVML_ERROR_NOT_FOUND)

    def nvmlDeviceGetDeviceHandleFromMigDeviceHandle(self, gpu: Gpu) -> Gpu:
        self._check("nvmlDeviceGetDeviceHandleFromMigDeviceHandle", gpu)
        assert gpu.board is not None
        return gpu.board

    def nvmlDeviceGetUUID(self, gpu: Gpu) -> str:
        self._check("nvmlDeviceGetUUID", gpu)
        return gpu.uuid

    def nvmlDeviceGetUtilizationRates(self, gpu: Gpu) -> SimpleNamespace:
        self._only_of_boards("nvmlDeviceGetUtilizationRates", gpu)
        return SimpleNamespace(gpu=gpu.percent, memory=9)

    def nvmlDeviceGetMemoryInfo(self, gpu: Gpu) -> SimpleNamespace:
        self._check("nvmlDeviceGetMemoryInfo", gpu)
        return SimpleNamespace(used=gpu.used, free=1, total=gpu.used + 1)

    def nvmlDeviceGetClockInfo(self, gpu: Gpu, clock: int) -> int:
        self._only_of_boards("nvmlDeviceGetClockInfo", gpu)
        return {pynvml.NVML_CLOCK_SM: 1980, pynvml.NVML_CLOCK_MEM: 2619}[clock]

    def nvmlDeviceGetPowerUsage(self, gpu: Gpu) -> int:
        self._only_of_boards("nvmlDeviceGetPowerUsage", gpu)
        return 512_345

    def nvmlDeviceGetTemperature(self, gpu: Gpu, sensor: int) -> int:
        self._only_of_boards("nvmlDeviceGetTemperature", gpu)
        return {pynvml.NVML_TEMPERATURE_GPU: 61}[sensor]

    def nvmlDeviceGetCurrentClocksEventReasons(self, gpu: Gpu) -> int:
        self._only_of_boards("nvmlDeviceGetCurrentClocksEventReasons", gpu)
        return gpu.reasons


@pytest.fixture
def install(monkeypatch: pytest.MonkeyPatch) -> Callable[[Driver], Driver]:
    """Puts a driver in the place of pynvml; devices that are lost are looked for again at once."""
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(gpu_module, "RETRY_S", 0.01)

    def put(driver: Driver) -> Driver:
        monkeypatch.setitem(sys.modules, "pynvml", driver)
        return driver

    return put


@pytest.fixture
def kept() -> Kept:
    return Kept()


@pytest.fixture
def emitter(resource: Attributes, kept: Kept) -> Iterator[Emitter]:
    with Emitter(resource, [kept], random.Random(0)) as emitter:
        yield emitter


def samples(kept: Kept, device: str | None = None) -> list[Attributes]:
    found = [dict(span.attributes or {}) for span in kept.spans if span.name == names.GPU_SPAN]
    return [one for one in found if device is None or one[names.GPU_DEVICE] == device]  # type: ignore[misc]


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + DEADLOCK_S
    while not condition():
        assert time.monotonic() < deadline, "stuck"
        time.sleep(0.01)


def fails(error: int, *functions: str) -> dict[str, int]:
    return dict.fromkeys(functions or ("*",), error)


# --- no GPU -----------------------------------------------------------------------------------------------------


def has_nvml() -> bool:
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        return False
    pynvml.nvmlShutdown()
    return True


def test_without_a_driver_it_says_so_once_and_the_rest_works(
    emitter: Emitter, kept: Kept, caplog: pytest.LogCaptureFixture
) -> None:
    if has_nvml():
        pytest.skip("this machine has NVML")
    sampler = GpuSampler(emitter)
    with sampler:
        wait_for(lambda: not sampler._thread.is_alive())
        emitter.step(make_step(0, keyframe=True))
    emitter.close()
    assert [span.name for span in kept.spans] == [names.STEP_SPAN]
    assert [record.message for record in caplog.records] == [
        "GPU sampler: no NVIDIA driver on this machine, no GPU samples"
    ]


def test_without_the_extra_it_says_what_to_install(
    emitter: Emitter, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", None)
    with GpuSampler(emitter) as sampler:
        wait_for(lambda: not sampler._thread.is_alive())
    assert [record.message for record in caplog.records] == [
        "GPU sampler: no pynvml, no GPU samples; pip install 'stallscope-telemetry[gpu]'"
    ]


@pytest.mark.parametrize(("gpus", "visible"), [((), None), ((Gpu("GPU-a"),), ""), ((Gpu("GPU-a"),), "-1")])
def test_where_no_gpu_is_visible_it_says_so_once_and_ends(
    gpus: tuple[Gpu, ...],
    visible: str | None,
    emitter: Emitter,
    install: Callable[[Driver], Driver],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    driver = install(Driver(*gpus))
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    with GpuSampler(emitter) as sampler:
        wait_for(lambda: not sampler._thread.is_alive())
    assert [record.message for record in caplog.records] == ["GPU sampler: no GPU is visible, no GPU samples"]
    assert driver.opened == 0


@pytest.mark.parametrize("hertz", [0, 0.5, 11])
def test_a_rate_outside_of_the_contract_is_refused(hertz: float, emitter: Emitter) -> None:
    with pytest.raises(ValueError, match="between 1 and 10"):
        GpuSampler(emitter, hertz=hertz)


# --- samples ----------------------------------------------------------------------------------------------------


def test_a_sample_says_all_that_the_device_does(
    emitter: Emitter, kept: Kept, install: Callable[[Driver], Driver]
) -> None:
    driver = install(Driver(Gpu("GPU-a", reasons=0x4 | 0x40 | 0x1000)))
    with GpuSampler(emitter, now_ns=lambda: START_NS):
        wait_for(lambda: bool(samples(kept)))
    span = next(span for span in kept.spans if span.name == names.GPU_SPAN)
    assert (span.start_time, span.end_time) == (START_NS, START_NS)
    assert dict(span.attributes or {}) == {
        names.GPU_DEVICE: "GPU-a",
        names.GPU_UTILIZATION: 0.42,
        names.GPU_SM_CLOCK: 1980,
        names.GPU_MEM_CLOCK: 2619,
        names.GPU_POWER: 512.345,
        names.GPU_TEMPERATURE: 61,
        names.GPU_MEMORY_USED: 7_000_000_000,
        names.GPU_THROTTLE: "sw_power_cap|hw_thermal_slowdown|0x1000",
    }
    assert (driver.opened, driver.opens) == (0, 1)


def test_samples_come_at_their_rate_until_it_is_closed(
    emitter: Emitter, kept: Kept, install: Callable[[Driver], Driver]
) -> None:
    install(Driver(Gpu("GPU-a"), Gpu("GPU-b")))
    with GpuSampler(emitter, hertz=10) as sampler:
        wait_for(lambda: len(samples(kept)) >= 6)
    assert not sampler._thread.is_alive()
    taken = [len(samples(kept, device)) for device in ("GPU-a", "GPU-b")]
    assert abs(taken[0] - taken[1]) <= 1


@pytest.mark.parametrize("error", [pynvml.NVML_ERROR_NO_PERMISSION, pynvml.NVML_ERROR_NOT_SUPPORTED])
def test_a_value_that_may_not_be_read_is_absent_and_the_others_are_there(
    error: int,
    emitter: Emitter,
    kept: Kept,
    install: Callable[[Driver], Driver],
    caplog: pytest.LogCaptureFixture,
) -> None:
    refused = fails(error, "nvmlDeviceGetPowerUsage", "nvmlDeviceGetCurrentClocksEventReasons")
    install(Driver(Gpu("GPU-a", refused=refused)))
    with GpuSampler(emitter):
        wait_for(lambda: bool(samples(kept)))
    (sample, *_) = samples(kept)
    assert not {names.GPU_POWER, names.GPU_THROTTLE} & sample.keys()
    assert sample[names.GPU_TEMPERATURE] == 61
    assert caplog.records == []


# --- which devices ----------------------------------------------------------------------------------------------

A, B, C = "GPU-aa11", "GPU-bb22", "GPU-bb33"


@pytest.mark.parametrize(
    ("visible", "devices", "sampled"),
    [
        (None, None, {A, B, C}),
        ("2,0", None, {A, C}),
        (" 1 ", None, {B}),
        ("0,7,1", None, {A}),  # as CUDA does: what follows an index that is none is not visible
        ("1,x,0", None, {B}),
        ("GPU-bb33", None, {C}),
        ("GPU-aa,0", None, {A}),
        ("0,GPU-bb,2", None, {A}),  # the beginning of two
        ("MIG-c1", None, {"MIG-c1"}),
        ("0", ["2", B], {B, C}),
    ],
)
def test_it_samples_the_devices_that_cuda_would_see(
    visible: str | None,
    devices: list[str] | None,
    sampled: set[str],
    emitter: Emitter,
    kept: Kept,
    install: Callable[[Driver], Driver],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    gpus = [Gpu(A), Gpu(B), Gpu(C)]
    install(Driver(*gpus, instances=(Gpu("MIG-c1", used=5, board=gpus[2]),)))
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    with GpuSampler(emitter, devices):
        wait_for(lambda: len(samples(kept)) >= len(sampled))
    assert {one[names.GPU_DEVICE] for one in samples(kept)} == sampled


def test_a_mig_instance_has_its_own_memory_and_the_clocks_of_its_gpu(
    emitter: Emitter, kept: Kept, install: Callable[[Driver], Driver]
) -> None:
    board = Gpu("GPU-a")
    install(Driver(board, instances=(Gpu("MIG-1", used=5, board=board),)))
    with GpuSampler(emitter, ["MIG-1"]):
        wait_for(lambda: bool(samples(kept)))
    (sample, *_) = samples(kept)
    assert (sample[names.GPU_MEMORY_USED], sample[names.GPU_SM_CLOCK]) == (5, 1980)
    assert names.GPU_UTILIZATION not in sample


# --- what goes wrong --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "error", [pynvml.NVML_ERROR_GPU_IS_LOST, pynvml.NVML_ERROR_RESET_REQUIRED, pynvml.NVML_ERROR_UNKNOWN]
)
def test_a_lost_device_costs_one_line_and_its_samples_until_it_is_back(
    error: int,
    emitter: Emitter,
    kept: Kept,
    install: Callable[[Driver], Driver],
    caplog: pytest.LogCaptureFixture,
) -> None:
    lost = Gpu("GPU-b")
    driver = install(Driver(Gpu("GPU-a"), lost))
    with GpuSampler(emitter, hertz=10):
        wait_for(lambda: bool(samples(kept, "GPU-b")))
        lost.refused = fails(error)
        wait_for(lambda: bool(caplog.records))
        opens, before = driver.opens, len(samples(kept, "GPU-a"))
        wait_for(lambda: driver.opens > opens + 1 and len(samples(kept, "GPU-a")) > before + 1)
        gone = len(samples(kept, "GPU-b"))
        lost.refused = {}
        wait_for(lambda: len(samples(kept, "GPU-b")) > gone)
    (line,) = [record.message for record in caplog.records]
    assert line.startswith("GPU sampler: GPU-b does not answer (")
    assert driver.opened == 0


def test_a_device_that_is_lost_from_the_start_is_looked_for_again(
    emitter: Emitter, kept: Kept, install: Callable[[Driver], Driver], caplog: pytest.LogCaptureFixture
) -> None:
    lost = Gpu("GPU-b", refused=fails(pynvml.NVML_ERROR_GPU_IS_LOST))
    install(Driver(Gpu("GPU-a"), lost))
    with GpuSampler(emitter, hertz=10):
        wait_for(lambda: len(samples(kept, "GPU-a")) >= 2)
        lost.refused = {}
        wait_for(lambda: bool(samples(kept, "GPU-b")))
    assert [record.levelno for record in caplog.records] == [logging.WARNING]


def test_sampling_goes_on_after_a_driver_was_reloaded(
    emitter: Emitter, kept: Kept, install: Callable[[Driver], Driver], caplog: pytest.LogCaptureFixture
) -> None:
    driver = install(Driver(Gpu("GPU-a")))
    with GpuSampler(emitter, hertz=10):
        wait_for(lambda: bool(samples(kept)))
        driver.is_loaded = False
        wait_for(lambda: bool(caplog.records))
        before = len(samples(kept))
        driver.opened, driver.is_loaded = 0, True
        wait_for(lambda: len(samples(kept)) > before + 1)
    (line,) = [record.message for record in caplog.records]
    assert line.startswith("GPU sampler: GPU-a does not answer (Driver Not Loaded)")
    assert driver.opens == 2


def test_a_driver_that_hangs_delays_neither_the_engine_nor_the_end(
    emitter: Emitter, kept: Kept, install: Callable[[Driver], Driver], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu_module, "STOP_S", 0.05)
    driver, entered, released = install(Driver(Gpu("GPU-a"))), threading.Event(), threading.Event()

    def hang(gpu: Gpu) -> int:
        entered.set()
        assert released.wait(DEADLOCK_S), "the test forgot to release the driver"
        return 1

    monkeypatch.setattr(driver, "nvmlDeviceGetPowerUsage", hang)
    sampler = GpuSampler(emitter)
    with sampler:
        assert entered.wait(DEADLOCK_S)
        emitter.step(make_step(0, keyframe=True))
        wait_for(lambda: bool(kept.spans))
    assert sampler._thread.is_alive()
    released.set()
    wait_for(lambda: not sampler._thread.is_alive())
