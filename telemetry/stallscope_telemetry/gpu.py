"""The GPU sampler: reads NVML on a thread of its own and hands samples to the emitter, beside steps and requests.

Harmless by construction: a machine without a GPU, a value that may not be read, a device that falls off the bus or
a driver that is reloaded cost samples and a line in the log, nothing else. NVML comes with the driver; ``pynvml``
(nvidia-ml-py, the extra ``gpu``) is imported when the sampler starts.
"""

# ruff: noqa: N802 (the names are NVML's)

from __future__ import annotations

import logging
import math
import os
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from types import TracebackType
from typing import Protocol

from stallscope_telemetry.emitter import Emitter
from stallscope_telemetry.records import GpuSample

log = logging.getLogger(__name__)

RETRY_S = 10.0  # how long lost devices, and a driver that is gone, are left alone
SAY_EVERY_S = 60.0  # at most one line of the log in this time
STOP_S = 1.0  # a call into a driver that hangs is not waited for

# Bits of nvmlClocksEventReasons; https://docs.nvidia.com/deploy/nvml-api/group__nvmlClocksEventReasons.html
_THROTTLE_REASONS = {
    0x001: "gpu_idle",
    0x002: "applications_clocks_setting",
    0x004: "sw_power_cap",
    0x008: "hw_slowdown",
    0x010: "sync_boost",
    0x020: "sw_thermal_slowdown",
    0x040: "hw_thermal_slowdown",
    0x080: "hw_power_brake_slowdown",
    0x100: "display_clock_setting",
}
_THROTTLE_BITS = 64


class _Error(Protocol):
    """NVMLError: ``value`` is one of NVML_ERROR_*."""

    value: int


class _Utilization(Protocol):
    gpu: int  # percent of the driver's sample period


class _Memory(Protocol):
    used: int  # bytes


class _Nvml(Protocol):
    """What is used of ``pynvml``, which has no types. A handle is whatever it returns for a device."""

    NVMLError: type[Exception]
    NVML_CLOCK_SM: int
    NVML_CLOCK_MEM: int
    NVML_TEMPERATURE_GPU: int
    NVML_ERROR_UNINITIALIZED: int
    NVML_ERROR_INVALID_ARGUMENT: int
    NVML_ERROR_NOT_FOUND: int
    NVML_ERROR_DRIVER_NOT_LOADED: int
    NVML_ERROR_LIBRARY_NOT_FOUND: int
    NVML_ERROR_GPU_IS_LOST: int
    NVML_ERROR_RESET_REQUIRED: int
    NVML_ERROR_LIB_RM_VERSION_MISMATCH: int
    NVML_ERROR_GPU_NOT_FOUND: int

    def nvmlInit(self) -> None: ...
    def nvmlShutdown(self) -> None: ...
    def nvmlDeviceGetCount(self) -> int: ...
    def nvmlDeviceGetHandleByIndex(self, index: int) -> object: ...
    def nvmlDeviceGetHandleByUUID(self, uuid: str) -> object: ...
    def nvmlDeviceGetDeviceHandleFromMigDeviceHandle(self, handle: object) -> object: ...
    def nvmlDeviceGetUUID(self, handle: object) -> str: ...
    def nvmlDeviceGetUtilizationRates(self, handle: object) -> _Utilization: ...
    def nvmlDeviceGetMemoryInfo(self, handle: object) -> _Memory: ...
    def nvmlDeviceGetClockInfo(self, handle: object, clock: int) -> int: ...
    def nvmlDeviceGetPowerUsage(self, handle: object) -> int: ...
    def nvmlDeviceGetTemperature(self, handle: object, sensor: int) -> int: ...
    def nvmlDeviceGetCurrentClocksEventReasons(self, handle: object) -> int: ...


class GpuSampler:
    """Samples devices ``hertz`` times a second while its context is open, and hands the samples to ``emitter``.

    ``devices``: indices or UUIDs, written as in CUDA_VISIBLE_DEVICES; without them that variable says which, and
    without it all are sampled. ``now_ns`` is the clock of the engine, so that samples and steps share a time axis.
    Close it before the emitter. Raises ValueError where ``hertz`` is not within 1 to 10.
    """

    def __init__(
        self,
        emitter: Emitter,
        devices: Sequence[str] | None = None,
        *,
        hertz: float = 2.0,
        now_ns: Callable[[], int] = time.time_ns,
    ) -> None:
        if not 1 <= hertz <= 10:
            raise ValueError(f"hertz must be between 1 and 10, not {hertz:g}")
        self._emitter = emitter
        self._wanted = devices
        self._period_s = 1 / hertz
        self._now_ns = now_ns
        self._stopping = threading.Event()
        self._said_at = -math.inf  # time.monotonic() of the last line
        self._thread = threading.Thread(target=self._run, name="stallscope-gpu", daemon=True)

    def start(self) -> None:
        """Starts the thread; whatever NVML has to load and to look up is done there."""
        self._thread.start()

    def close(self) -> None:
        """Stops sampling within a second, even if the driver hangs."""
        self._stopping.set()
        self._thread.join(STOP_S)

    def __enter__(self) -> GpuSampler:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    # --- on the sampler's thread ------------------------------------------------------------------------------------

    def _run(self) -> None:
        nvml = _load()
        if nvml is None:
            log.warning("GPU sampler: no pynvml, no GPU samples; pip install 'stallscope-telemetry[gpu]'")
            return
        known: set[str] = set()  # every device that was ever there: those that are missing are looked for
        while not self._stopping.is_set():
            try:
                nvml.nvmlInit()
            except nvml.NVMLError as error:
                if _code(error) == nvml.NVML_ERROR_LIBRARY_NOT_FOUND:
                    log.warning("GPU sampler: no NVIDIA driver on this machine, no GPU samples")
                    return
                self._say(f"NVML does not start ({error})")
                self._stopping.wait(RETRY_S)
                continue
            try:
                devices, lost = _choose(nvml, self._wanted)
                if not devices and not lost and not known:
                    log.warning("GPU sampler: no GPU is visible, no GPU samples")
                    return
                for entry, error_text in lost.items():
                    self._say(f"{entry} does not answer ({error_text})")
                known |= {device.uuid for device in devices}
                self._sample_until_lost(nvml, devices, complete=not lost and len(devices) == len(known))
            except nvml.NVMLError as error:
                self._say(f"NVML does not answer ({error})")
                self._stopping.wait(RETRY_S)
            finally:
                _shut_down(nvml)

    def _sample_until_lost(self, nvml: _Nvml, devices: Sequence[_Device], *, complete: bool) -> None:
        """Samples until a device has been missing for a while, and NVML is to be asked anew.

        ``complete``: none is missing now.
        """
        present = list(devices)
        seen_all = time.monotonic()
        while not self._stopping.is_set():
            for device in list(present):
                try:
                    self._emitter.gpu(_sample(nvml, device, self._now_ns()))
                except _Lost as lost:
                    present.remove(device)
                    self._say(f"{device.uuid} does not answer ({lost})")
            if complete and len(present) == len(devices):
                seen_all = time.monotonic()
            elif time.monotonic() - seen_all >= RETRY_S:
                return
            self._stopping.wait(self._period_s)

    def _say(self, what: str) -> None:
        if time.monotonic() - self._said_at >= SAY_EVERY_S:
            self._said_at = time.monotonic()
            log.warning("GPU sampler: %s; tried again every %g s", what, RETRY_S)


def _load() -> _Nvml | None:
    try:
        import pynvml
    except ImportError:
        return None
    nvml: _Nvml = pynvml
    return nvml


def _shut_down(nvml: _Nvml) -> None:
    with suppress(nvml.NVMLError):  # the driver may be gone: then there is nothing left to close
        nvml.nvmlShutdown()


# --- which devices ------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Device:
    """A GPU or a MIG instance of one. Only ``board`` has clocks, power and temperature: the GPU itself."""

    uuid: str
    handle: object
    board: object


def _choose(nvml: _Nvml, wanted: Sequence[str] | None) -> tuple[list[_Device], dict[str, str]]:
    """The devices to sample, and of those that can't be reached now, why not. Raises NVMLError where NVML is gone.

    As CUDA reads its variable: an empty list means none, and the first entry that is no device ends the list.
    https://docs.nvidia.com/cuda/cuda-programming-guide/05-appendices/environment-variables.html
    """
    if wanted is None and (visible := os.environ.get("CUDA_VISIBLE_DEVICES")) is not None:
        wanted = visible.split(",")
    if wanted is None:
        wanted = [str(index) for index in range(nvml.nvmlDeviceGetCount())]
    devices: dict[str, _Device] = {}
    lost: dict[str, str] = {}
    for entry in (entry.strip() for entry in wanted):
        try:
            device = _find(nvml, entry)
        except nvml.NVMLError as error:
            if _code(error) in (nvml.NVML_ERROR_INVALID_ARGUMENT, nvml.NVML_ERROR_NOT_FOUND):
                break
            lost[entry] = str(error)
        else:
            devices[device.uuid] = device
    return list(devices.values()), lost


def _find(nvml: _Nvml, entry: str) -> _Device:
    """The device of an index, a UUID, or the beginning of a GPU's. Raises NVMLError where there is none."""
    if entry.startswith("MIG-"):
        handle = nvml.nvmlDeviceGetHandleByUUID(entry)
        return _Device(entry, handle, nvml.nvmlDeviceGetDeviceHandleFromMigDeviceHandle(handle))
    if entry.startswith("GPU-"):
        handle = nvml.nvmlDeviceGetHandleByUUID(_whole_uuid(nvml, entry))
    else:
        handle = nvml.nvmlDeviceGetHandleByIndex(int(entry) if entry.isdecimal() else _NO_INDEX)
    return _Device(nvml.nvmlDeviceGetUUID(handle), handle, handle)


_NO_INDEX = (1 << 31) - 1  # NVML says of it what it says of any other index without a device


def _whole_uuid(nvml: _Nvml, beginning: str) -> str:
    """The UUID that begins so, if it is the only one; else ``beginning``, of which NVML will say what is wrong."""
    found = []
    for index in range(nvml.nvmlDeviceGetCount()):
        try:
            found.append(nvml.nvmlDeviceGetUUID(nvml.nvmlDeviceGetHandleByIndex(index)))
        except nvml.NVMLError:
            continue  # this one is lost or not ours to see; another may match
    matching = [uuid for uuid in found if uuid.startswith(beginning)]
    return matching[0] if len(matching) == 1 else beginning


# --- one sample ---------------------------------------------------------------------------------------------------


class _Lost(Exception):
    """A device that answers nothing any more; says why."""


def _sample(nvml: _Nvml, device: _Device, time_ns: int) -> GpuSample:
    """What ``device`` says now. A value that it doesn't have, or that may not be read, is None.

    Raises _Lost where the device or the driver is gone, or no value can be read at all.
    """

    def value(read: Callable[[], int]) -> int | None:
        try:
            return read()
        except nvml.NVMLError as error:
            if _code(error) in _lost_codes(nvml):
                raise _Lost(str(error)) from error
            return None

    percent = value(lambda: nvml.nvmlDeviceGetUtilizationRates(device.handle).gpu)
    milliwatts = value(lambda: nvml.nvmlDeviceGetPowerUsage(device.board))
    reasons = value(lambda: nvml.nvmlDeviceGetCurrentClocksEventReasons(device.board))
    sample = GpuSample(
        device=device.uuid,
        time_ns=time_ns,
        utilization=None if percent is None else percent / 100,
        sm_clock_mhz=value(lambda: nvml.nvmlDeviceGetClockInfo(device.board, nvml.NVML_CLOCK_SM)),
        mem_clock_mhz=value(lambda: nvml.nvmlDeviceGetClockInfo(device.board, nvml.NVML_CLOCK_MEM)),
        power_w=None if milliwatts is None else milliwatts / 1000,
        temperature_c=value(lambda: nvml.nvmlDeviceGetTemperature(device.board, nvml.NVML_TEMPERATURE_GPU)),
        memory_used_bytes=value(lambda: nvml.nvmlDeviceGetMemoryInfo(device.handle).used),
        throttle=None if reasons is None else _names_of(reasons),
    )
    if sample == GpuSample(device.uuid, time_ns):
        raise _Lost("no value can be read")
    return sample


def _names_of(reasons: int) -> tuple[str, ...]:
    """Names of the bits that are set; a bit that is newer than this list goes by its number."""
    bits = [1 << position for position in range(_THROTTLE_BITS) if reasons >> position & 1]
    return tuple(_THROTTLE_REASONS.get(bit, f"{bit:#x}") for bit in bits)


def _lost_codes(nvml: _Nvml) -> tuple[int, ...]:
    """Errors after which NVML must be asked for the device anew."""
    return (
        nvml.NVML_ERROR_UNINITIALIZED,
        nvml.NVML_ERROR_DRIVER_NOT_LOADED,
        nvml.NVML_ERROR_GPU_IS_LOST,
        nvml.NVML_ERROR_RESET_REQUIRED,
        nvml.NVML_ERROR_LIB_RM_VERSION_MISMATCH,
        nvml.NVML_ERROR_GPU_NOT_FOUND,
    )


def _code(error: Exception) -> int:
    nvml_error: _Error = error  # type: ignore[assignment]
    return nvml_error.value
