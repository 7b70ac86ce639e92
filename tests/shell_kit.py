"""A session on a real kernel with simulated models, and streams that tests can read."""

import io
import json
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from drivers.sim import SimDriver
from kernel.clock import RealClock
from kernel.device import DeviceInfo, Driver
from kernel.errors import ModelNotFound
from kernel.kernel import Kernel, Parts
from kernel.memory import Resources
from kernel.syscall import Syscalls
from shell.commands import builtin_registry
from shell.interpreter import run_argv, run_line, run_text
from shell.session import Shell
from shell.terminal import Output

MODELS: dict[str, dict[str, object]] = {
    "quick": {"mean_tokens": 8, "base_s": 1e-4, "decode_s": 1e-5, "prompt_token_s": 1e-6},
    "endless": {"mean_tokens": 0, "base_s": 1e-3, "context_tokens": 100_000, "sequences": 4},
    "slow-load": {"load_s": 30.0},
    "huge": {"weights_bytes": 1 << 50},
    "broken": {"faults": {"refuse_load": "ModelInvalid"}},
}


@dataclass(frozen=True)
class Entry:
    name: str
    path: Path
    description: str = "simulated"


class Models:
    """A catalog of simulated models in a folder; a path to a `.sim` file names one too."""

    def __init__(self, folder: Path) -> None:
        self.entries = {name: Entry(name, folder / f"{name}.sim") for name in MODELS}
        for name, fields in MODELS.items():
            self.entries[name].path.write_text(json.dumps(fields))

    def list(self) -> tuple[Entry, ...]:
        return tuple(self.entries.values())

    def resolve(self, name: str) -> Entry:
        if name.endswith(".sim"):
            return Entry(Path(name).stem, Path(name))
        if name in self.entries:
            return self.entries[name]
        raise ModelNotFound(f"no model {name}", "`models` lists them")


class Terminal(io.StringIO):
    """A stream that says it is a terminal."""

    def isatty(self) -> bool:
        return True


class Session:
    """A shell and what it printed."""

    def __init__(
        self, system: Syscalls, *, terminal: bool, environment: dict[str, str], **options: Any
    ) -> None:
        self.stdout = Terminal() if terminal else io.StringIO()
        self.stderr = Terminal() if terminal else io.StringIO()
        self.shell = Shell(
            system,
            builtin_registry(),
            Output(self.stdout, environment),
            Output(self.stderr, environment),
            environment=environment,
            **{"stdin": None, **options},
        )

    def taken(self) -> tuple[str, str]:
        """What was printed since the last time, on both streams."""
        said = self.stdout.getvalue(), self.stderr.getvalue()
        for stream in (self.stdout, self.stderr):
            stream.seek(0)
            stream.truncate()
        return said

    def script(self, text: str, name: str = "") -> tuple[int, str, str]:
        return run_text(self.shell, text, name), *self.taken()

    def argv(self, *words: str) -> tuple[int, str, str]:
        return run_argv(self.shell, list(words)), *self.taken()

    def line(self, text: str) -> tuple[int, str, str]:
        return run_line(self.shell, text), *self.taken()


@contextmanager
def interrupted(after_s: float = 0.2) -> Iterator[None]:
    """^C for the main thread, as a terminal's would end a call that blocks."""
    main = threading.main_thread().ident
    assert main is not None
    timer = threading.Timer(after_s, signal.pthread_kill, [main, signal.SIGINT])
    timer.start()
    yield
    timer.join()


@contextmanager
def booted(resources: Resources = Resources()) -> Iterator[Syscalls]:  # noqa: B008
    device = DeviceInfo("sim0", "sim", "simulated", 64 << 30)
    with TemporaryDirectory() as folder:
        drivers: dict[str, Driver] = {".sim": SimDriver([device])}
        kernel = Kernel(Parts(RealClock(), drivers, Models(Path(folder)), resources=resources))
        system = Syscalls(kernel)
        try:
            yield system
            kernel.check_integrity()
        finally:
            system.shutdown()


@contextmanager
def session(
    *,
    terminal: bool = False,
    environment: dict[str, str] | None = None,
    resources: Resources = Resources(),  # noqa: B008
    **options: Any,
) -> Iterator[Session]:
    with booted(resources) as system:
        yield Session(system, terminal=terminal, environment=environment or {}, **options)
