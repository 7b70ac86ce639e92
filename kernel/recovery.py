"""Recovery: processes that outlive the kernel, in checkpoints and in the journal.

Owner: the kernel. Lock: the process table's, never held while a file is read or written.
Not here: the formats (checkpoint, journal).
"""

import os
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from kernel.errors import AdmissionRefused, CheckpointInvalid, KernelFault, LlmosError, NotPermitted
from kernel.models import Model, ModelState
from kernel.process import Process, Signal, Thread
from kernel.spec import ProcessSpec, check_spec

if TYPE_CHECKING:
    from kernel.checkpoint import Checkpoint
    from kernel.journal import Journal
    from kernel.kernel import Kernel
    from kernel.orphans import Orphan


class Recovery:
    """Saves, restores, and finds what an earlier LLMOS left behind."""

    def __init__(self, kernel: "Kernel") -> None:
        self.kernel = kernel
        self.journal: Journal | None = None  # of this boot; opened with its first process
        self._journal_failed = False

    def restore(self, path: Path, sink: str) -> Process:
        from kernel import checkpoint  # deferred: a session that saves nothing need not pay for it

        saved = checkpoint.read(path, self.kernel.parts.key)
        return self.revive(replace(saved, spec=replace(saved.spec, sink=sink)), str(path))

    def revive(
        self,
        saved: "Checkpoint",
        origin: str,
        nice: int | None = None,
        ppid: int = 1,
        exit_code: int | None = None,
        uid: str = "",
    ) -> Process:
        """Continue what was saved as a new process; its output begins with what it had said.

        With an exit code it had ended already: only its output has to be written.
        """
        from kernel import checkpoint

        spec = saved.spec if nice is None else replace(saved.spec, nice=nice)
        spec = replace(spec, wait=True)  # it was admitted once
        check_spec(spec)
        entry = self.kernel.residency.resolve(spec.model)
        with self.kernel.table.lock:
            known = self.kernel.models.get(entry.name)
            digest = known.digest if known is not None and known.state is not ModelState.FAILED else ""
        if (digest or checkpoint.model_digest(entry.path)) != saved.model_digest:
            raise CheckpointInvalid(
                f"{origin} was saved with another file than {entry.path}",
                f"put the model that it was saved with in place of {entry.name}",
            )
        model = self.kernel.residency.want(entry, self.kernel.parts.options)
        with self.kernel.table.lock:
            model = self.kernel.residency.check_wanted(model)
            process = self.kernel.new_process(spec, entry.name, ppid)
            self._fill(process, saved)
            threads = process.threads
        for thread, state in zip(threads, saved.threads, strict=False):
            if state.kv is not None and process.alive:
                thread.kv = self.kernel.swap.put(process.pid, thread.index, state.kv)
        self.kernel.begin(process, model, exit_code, uid)
        return process

    @staticmethod
    def _fill(process: Process, saved: "Checkpoint") -> None:
        """Give a fresh row the progress that was saved. With the table's lock held."""
        process.prompt_tokens, process.output_tokens = saved.prompt_tokens, saved.output_tokens
        process.turns, process.hung_up = list(saved.turns) or None, saved.hung_up
        replies = dict(saved.replies)
        while process.item in replies:
            process.recall(replies.pop(process.item))
        process.early = replies or None
        missing = range(len(process.threads), len(saved.threads))
        process.threads += tuple(Thread(process, index) for index in missing)
        for thread, state in zip(process.threads, saved.threads, strict=False):
            thread.tokens = list(state.tokens)
            thread.bounds, thread.begun = (*state.reply_bounds, state.prompt_length), state.begun
            if state.item < process.items:
                thread.items = (state.item,)
                process.say(thread, state.reply)

    def write_down(self, process: Process, model: Model, uid: str) -> None:
        """Opens this boot's journal with its first process: a session that runs nothing needs none."""
        folder = self.kernel.parts.journal
        if folder is None or self._journal_failed:
            return
        import sqlite3

        from kernel.journal import Journal

        try:
            if self.journal is None:
                self.journal = Journal(folder, self.kernel.table.lock, self._journal_ails)
        except (OSError, sqlite3.Error, RuntimeError) as error:
            self._journal_failed = True
            why = getattr(error, "strerror", None) or error
            self._journal_ails(f"no journal in {folder}: {why}: a crash would lose what runs")
            return
        self.journal.spawned(process, model.info.path, uid, model.digest)

    def _journal_ails(self, text: str) -> None:
        self.kernel.alert("journal", text)

    def orphans(self) -> "tuple[Orphan, ...]":
        if self.kernel.parts.journal is None or not os.access(self.kernel.parts.journal, os.R_OK | os.X_OK):
            return ()
        from kernel import orphans

        try:
            return tuple(orphans.find(self.kernel.parts.journal, self._journal_ails))
        except MemoryError:
            raise AdmissionRefused("not enough memory to read what an earlier LLMOS has left") from None

    def resume(self, orphan: "Orphan") -> Process:
        from kernel import orphans

        process = None
        try:
            with orphans.claimed(orphan):
                process = self.revive(
                    orphan.state,
                    f"process {orphan.pid} of an earlier LLMOS",
                    orphan.nice,
                    exit_code=orphan.exit_code,
                    uid=orphan.uid,
                )
                if self.journal is not None and not self.journal.flush():
                    raise LlmosError("the journal cannot be written")  # it stays safe in the other
        except LlmosError:
            if process is not None:  # it is still in the other: it must not go on twice
                self._undo(process, 128 + Signal.KILL)
            raise
        return process

    def _undo(self, process: Process, exit_code: int) -> None:
        with self.kernel.table.lock:
            if process.alive:
                self.kernel.ended(process, exit_code)
            self.kernel.table.reap(process)
            self.kernel.touched(process)

    def freeze(self) -> None:
        """From now on, what ends is to be resumed."""
        if self.journal is not None:
            self.journal.freeze()

    def forget_orphans(self) -> None:
        from kernel import orphans

        if self.kernel.parts.journal is not None:
            orphans.forget(self.kernel.parts.journal)

    def save(self, pid: int, path: Path) -> int:
        from kernel import checkpoint

        taken = self._taken(pid)
        return checkpoint.write(taken, path, self.kernel.parts.key)

    def checkpoint(self, pid: int) -> None:
        """Save a process under a name of its own, in the folder for that. Raises as `save`, NotPermitted."""
        from datetime import UTC, datetime

        kernel = self.kernel
        if kernel.parts.checkpoints is None:
            raise NotPermitted("there is no folder for checkpoints", "`save PID FILE`")
        try:
            kernel.parts.checkpoints.mkdir(mode=0o700, parents=True, exist_ok=True)
        except OSError as error:
            raise LlmosError(f"cannot make {kernel.parts.checkpoints}: {error.strerror}") from error
        at = datetime.fromtimestamp(kernel.clock.wall_s(), UTC)
        path = kernel.parts.checkpoints / f"{pid}-{at:%Y%m%dT%H%M%S.%f}.ckpt"
        size = self.save(pid, path)
        kernel.log("info", "save", f"process {pid}: {size} bytes in {path}")

    def fork(self, pid: int, seed: int | None, sink: str) -> Process:
        """A copy of a process that goes on beside it, KV and all; with `seed` it draws other tokens."""
        with self.kernel.table.lock:
            parent = self.kernel.table.alive(pid)
            model = self.kernel.models[parent.model]
            command = f"fork {pid}: {parent.spec.command}"
            spec = replace(parent.spec, sink=sink, command=command, nice=parent.nice, wait=True)
        if seed is not None:
            spec = replace(spec, sampling=replace(spec.sampling, seed=seed))
        process = self.kernel.on_dispatcher(model, lambda: self._twin(parent, model, spec))
        self.kernel.begin(process, model)
        return process

    def _twin(self, parent: Process, model: Model, spec: ProcessSpec) -> Process:
        """On the dispatcher's thread, so that tokens and KV agree: a row like another's."""
        taken, dispatcher = self._take(parent, model, "", kv=False), self.kernel.dispatcher_of(model)
        sources = self._at_work(parent)
        with self.kernel.table.lock:
            self.kernel.table.alive(parent.pid)
            process = self.kernel.new_process(spec, parent.model, parent.pid)
            self._fill(process, taken)
        try:
            for source, thread in zip(sources, process.threads, strict=False):
                dispatcher.seats.copy(model, source, thread)
        except Exception:  # no memory, say: it never was
            self._undo(process, KernelFault.exit_code)
            raise
        return process

    @staticmethod
    def _at_work(process: Process) -> list[Thread]:
        """Its threads that have something to go on from."""
        return [thread for thread in process.threads if thread.items or (thread.tokens and process.is_chat)]

    def _taken(self, pid: int) -> "Checkpoint":
        """Raises ProcessNotFound, NotPermitted (it has ended)."""
        from kernel import checkpoint

        with self.kernel.table.lock:
            process = self.kernel.table.alive(pid)
            model = self.kernel.models[process.model]
        digest = model.digest or checkpoint.model_digest(model.info.path)
        return self.kernel.on_dispatcher(model, lambda: self._take(process, model, digest))

    def _take(self, process: Process, model: Model, digest: str, *, kv: bool = True) -> "Checkpoint":
        """A checkpoint of a process; on its dispatcher's thread, so that tokens and KV agree."""
        from kernel import checkpoint

        self.kernel.dispatcher_of(model).drain()
        states = [(each, self._kv(model, each) if kv else None) for each in self._at_work(process)]
        with self.kernel.table.lock:
            self.kernel.table.alive(process.pid)
            return checkpoint.Checkpoint(
                spec=process.spec,
                model_digest=digest,
                replies={**dict(enumerate(process.replies)), **(process.early or {})},
                threads=tuple(
                    checkpoint.SavedThread(
                        item=thread.item,
                        begun=thread.begun,
                        prompt_length=thread.prompt_length,
                        reply_bounds=thread.reply_bounds,
                        tokens=tuple(thread.tokens),
                        reply=thread.reply,
                        kv=state,
                    )
                    for thread, state in states
                ),
                prompt_tokens=process.prompt_tokens,
                output_tokens=process.output_tokens,
                turns=tuple(process.turns or ()),
                hung_up=process.hung_up,
            )

    @staticmethod
    def _kv(model: Model, thread: Thread) -> bytes | None:
        """A thread's KV state, if it has one."""
        if thread.kv is not None:
            return thread.kv.read()
        if model.host is None or thread.seat is None or not thread.computed:
            return None
        return model.host.dump(thread.seat)
