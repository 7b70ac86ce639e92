"""A kernel of the benchmark's own: one model, on the real driver, in a real worker process.

It is LLMOS as it boots, but for the number of seats, so that nothing a user has loaded takes part.
Also here: the model that is measured if none is named.
Not here: what is measured.
"""

import random
import tempfile
import zlib
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from drivers.llamacpp import header, layout
from drivers.llamacpp.driver import LlamaCppDriver
from kernel.clock import RealClock
from kernel.device import Driver, EngineOptions, Sampling
from kernel.errors import KernelFault, NotPermitted
from kernel.kernel import Kernel, Parts
from kernel.snapshot import ModelView
from kernel.spec import ProcessSpec
from kernel.syscall import Signal, Syscalls
from llmos.paths import find_paths, writable
from llmos.store import Store
from plugins.benchmarks.progress import Tell
from shell.registry import Arguments
from shell.session import Shell

GREEDY = Sampling(temperature=0.0, ignore_eos=True)
_LETTERS = "abcdefghijklmnopqrstuvwxyz     "


@dataclass(frozen=True, slots=True)
class Machine:
    """A booted kernel with its model loaded."""

    kernel: Kernel
    system: Syscalls
    model: ModelView

    @property
    def on_gpu(self) -> bool:
        return self.model.device != "cpu"

    def spec(self, prompt: str, tokens: int, *, items: int = 1, nice: int = 0) -> ProcessSpec:
        """A greedy process that draws exactly so many tokens per item; 0 fills the window."""
        return ProcessSpec(
            model=self.model.path,
            prompts=(prompt,) * items,
            raw=True,
            sampling=GREEDY,
            max_tokens=tokens,
            nice=nice,
            command="bench",
        )

    def end(self, pids: Iterable[int]) -> None:
        """Kill them, or those that have not ended by themselves."""
        for pid in pids:
            with suppress(NotPermitted):
                self.system.signal(pid, Signal.KILL)
            self.system.reap(pid)


@contextmanager
def booted(
    path: Path, options: EngineOptions, driver: Driver | None = None, device: str = ""
) -> Iterator[Machine]:
    """Boot, load, and at the end shut down. Raises what the load raises."""
    kernel = Kernel(
        Parts(
            clock=RealClock(),
            drivers={".gguf": driver or LlamaCppDriver()},
            catalog=Store(find_paths()),
            options=options,
            ram_available=layout.free_ram_bytes,
        )
    )
    system = Syscalls(kernel)
    try:
        system.load(str(path), device=device)
        model = system.wait_load(str(path))
        if model is None or model.engine is None:
            raise KernelFault(f"{path} did not load")
        yield Machine(kernel, system, model)
    finally:
        system.shutdown()


def random_text(length: int, seed: str) -> str:
    """A prompt of so many characters. With the model of our own, a character is a token."""
    return "".join(random.Random(seed).choices(_LETTERS, k=length - 1)) + "."


def options(path: Path, seats: int, window_tokens: int, threads: int = 0) -> EngineOptions:
    """As the driver would decide, for so many seats of such a window: the same for who is compared."""
    asked = EngineOptions(window_tokens, seats, threads)
    return layout.decide(header.read(path), asked, layout.free_ram_bytes(), layout.cores()).options


def check_idle(shell: Shell) -> None:
    """Raises NotPermitted where a user's processes would be measured too."""
    at_rest = ("STOPPED", "SLEEPING", "ZOMBIE")
    busy = [view.pid for view in shell.system.snapshot().processes if view.state not in at_rest]
    if busy:
        pids = ", ".join(map(str, busy))
        hint = "`wait` for them, or `stop` them: they would be measured too"
        raise NotPermitted(f"processes run: {pids}", hint)


def model_argument(parser: Arguments) -> None:
    """`--model`, as every benchmark that needs one takes it."""
    told = "measure this model; without it one of 61 M random parameters"
    parser.add("--model", metavar="FILE", completes=("model", "file"), help=told)


def device_argument(parser: Arguments) -> None:
    """`--device`, for what is measured against others: they use the same one."""
    told = "on this one; without it, on a GPU only if the model does not fit in RAM"
    parser.add("--device", default="", metavar="NAME", help=told)


def model_path(shell: Shell, name: str | None, tell: Tell) -> Path:
    """The model that is named, or the benchmark's own. Raises ModelNotFound, ModelInvalid."""
    if name is not None:
        return shell.system.inspect(name)[0].path
    return _own_model(shell.environment, tell)


def _own_model(environ: Mapping[str, str], tell: Tell) -> Path:
    """Random weights, 61 M parameters in Q8_0: what llama.cpp computes is bit-equal in any batch."""
    from drivers.llamacpp.writer import Recipe, write_random  # deferred: imports numpy

    recipe = Recipe(
        width=512, layers=8, heads=8, kv_heads=4, ffn=1792, vocabulary=32_000, context_tokens=4096
    )
    folder = writable(find_paths(environ).state / "bench") or Path(tempfile.gettempdir())
    path = folder / f"random-61m-{zlib.crc32(repr(recipe).encode()):08x}.gguf"
    if not path.exists():
        tell("writing a model of 61 M random parameters, this once")
        with tempfile.TemporaryDirectory(dir=folder) as scratch:
            write_random(Path(scratch) / path.name, recipe)
            (Path(scratch) / path.name).replace(path)
    return path
