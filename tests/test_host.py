"""Sensors: real readings of this machine, and NVML's answers, present, absent or partly so."""

import json
import os
import subprocess
import sys
from types import ModuleType, SimpleNamespace

import pytest

from drivers.host import HostSensors, NvidiaSensors


class HandFed:
    """A clock that stands where it is put."""

    def __init__(self) -> None:
        self.now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


@pytest.fixture
def no_nvml(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", None)  # import raises ImportError


@pytest.mark.usefixtures("no_nvml")
def test_readings_make_sense() -> None:
    sample = HostSensors().sample()
    assert len(sample.core_percents) >= 1
    assert all(0 <= percent <= 100 for percent in (sample.cpu_percent, *sample.core_percents))
    assert 0 < sample.ram_ours_bytes < sample.ram_total_bytes
    assert 0 < sample.ram_available_bytes < sample.ram_total_bytes
    assert sample.gpus == ()


@pytest.mark.usefixtures("no_nvml")
def test_memory_of_children_is_ours() -> None:
    sensors = HostSensors()
    code = "x = b'x' * (64 << 20); print(flush=True); input()"
    before = sensors.sample().ram_ours_bytes
    with subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as child:
        assert child.stdout is not None
        child.stdout.readline()
        assert sensors.sample().ram_ours_bytes > before + (60 << 20)
        child.kill()


@pytest.mark.usefixtures("no_nvml")
def test_disk_rates_are_per_second_and_never_negative(monkeypatch: pytest.MonkeyPatch) -> None:
    readings = iter([(1000, 500), (3000, 600), (2000, 700), None])

    def counters() -> SimpleNamespace | None:
        pair = next(readings)
        return None if pair is None else SimpleNamespace(read_bytes=pair[0], write_bytes=pair[1])

    monkeypatch.setattr("psutil.disk_io_counters", counters)
    clock = HandFed()
    sensors = HostSensors(clock)
    rates = []
    for now_s in (2.0, 4.0, 5.0):
        clock.now_s = now_s
        sample = sensors.sample()
        rates.append((sample.disk_read_bytes_s, sample.disk_written_bytes_s))
    assert rates == [(1000.0, 50.0), (0.0, 50.0), (0.0, 0.0)]


class NVMLError(Exception):
    pass


def fake_nvml(*, driver: bool = True) -> ModuleType:
    """NVML as a card answers that knows no power, and a second one that is lost."""
    nvml = ModuleType("pynvml")
    nvml.inits = 0

    def init() -> None:
        nvml.inits += 1
        if not driver:
            raise NVMLError("driver not loaded")

    def refuse(*args: object) -> None:
        raise NVMLError("not supported")

    def memory(handle: str) -> SimpleNamespace:
        return SimpleNamespace(total=80 << 30, used=5 << 30) if handle == "card0" else refuse()

    nvml.NVMLError = NVMLError
    nvml.NVML_TEMPERATURE_GPU, nvml.NVML_PCIE_UTIL_TX_BYTES, nvml.NVML_PCIE_UTIL_RX_BYTES = 0, 0, 1
    nvml.nvmlInit = init
    nvml.nvmlDeviceGetCount = lambda: 2
    nvml.nvmlDeviceGetHandleByIndex = lambda index: f"card{index}"
    nvml.nvmlDeviceGetName = lambda handle: b"Sim 3000"
    nvml.nvmlDeviceGetMemoryInfo = memory
    nvml.nvmlDeviceGetUtilizationRates = lambda handle: SimpleNamespace(gpu=37)
    nvml.nvmlDeviceGetTemperature = lambda handle, sensor: 61
    nvml.nvmlDeviceGetPowerUsage = refuse
    nvml.nvmlDeviceGetEnforcedPowerLimit = lambda handle: 700_000
    nvml.nvmlDeviceGetPcieThroughput = lambda handle, counter: 10 + counter
    return nvml


def test_gpu_readings_are_in_bytes_watts_and_percent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", fake_nvml())
    (gpu,) = NvidiaSensors().sample()  # the lost card is left out
    assert (gpu.name, gpu.memory_used_bytes, gpu.utilization_percent) == ("Sim 3000", 5 << 30, 37.0)
    assert (gpu.temperature_c, gpu.power_w, gpu.power_limit_w) == (61, None, 700.0)
    assert (gpu.pcie_received_bytes_s, gpu.pcie_sent_bytes_s) == (11 * 1024, 10 * 1024)


def test_absent_driver_is_asked_for_once(monkeypatch: pytest.MonkeyPatch) -> None:
    nvml = fake_nvml(driver=False)
    monkeypatch.setitem(sys.modules, "pynvml", nvml)
    sensors = NvidiaSensors()
    assert [sensors.sample() for _ in range(3)] == [(), (), ()]
    assert nvml.inits == 1


def test_importing_the_module_imports_no_sensor_library() -> None:
    code = "import sys, drivers.host; print({'psutil', 'pynvml'} & set(sys.modules))"
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=True,
        env={"PYTHONPATH": ":".join(sys.path)},
    )
    assert done.stdout.strip() == "set()"


def test_a_booted_system_has_sensors() -> None:
    command = [sys.executable, "-m", "llmos", "uptime", "--json"]
    done = subprocess.run(command, capture_output=True, check=True, timeout=60)
    host = json.loads(done.stdout)["host"]
    assert len(host["core_percents"]) == os.cpu_count()
    assert 0 < host["ram_ours_bytes"] < host["ram_total_bytes"]
