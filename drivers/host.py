"""What this machine is doing: processors, memory, disks and GPUs, read when asked.

Owner: the one thread that calls `sample` (rates are since its last call).
Not here: history, analysis (kernel.monitor); what *we* hold on a device (the kernel's ledger).
"""

import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from kernel.device import GpuSample, HostSample


class HostSensors:
    """Samples the host. The first sample has no rates yet."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        import psutil

        self._psutil = psutil
        self._clock = clock
        self._gpus = NvidiaSensors()
        self._disk = self._disk_now(clock())
        psutil.cpu_percent(percpu=True)  # the first call has nothing to compare with

    def sample(self) -> HostSample:
        now_s = self._clock()
        cores = tuple(self._psutil.cpu_percent(percpu=True))
        memory = self._psutil.virtual_memory()
        swap = self._psutil.swap_memory()
        read_bytes_s, written_bytes_s = self._disk_rates(now_s)
        return HostSample(
            time_s=now_s,
            cpu_percent=sum(cores) / len(cores) if cores else 0.0,
            core_percents=cores,
            load_average=os.getloadavg(),
            ram_total_bytes=memory.total,
            ram_available_bytes=memory.available,
            ram_ours_bytes=self._resident_bytes(),
            swap_total_bytes=swap.total,
            swap_used_bytes=swap.used,
            disk_read_bytes_s=read_bytes_s,
            disk_written_bytes_s=written_bytes_s,
            gpus=self._gpus.sample(),
        )

    def _disk_rates(self, now_s: float) -> tuple[float, float]:
        before, self._disk = self._disk, self._disk_now(now_s)
        passed_s = now_s - before.time_s
        if passed_s <= 0:
            return 0.0, 0.0
        read_bytes = max(0, self._disk.read_bytes - before.read_bytes)  # a disk may have been unplugged
        written_bytes = max(0, self._disk.written_bytes - before.written_bytes)
        return read_bytes / passed_s, written_bytes / passed_s

    def _disk_now(self, now_s: float) -> "_Disk":
        counters = self._psutil.disk_io_counters()
        return _Disk(now_s, counters.read_bytes, counters.write_bytes) if counters else _Disk(now_s, 0, 0)

    def _resident_bytes(self) -> int:
        us = self._psutil.Process()
        total_bytes = 0
        for process in (us, *us.children(recursive=True)):
            try:
                total_bytes += process.memory_info().rss
            except self._psutil.Error:  # it ended meanwhile
                continue
        return total_bytes


@dataclass(frozen=True, slots=True)
class _Disk:
    time_s: float
    read_bytes: int
    written_bytes: int


class NvidiaSensors:
    """GPUs through NVML. Where there is none, this is found out once and costs nothing afterwards."""

    def __init__(self) -> None:
        self._nvml: Any = None
        self._cards: list[tuple[Any, str]] = []
        try:
            import pynvml

            pynvml.nvmlInit()
            self._nvml = pynvml
            self._cards = [self._card(index) for index in range(pynvml.nvmlDeviceGetCount())]
        except Exception:  # no package, no library, no driver, no right: there are no GPUs to show
            self._cards = []

    def sample(self) -> tuple[GpuSample, ...]:
        samples = (self._read(handle, name) for handle, name in self._cards)
        return tuple(sample for sample in samples if sample is not None)

    def _card(self, index: int) -> tuple[Any, str]:
        handle = self._nvml.nvmlDeviceGetHandleByIndex(index)
        name = self._nvml.nvmlDeviceGetName(handle)
        return handle, name.decode() if isinstance(name, bytes) else name

    def _read(self, handle: Any, name: str) -> GpuSample | None:
        nvml = self._nvml
        memory = self._ask(nvml.nvmlDeviceGetMemoryInfo, handle)
        if memory is None:  # the card is lost
            return None
        rates = self._ask(nvml.nvmlDeviceGetUtilizationRates, handle)
        return GpuSample(
            name=name,
            memory_total_bytes=memory.total,
            memory_used_bytes=memory.used,
            utilization_percent=None if rates is None else float(rates.gpu),
            temperature_c=self._ask(nvml.nvmlDeviceGetTemperature, handle, nvml.NVML_TEMPERATURE_GPU),
            power_w=self._scaled(1e-3, nvml.nvmlDeviceGetPowerUsage, handle),
            power_limit_w=self._scaled(1e-3, nvml.nvmlDeviceGetEnforcedPowerLimit, handle),
            pcie_received_bytes_s=self._pcie(handle, nvml.NVML_PCIE_UTIL_RX_BYTES),
            pcie_sent_bytes_s=self._pcie(handle, nvml.NVML_PCIE_UTIL_TX_BYTES),
        )

    def _pcie(self, handle: Any, counter: int) -> float | None:
        """NVML measures for 20 ms, and counts in KB."""
        return self._scaled(1024.0, self._nvml.nvmlDeviceGetPcieThroughput, handle, counter)

    def _scaled(self, factor: float, question: Callable[..., Any], *args: Any) -> float | None:
        value = self._ask(question, *args)
        return None if value is None else value * factor

    def _ask(self, question: Callable[..., Any], *args: Any) -> Any:
        try:
            return question(*args)
        except self._nvml.NVMLError:  # not supported by this card
            return None
