"""The process table.

Owner: the kernel. Lock: `lock` guards the table and all that hangs on its rows; it is the first in the lock
order, and never held while a driver runs or a file is written.
Not here: what a row is (process).
"""

import threading
from collections import deque
from collections.abc import Iterator

from kernel.clock import Clock
from kernel.config import KernelConfig
from kernel.errors import AdmissionRefused, NotPermitted, ProcessNotFound
from kernel.process import Process, State, Thread
from kernel.spec import ProcessSpec


class ProcessTable:
    """PID to process. PID 1 is LLMOS itself and has no row."""

    def __init__(self, config: KernelConfig) -> None:
        self.config = config
        self.lock = threading.RLock()
        self.changed = threading.Condition(self.lock)  # notified when a process or a model changes state
        self._rows: dict[int, Process] = {}  # guarded by lock
        self._reaped: deque[int] = deque()  # guarded by lock; oldest first
        self._next_pid = 2  # guarded by lock

    def __iter__(self) -> Iterator[Process]:
        """The rows that `ps` lists: not reaped."""
        return (process for process in self._rows.values() if not process.reaped)

    def users_of(self, model: str) -> list[Process]:
        """Those of a model that have not ended."""
        return [process for process in self._rows.values() if process.model == model and process.alive]

    def add(self, spec: ProcessSpec, model: str, ppid: int, clock: Clock) -> Process:
        """A new row. Raises AdmissionRefused when the table is full."""
        if len(self._rows) - len(self._reaped) >= self.config.processes_max:
            raise AdmissionRefused(f"the process table is full ({self.config.processes_max} processes)")
        now_s = clock.now_s()
        process = Process(self._next_pid, ppid, spec, model, spec.nice, now_s, clock.wall_s())
        threads = min(spec.threads, max(1, spec.items))
        process.threads = tuple(Thread(process, index) for index in range(threads))
        process.open_item()
        self._next_pid += 1
        self._rows[process.pid] = process
        return process

    def get(self, pid: int) -> Process:
        """Raises ProcessNotFound."""
        process = self._rows.get(pid)
        if process is None:
            hint = "1 is LLMOS itself" if pid == 1 else "`ps -a` lists processes"
            raise ProcessNotFound(f"no process {pid}", hint)
        return process

    def alive(self, pid: int) -> Process:
        """Raises ProcessNotFound, NotPermitted (it has ended)."""
        process = self.get(pid)
        if not process.alive:
            raise NotPermitted(f"process {pid} has ended (exit code {process.exit_code})")
        return process

    def reap(self, process: Process) -> None:
        """Take an ended process off the list; the last ones are kept for `finished`."""
        if not process.reaped:
            process.reaped = True
            self._reaped.append(process.pid)
            if len(self._reaped) > self.config.finished_max:
                del self._rows[self._reaped.popleft()]

    def finished(self) -> Iterator[Process]:
        return (self._rows[pid] for pid in self._reaped)

    def check_integrity(self) -> None:
        """Raises AssertionError."""
        for process in self._rows.values():
            assert (process.exit_code is not None) == (process.state is State.ZOMBIE), process
            assert process.alive or not any(t.seat is not None for t in process.threads), process
            claimed = [item for thread in process.threads for item in thread.items]
            finished = set(range(process.item)) | set(process.early or ())
            assert len(set(claimed)) == len(claimed) and finished.isdisjoint(claimed), process
            assert process.items_done <= process.items, process
