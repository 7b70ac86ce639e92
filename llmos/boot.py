"""Boot: from nothing to a kernel with its drivers, and a shell in front of it.

Reads as a table of contents. Owner: `llmos.cli` calls it once.
"""

import os
import sys
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from kernel.clock import RealClock
from kernel.config import KernelConfig
from kernel.device import Driver, EngineOptions, HostSample
from kernel.kernel import Kernel, Parts
from kernel.memory import Resources
from kernel.syscall import Syscalls
from llmos.config import Config, load_config
from llmos.foreign import foreign_sources
from llmos.paths import Paths, find_paths, writable
from llmos.store import Store
from shell.commands import builtin_registry
from shell.registry import Registry
from shell.session import Shell

if TYPE_CHECKING:
    from drivers.host import HostSensors

_KEY_BYTES = 32
SWITCH_INTERVAL_S = 0.0005  # keys and frames stay quick beside busy threads, for a tenth of their speed


@dataclass(frozen=True, slots=True)
class Machine:
    """A booted LLMOS."""

    paths: Paths
    config: Config
    system: Syscalls
    shell: Shell


def boot(
    flags: Mapping[str, object],
    *,
    plugins: bool = True,
    arguments: tuple[str, ...] = (),
    record: Path | None = None,
) -> Machine:
    """Raises UsageError for a configuration that makes no sense, LlmosError for a `record` not writable."""
    sys.setswitchinterval(SWITCH_INTERVAL_S)
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before any native import: see drivers.llamacpp
    paths = find_paths()
    config = load_config(paths.config_file, flags)
    foreign = foreign_sources(os.environ)
    store = Store(paths, config.models, foreign, warn=lambda text: kernel.log("warn", "store", text))
    kernel = Kernel(
        Parts(
            clock=RealClock(),
            drivers=_drivers(config),
            catalog=store,
            key=_key(paths),
            config=KernelConfig(policy=config.policy),
            options=EngineOptions(config.context_tokens, config.sequences, config.threads),
            ram_available=_ram_available,
            host=_host_sensors(),
            journal=paths.state / "journal",
            swap=paths.state / "swap",
            ram_bytes=_ram_bytes(),
            resources=Resources(cpus=_cpus()),
            ram_resident=_ram_resident(),
            checkpoints=paths.checkpoints,
            record=record,
            alert=lambda text: shell.alert(text),
        )
    )
    system = Syscalls(kernel)
    registry = builtin_registry(store)
    if plugins:
        registry.find_more = lambda registry: _add_plugins(registry, paths)
    shell = Shell(system, registry, arguments=arguments, open_monitor=lambda: _monitor(system))
    shell.chat_history = paths.chat_history_file
    return Machine(paths, config, system, shell)


def _add_plugins(registry: Registry, paths: Paths) -> None:
    from llmos.hooks import add_plugins  # deferred: reading what is installed takes a while

    add_plugins(registry, paths.plugins, os.environ)


def _drivers(config: Config) -> dict[str, Driver]:
    from drivers.llamacpp.driver import LlamaCppDriver

    llama_cpp = LlamaCppDriver(config.isolation)
    return {".gguf": llama_cpp, "": llama_cpp}  # other programs keep GGUF under names without a suffix


def _key(paths: Paths) -> bytes:
    """The secret that checkpoints' KV states are signed with; made at the first boot, mode 0600.

    Without a writable home it lasts as long as the process: checkpoints still load, by computing again.
    """
    folder = writable(paths.state)
    fresh = os.urandom(_KEY_BYTES)
    if folder is None:
        return fresh
    file, part = folder / "key", folder / f"key.{os.getpid()}"
    if found := _read_key(file):
        return found
    try:
        with os.fdopen(os.open(part, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "wb") as stream:
            stream.write(fresh)
        part.replace(file)
    except OSError:  # a full disk, say: no reason not to start
        with suppress(OSError):
            part.unlink()
    return _read_key(file) or fresh


def _read_key(file: Path) -> bytes:
    """Nothing, if it is not whole."""
    try:
        key = file.read_bytes()
    except OSError:
        return b""
    return key if len(key) == _KEY_BYTES else b""


def _cpus() -> int:
    """Processors that LLMOS may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _ram_bytes() -> int:
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def _ram_resident() -> Callable[[], int] | None:
    """What LLMOS and its workers hold that the machine does not count as available: mapped files are."""
    pages = Path("/proc/self/statm")
    if not pages.exists():
        return None
    page_bytes = os.sysconf("SC_PAGE_SIZE")

    def anonymous() -> int:
        total = 0
        for pid in ("self", *_children()):
            with suppress(OSError, ValueError):
                fields = Path(f"/proc/{pid}/statm").read_text().split()
                total += (int(fields[1]) - int(fields[2])) * page_bytes
        return total

    return anonymous


def _children() -> list[str]:
    """PIDs of the workers, as Linux knows them by the thread that started each."""
    found: list[str] = []
    for task in Path("/proc/self/task").iterdir():
        with suppress(OSError):
            found += (task / "children").read_text().split()
    return found


def _ram_available() -> int:
    import psutil

    return int(psutil.virtual_memory().available)


def _host_sensors() -> Callable[[], HostSample]:
    """Sensors that are set up when they are first asked: NVML takes its time."""
    sensors: list[HostSensors] = []

    def sample() -> HostSample:
        if not sensors:
            from drivers.host import HostSensors

            sensors.append(HostSensors())
        return sensors[0].sample()

    return sample


def _monitor(system: Syscalls) -> int:
    from tui.app import run_monitor

    return run_monitor(system)
