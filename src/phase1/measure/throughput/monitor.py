"""Read clocks, throttling and other programs while a measurement runs; None for what this machine does not tell."""

import os
import time
from typing import Any

from phase1.machine.environment import nvml
from phase1.measure.throughput.disturbances import CpuUse, GpuSample

INTERVAL_SECONDS = 0.5


class Monitor:
    """Made before a measurement; `sample` is called after each launch of a step, while the GPU works on it."""

    def __init__(self, device: str) -> None:
        self.samples: list[GpuSample] = []
        self._cuda = device == "cuda"
        self._next = 0.0
        self._before = _cpu_seconds()

    def sample(self) -> None:
        """Ask the driver, at most twice a second."""
        if self._cuda and time.perf_counter() >= self._next:
            self.samples.append(nvml(gpu_sample) or GpuSample())
            self._next = time.perf_counter() + INTERVAL_SECONDS

    def cpu_use(self) -> CpuUse | None:
        """The processor seconds since this object was made."""
        now = _cpu_seconds()
        if self._before is None or now is None:
            return None
        seconds, busy, own = (b - a for a, b in zip(self._before, now))
        return CpuUse(seconds, busy, own, os.cpu_count() or 1)


def gpu_sample(library: Any, handle: Any) -> GpuSample:
    """What NVML says of the GPU right now; each answer alone may be missing."""

    def ask(question: str, *arguments: Any) -> Any:
        try:
            return getattr(library, question)(handle, *arguments)
        except (library.NVMLError, AttributeError):  # no permission, not supported by this card, an older driver or library
            return None

    throttling = ask("nvmlDeviceGetCurrentClocksEventReasons")
    running = ask("nvmlDeviceGetComputeRunningProcesses")
    return GpuSample(
        sm_clock_mhz=ask("nvmlDeviceGetClockInfo", library.NVML_CLOCK_SM),
        throttling=ask("nvmlDeviceGetCurrentClocksThrottleReasons") if throttling is None else throttling,  # before driver 535
        processes=None if running is None else len(running),
    )


def _cpu_seconds() -> tuple[float, float, float] | None:
    """The clock, the busy seconds of all cores, and those of this program and the ones it started."""
    try:
        import psutil
    except ImportError:
        return None
    every = psutil.cpu_times()
    idle = every.idle + getattr(every, "iowait", 0.0)
    guests = getattr(every, "guest", 0.0) + getattr(every, "guest_nice", 0.0)  # user and nice hold them too
    own = 0.0
    this = psutil.Process()
    for process in (this, *this.children(recursive=True)):
        try:
            times = process.cpu_times()
        except psutil.Error:  # ended in between
            continue
        own += times.user + times.system
    return time.perf_counter(), sum(every) - idle - guests, own
