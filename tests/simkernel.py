"""A real kernel on simulated engines, under a hand-fed clock."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from drivers.sim import SimDriver
from drivers.simmodel import SimModel
from kernel.clock import ManualClock
from kernel.config import KernelConfig
from kernel.device import DeviceInfo, Sampling
from kernel.errors import ModelNotFound
from kernel.kernel import Kernel, Parts
from kernel.memory import Resources
from kernel.spec import ProcessSpec
from kernel.syscall import Syscalls

SIM_DEVICE = DeviceInfo("sim0", "sim", "a simulated device", 64 << 30)


@dataclass(frozen=True)
class Entry:
    name: str
    path: Path
    description: str = ""


class SimCatalog:
    """Every name is a model; a test may say which ones are not."""

    def __init__(self, *names: str, folder: Path = Path()) -> None:
        self.names = names
        self.folder = folder

    def list(self) -> tuple[Entry, ...]:
        return tuple(Entry(name, self.folder / f"{name}.sim") for name in self.names)

    def resolve(self, name: str) -> Entry:
        for entry in self.list():
            if name in (entry.name, str(entry.path)):
                return entry
        raise ModelNotFound(f"no model {name}")


class SimSystem:
    """Kernel, clock and system calls, stepped by hand.

    With a folder the models have files there, and the kernel a journal: what a checkpoint needs.
    """

    def __init__(
        self,
        models: Mapping[str, SimModel] | None = None,
        config: KernelConfig | None = None,
        swap: Path | None = None,
        ram_bytes: int = 64 << 30,
        journal: Path | None = None,
        *,
        device: DeviceInfo = SIM_DEVICE,
        more_devices: tuple[DeviceInfo, ...] = (),
        resources: Resources | None = None,
        folder: Path | None = None,
    ) -> None:
        self.models = dict(models or {"m": SimModel(mean_tokens=0)})
        self.clock = ManualClock()
        for name in self.models if folder else ():
            (folder / f"{name}.sim").touch()
        by_file = {f"{name}.sim": model for name, model in self.models.items()}
        driver = SimDriver([device, *more_devices], sleep=self.clock.sleep, models=by_file)
        self.kernel = Kernel(
            Parts(
                clock=self.clock,
                drivers={".sim": driver},
                catalog=SimCatalog(*self.models, folder=folder or Path()),
                key=b"k" * 32,
                config=config or KernelConfig(),
                threaded=False,
                swap=swap,
                ram_bytes=ram_bytes,
                resources=resources or Resources(),
                journal=journal or (folder and folder / "journal"),
            )
        )
        self.system = Syscalls(self.kernel)
        self.dispatcher = self.kernel.dispatchers["sim0"]

    def spawn(
        self,
        prompt: str = "one two three",
        *,
        model: str = "m",
        nice: int = 0,
        max_tokens: int = 0,
        seed: int = 0,
    ) -> int:
        spec = ProcessSpec(model, (prompt,), nice=nice, max_tokens=max_tokens, sampling=Sampling(seed=seed))
        return self.system.spawn(spec)

    def run_until(self, output_tokens: int) -> None:
        """Step until the processes have drawn so many tokens together."""
        while sum(p.output_tokens for p in self.system.snapshot().processes) < output_tokens:
            assert self.dispatcher.advance(), "nothing left to run"

    def output(self, pid: int) -> str:
        return self.system.read(pid, 0).text
