"""Process control: signals, a chat's turns, swaps by hand, nice; and the weights of groups, and the policy.

Owner: the kernel. Lock: the process table's, never held while a dispatcher is waited for.
Not here: how a process begins and ends (kernel), how it goes on from a file (recovery).
"""

import contextlib
from typing import TYPE_CHECKING

from kernel.errors import LlmosError, NotPermitted, UsageError
from kernel.explain import held_out
from kernel.fairness import weight_of
from kernel.policy import policy_named
from kernel.process import Process, Signal, State
from kernel.spec import check_nice

if TYPE_CHECKING:
    from kernel.kernel import Kernel


class Control:
    """What users do to processes that are there. Raises as `Syscalls` says."""

    def __init__(self, kernel: "Kernel") -> None:
        self.kernel = kernel

    def signal(self, pid: int, signal: Signal) -> None:
        if signal is Signal.USR1:
            self.kernel.recovery.checkpoint(pid)
            return
        with self.kernel.table.lock:
            process = self.kernel.table.alive(pid)
            if signal is Signal.STOP:
                self._stop(process)
            elif signal is Signal.CONT:
                if process.state is State.STOPPED:
                    self._resume(process)
            else:
                self.kernel.ended(process, 128 + signal)

    def _stop(self, process: Process) -> None:
        if process.state is State.STOPPED:
            return
        model, dispatcher = self.kernel.place(process)
        for thread in process.threads:
            dispatcher.scheduler.sleep(thread, model)
        process.state = State.STOPPED
        dispatcher.interrupt()
        self.kernel.rests(process)

    def _resume(self, process: Process) -> None:
        """Let it run, from wherever it is, as soon as it is admitted: its model may have gone meanwhile."""
        self.kernel.admission.enter(process)
        self.kernel.changed(process)

    def _chat(self, pid: int) -> Process:
        process = self.kernel.table.alive(pid)
        if not process.is_chat:
            raise NotPermitted(f"process {pid} is not a chat")
        return process

    def say(self, pid: int, text: str) -> int:
        if not text.strip():
            raise UsageError("there is nothing in what was said")
        with self.kernel.table.lock:
            process = self._chat(pid)
            if process.hung_up:
                raise NotPermitted(f"process {pid} has been told that nothing more will be said")
            process.turns = process.turns or []
            process.turns.append(text)
            if process.state is State.SLEEPING:
                self.kernel.admission.enter(process)
            self.kernel.touched(process)
            return process.items - 1

    def hang_up(self, pid: int) -> None:
        with self.kernel.table.lock:
            process = self._chat(pid)
            process.hung_up = True
            self.kernel.touched(process)
            if process.is_over:
                self.kernel.place(process)[1].exit(process)

    def cut(self, pid: int) -> None:
        with self.kernel.table.lock:
            process = self._chat(pid)
            (model, dispatcher), thread = self.kernel.place(process), process.threads[0]
        self.kernel.on_dispatcher(model, lambda: dispatcher.cut(model, thread))

    def swap_out(self, pid: int) -> int:
        with self.kernel.table.lock:
            process = self.kernel.table.alive(pid)
            model, dispatcher = self.kernel.place(process)
            if process.state not in (State.STOPPED, State.SLEEPING):
                for thread in process.threads:
                    dispatcher.scheduler.sleep(thread, model)
                process.state = State.SWAPPED
            self.kernel.rests(process)
            threads = process.threads

        def move() -> None:
            for thread in threads:
                dispatcher.seats.swap_out(model, thread)

        try:
            self.kernel.on_dispatcher(model, move)
        except LlmosError:
            with contextlib.suppress(LlmosError):
                self.swap_in(pid)  # it was not to be: then nothing has happened
            raise
        with self.kernel.table.lock:
            return sum(thread.kv.size_bytes for thread in threads if thread.kv is not None)

    def swap_in(self, pid: int) -> None:
        with self.kernel.table.lock:
            process = self.kernel.table.alive(pid)
            model = self.kernel.models[process.model]
            if held_out(process, model):
                self._resume(process)

    def renice(self, pid: int, nice: int) -> int:
        check_nice(nice)
        with self.kernel.table.lock:
            process = self.kernel.table.alive(pid)
            old, process.nice = process.nice, nice
            if process.group is not None and not process.spec.group:
                process.group.weight = weight_of(nice)
            model, dispatcher = self.kernel.place(process)
            for thread in process.threads:
                dispatcher.scheduler.reweight(thread, model)
            dispatcher.interrupt()
        return old

    def set_policy(self, name: str) -> str:
        policy = policy_named(name)
        with self.kernel.table.lock:
            old, self.kernel.policy = self.kernel.policy, policy
            for model in self.kernel.models.values():
                self.kernel.dispatcher_of(model).scheduler.set_policy(policy, model)
            for dispatcher in self.kernel.dispatchers.values():
                dispatcher.interrupt()
                dispatcher.wake_up()
        return old.name

    def set_group(self, name: str, weight: float) -> None:
        if not (name and 0.001 <= weight <= 1000.0):
            raise UsageError("a group has a name, and a weight from 0.001 to 1000; a process at nice 0 has 1")
        with self.kernel.table.lock:
            group = self.kernel.group_named(name)
            assert group is not None
            group.weight = weight
            for process in [p for p in self.kernel.table if p.alive and p.group is group]:
                model, dispatcher = self.kernel.place(process)
                for thread in process.threads:
                    dispatcher.scheduler.reweight(thread, model)
            for dispatcher in self.kernel.dispatchers.values():
                dispatcher.interrupt()
