"""`bench restore`: what a checkpoint and a swap save, against computing the same tokens again.

One process after another reads a prompt of its own (so that nothing can be shared), draws a token, is
saved, swapped out and in, killed, and loaded from its file. Each time counts to the next token:
  prefill   from spawn to the first token;
  restore   from the call, file and checksums included;
  swap      out, and in again.
The checkpoint's bytes are also written to the same disk as they are, for comparison.
"""

import argparse
import os
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from kernel.errors import KernelFault
from kernel.syscall import Signal
from kernel.units import human_bytes
from plugins.benchmarks.command import Report, benchmark
from plugins.benchmarks.machine import Machine, booted, check_idle, model_argument, model_path, options
from plugins.benchmarks.progress import Tell
from plugins.benchmarks.spread import Spread
from plugins.benchmarks.throughput import positive
from shell.registry import Arguments
from shell.render import Column
from shell.session import Shell

SIZES = (1024, 4096, 16_384)
ANSWER_TOKENS = 200  # more than are drawn while one is looked at
PATIENCE_S = 600.0
AIM_RATIO = 20.0  # at 4,096 tokens


@dataclass(frozen=True, slots=True)
class Sample:
    """One process. Seconds."""

    prefill_s: float
    save_s: float
    restore_s: float
    swap_out_s: float
    swap_in_s: float
    raw_write_s: float
    file_bytes: int


@dataclass(frozen=True, slots=True)
class Row:
    """All processes of one size. The ratios are of times measured on the same process."""

    prompt_tokens: int
    samples: int
    prefill_s: Spread
    restore_s: Spread
    prefill_per_restore: Spread
    swap_s: Spread
    prefill_per_swap: Spread
    save_s: Spread
    raw_write_per_save: Spread
    file_bytes: int


class Bench:
    """A machine and a folder for its files."""

    def __init__(self, machine: Machine, folder: Path) -> None:
        self.machine = machine
        self.system = machine.system
        self.file = folder / "bench.ckpt"
        self.raw = folder / "raw"

    def sample(self, number: int, tokens: int) -> Sample:
        prompt = f"{number:08d}" + "x" * (tokens - 8)
        pid = self.system.spawn(self.machine.spec(prompt, ANSWER_TOKENS, nice=-20))
        self._wait_tokens(pid, 1)
        view = self.system.process(pid)
        assert view.first_token_s is not None
        self.system.signal(pid, Signal.STOP)
        begin_s = time.monotonic()
        file_bytes = self.system.save(pid, self.file)
        save_s = time.monotonic() - begin_s
        raw_write_s = self._write_raw()
        swap_out_s, swap_in_s = self._swap(pid)
        self.machine.end([pid])
        return Sample(
            view.first_token_s, save_s, self._restore(), swap_out_s, swap_in_s, raw_write_s, file_bytes
        )

    def _swap(self, pid: int) -> tuple[float, float]:
        begin_s = time.monotonic()
        self.system.swap_out(pid)
        out_s = time.monotonic() - begin_s
        drawn = self.system.process(pid).output_tokens
        begin_s = time.monotonic()
        self.system.signal(pid, Signal.CONT)
        self._wait_tokens(pid, drawn + 1)
        return out_s, time.monotonic() - begin_s

    def _restore(self) -> float:
        begin_s = time.time()
        pid = self.system.restore(self.file)
        drawn = self.system.process(pid).output_tokens
        self._wait_tokens(pid, drawn + 1)
        view = self.system.process(pid)
        assert view.first_token_s is not None
        self.machine.end([pid])
        return view.started_s - begin_s + view.first_token_s

    def _write_raw(self) -> float:
        blob = self.file.read_bytes()
        begin_s = time.monotonic()
        with self.raw.open("wb") as file:
            file.write(blob)
            file.flush()
            os.fsync(file.fileno())
        return time.monotonic() - begin_s

    def _wait_tokens(self, pid: int, count: int) -> None:
        deadline_s = time.monotonic() + PATIENCE_S
        while (view := self.system.process(pid)).output_tokens < count:
            if view.exit_code is not None or time.monotonic() > deadline_s:
                raise KernelFault(f"a process says nothing: {view.error or view.waits_for}")
            time.sleep(0.0005)


def measure(path: Path, sizes: Sequence[int], repeat: int, tell: Tell) -> list[Row]:
    """One row for each size."""
    window_tokens = max(sizes) + ANSWER_TOKENS + 56
    tell("restore: loading")
    with (
        tempfile.TemporaryDirectory() as folder,
        booted(path, options(path, 2, window_tokens)) as machine,
    ):
        bench, rows, number = Bench(machine, Path(folder)), [], 0
        for tokens in sizes:
            samples = []
            for turn in range(repeat):
                tell(f"restore: {tokens} tokens, {turn + 1} of {repeat}")
                number += 1
                samples.append(bench.sample(number, tokens))
            rows.append(_row(tokens, samples))
        return rows


def _row(tokens: int, samples: Sequence[Sample]) -> Row:
    return Row(
        prompt_tokens=tokens,
        samples=len(samples),
        prefill_s=Spread.of([s.prefill_s for s in samples]),
        restore_s=Spread.of([s.restore_s for s in samples]),
        prefill_per_restore=Spread.of([s.prefill_s / s.restore_s for s in samples]),
        swap_s=Spread.of([s.swap_out_s + s.swap_in_s for s in samples]),
        prefill_per_swap=Spread.of([s.prefill_s / (s.swap_out_s + s.swap_in_s) for s in samples]),
        save_s=Spread.of([s.save_s for s in samples]),
        raw_write_per_save=Spread.of([s.raw_write_s / s.save_s for s in samples]),
        file_bytes=samples[0].file_bytes,
    )


def _arguments(parser: Arguments) -> None:
    model_argument(parser)
    parser.add(
        "--tokens", type=positive, action="append", metavar="N", help="of the prompt; 1024, 4096 and 16384"
    )
    parser.add("--repeat", type=positive, default=3, metavar="R", help="processes of each size; 3")


def _run(shell: Shell, args: argparse.Namespace, tell: Tell) -> Report[Row]:
    check_idle(shell)
    path = model_path(shell, args.model, tell)
    rows = measure(path, args.tokens or SIZES, args.repeat, tell)
    value = {"model": str(path), "aim_ratio": AIM_RATIO, "rows": [asdict(row) for row in rows]}
    head = "milliseconds to the next token; ratios to the prompt computed again, median (spread)"
    return Report(value, _COLUMNS, rows, head)


def _ms(spread: Spread) -> str:
    return f"{1000 * spread.median:.0f}"


_COLUMNS: list[Column[Row]] = [
    Column("TOKENS", lambda row: str(row.prompt_tokens), right=True, keep=99),
    Column("PREFILL", lambda row: _ms(row.prefill_s), right=True, keep=90),
    Column("RESTORE", lambda row: _ms(row.restore_s), right=True, keep=90),
    Column("RATIO", lambda row: row.prefill_per_restore.text(1), right=True, keep=98),
    Column("SWAP", lambda row: _ms(row.swap_s), right=True, keep=80),
    Column("RATIO", lambda row: row.prefill_per_swap.text(1), right=True, keep=85),
    Column("SAVE", lambda row: _ms(row.save_s), right=True, keep=70),
    Column("OF DISK SPEED", lambda row: row.raw_write_per_save.text(2), right=True, keep=60),
    Column("FILE", lambda row: human_bytes(row.file_bytes), right=True, keep=50),
]

SPEC = benchmark(
    "restore",
    "a checkpoint and a swap against computing the same tokens again",
    _run,
    _arguments,
    ("bench restore --tokens 4096",),
)
