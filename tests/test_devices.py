"""Which device a model goes to, and that devices work at the same time."""

import time

import pytest
from simkernel import SIM_DEVICE, SimCatalog, SimSystem

from drivers.sim import SimDriver
from drivers.simmodel import SimModel
from kernel.clock import RealClock
from kernel.device import DeviceInfo
from kernel.errors import KernelFault, NotPermitted, UsageError
from kernel.kernel import Kernel, Parts
from kernel.models import Model
from kernel.seats import Seats
from kernel.spec import ProcessSpec
from kernel.syscall import Syscalls

SECOND = DeviceInfo("sim1", "sim", "another simulated device", 64 << 30)
SMALL = DeviceInfo("sim2", "sim", "a small one", 1 << 20)
MODELS = {name: SimModel(mean_tokens=0) for name in "abc"}


def test_models_go_where_most_room_is_and_a_small_device_gets_none() -> None:
    sim = SimSystem(MODELS, more_devices=(SECOND, SMALL))
    assert [sim.system.load(name).device for name in "abc"] == ["sim0", "sim1", "sim0"]


def test_a_device_can_be_named() -> None:
    sim = SimSystem(MODELS, more_devices=(SECOND,))
    assert sim.system.load("a", device="sim1").device == "sim1"
    assert sim.system.load("a", device="sim1").device == "sim1"
    with pytest.raises(NotPermitted, match="loaded on sim1"):
        sim.system.load("a", device="sim0")
    with pytest.raises(UsageError, match="no device gpu7"):
        sim.system.load("b", device="gpu7")
    assert [view.name for view in sim.system.snapshot().models] == ["a"]


def threaded() -> Kernel:
    """Two devices that take real time."""
    model = SimModel(mean_tokens=0, base_s=0.01, decode_s=0.0)
    driver = SimDriver(
        [SIM_DEVICE, SECOND], sleep=time.sleep, models=dict.fromkeys(("a.sim", "b.sim", "c.sim"), model)
    )
    return Kernel(Parts(RealClock(), {".sim": driver}, SimCatalog(*"abc")))


def test_two_devices_work_at_the_same_time() -> None:
    """Each takes real time for its steps: one after the other, it would be twice as long."""
    system = Syscalls(threaded())
    try:
        pids = [system.spawn(ProcessSpec(name, ("hello",), max_tokens=40)) for name in "ab"]
        views = [system.wait(pid, 20) for pid in pids]
        assert all(view is not None and view.exit_code == 0 for view in views)
        first, second = views
        assert first is not None and second is not None
        busy_s = first.device_s + second.device_s
        ended_s = max(view.started_s + view.elapsed_s for view in (first, second))
        assert ended_s - first.started_s < 0.8 * busy_s
    finally:
        system.shutdown()


def test_a_bug_ends_what_runs_on_its_device_and_nobody_waits_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    def bug(_seats: Seats, model: Model) -> bool:
        if model.name == "a":
            raise ZeroDivisionError
        return seated(_seats, model)

    seated = Seats.fill
    monkeypatch.setattr(Seats, "fill", bug)
    machine = threaded()
    system = Syscalls(machine)
    try:
        hit, spared = (system.spawn(ProcessSpec(name, ("hello",), max_tokens=40)) for name in "ab")
        view = system.wait(hit, 20)
        assert view is not None and "kernel panic on sim0" in view.error
        with pytest.raises(KernelFault, match="kernel panic"):
            system.spawn(ProcessSpec("a", ("hello",)))
        with pytest.raises(KernelFault, match="kernel panic"):
            system.load("c", device="sim0")
        with pytest.raises(KernelFault, match="kernel panic"):
            machine.on_dispatcher(machine.models["a"], lambda: None)
        system.unload("a")
        view = system.wait(spared, 20)
        assert view is not None and view.exit_code == 0
        assert system.unload("b")
    finally:
        system.shutdown()
