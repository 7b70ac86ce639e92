"""Seats: who has one in an engine's KV cache, and how a thread is put on it and taken off.

Owner: the device's dispatcher, on whose thread all of it runs (but `has_room`).
Lock: the process table's, never held while an engine is called.
Not here: who has the better claim (runqueue), when a round takes place (dispatcher), where KV goes (swap).
"""

import contextlib
from collections.abc import Mapping
from typing import TYPE_CHECKING

from kernel.device import Prompt
from kernel.errors import AdmissionRefused, CheckpointInvalid, KernelFault, LlmosError, WorkerDied
from kernel.models import Model
from kernel.process import State, Thread
from kernel.swap import SwapSpace

if TYPE_CHECKING:
    from kernel.dispatcher import Dispatcher

QUEUE_AHEAD = 2  # prompts of a job that its engine knows before they are due
DEATHS_MAX = 2  # of the engine while it opens one sequence


class Seats:
    """The seats of one device's engines."""

    def __init__(self, dispatcher: "Dispatcher", swap: SwapSpace) -> None:
        self._dispatcher = dispatcher
        self._table = dispatcher.table
        self._scheduler = dispatcher.scheduler
        self._swap = swap

    def has_room(self, model: Model, thread: Thread) -> bool:
        """Whether a runnable thread has a seat, or would get one now. With the table's lock held."""
        if thread.seat is not None or model.free_seat() is not None:
            return True
        return bool(model.seats) and self._victim(model, thread) is not None

    def fill(self, model: Model) -> bool:
        """Give free seats to those who wait, and contested ones to those with a better claim."""
        self._close_vacated(model)
        worked = False
        for _ in range(1 + 2 * len(model.seats)):  # whatever a policy says, seats do not go round for ever
            with self._table.lock:
                thread = model.queue.first_waiting() if model.host else None
                if thread is None:
                    return worked
                victim = None
                if model.free_seat() is None:
                    victim = self._victim(model, thread) if model.contested else None
                    model.contested = victim is not None
                if victim is None and not self._sit(model, thread):
                    return worked
            if victim is not None:
                self.swap_out(model, victim)
                with self._table.lock:
                    if thread not in model.queue or not self._sit(model, thread):
                        continue  # it was killed meanwhile
            self._scheduler.note("seat", thread, model=model.name, seat=thread.seat)
            self.open(model, thread, fresh=True)
            worked = True
        return worked

    @staticmethod
    def _sit(model: Model, thread: Thread) -> bool:
        """Take the lowest free seat, if there is one."""
        seat = model.free_seat()
        if seat is None:
            return False
        thread.seat, model.seats[seat] = seat, thread
        model.borrowed.pop(seat, None)
        return True

    @staticmethod
    def _victim(model: Model, waiting: Thread) -> Thread | None:
        """A seated thread that should make room: an idle one, or one that the policy says."""
        seated = [t for t in model.seats if t is not None]
        idle = [t for t in seated if t not in model.queue]
        if idle:
            return min(idle, key=lambda t: t.process.state is not State.STOPPED)  # before those who sleep
        if not seated or model.draining:  # a seat is about to be free
            return None
        return model.queue.victim(waiting, seated)

    def open(self, model: Model, thread: Thread, *, fresh: bool = False) -> None:
        """Begin, or take up again, a thread's item on its seat, a `fresh` one or the one it had."""
        while (seat := self._seat_of(model, thread)) is not None:
            try:
                if fresh and thread.tokens:
                    thread.computed = self._reopen(model, thread, seat)
                    fresh = False
                if not thread.begun:
                    self._begin_item(model, thread, seat)
                break
            except WorkerDied:
                self._suspect(thread)
                raise
            except AdmissionRefused:
                self._stand(model, thread, fresh)
                return
            except LlmosError as error:
                if not self._dispatcher.next_item(model, thread, error):
                    return
        else:
            return
        with self._table.lock:
            thread.known, thread.deaths = 1, 0
            if thread in model.queue:
                model.queue.seat(thread, True)
                thread.process.state, thread.process.waits_for = State.RUNNABLE, ""
        self.queue_ahead(model, thread)

    def _begin_item(self, model: Model, thread: Thread, seat: int) -> None:
        """Open its prompt, in a fresh context, or as the next turn of what is on the seat."""
        host, process, item = model.open_host(), thread.process, thread.items[0]
        turn = bool(thread.tokens)
        if turn:
            opened = host.feed(seat, process.prompt(item))
        else:
            opened = host.open(seat, process.prompt(item), process.sampling(item))
        with self._table.lock:
            thread.begin(opened)
            if not turn:
                thread.computed = opened.shared_tokens

    def _reopen(self, model: Model, thread: Thread, seat: int) -> int:
        """Put a thread's history on a seat; returns how many of its tokens have their KV already."""
        host, process = model.open_host(), thread.process
        sampling = process.sampling(thread.items[0])
        prompt = Prompt(
            tokens=tuple(thread.tokens),
            prompt_tokens=thread.prompt_length,
            max_tokens=process.spec.max_tokens,
            reply_bounds=thread.reply_bounds,
        )
        kv = thread.kv.read() if thread.kv is not None else None
        if kv is not None:
            try:
                restored = host.restore(seat, prompt, sampling, kv)
                thread.drop_kv()
                return restored.shared_tokens
            except CheckpointInvalid:
                pass  # of another build or model: compute it again from the tokens
        thread.drop_kv()
        return host.open(seat, prompt, sampling).shared_tokens

    def _seat_of(self, model: Model, thread: Thread) -> int | None:
        """Where a thread is to answer its next item; None if it was killed, or there is no item left."""
        with self._table.lock:
            if thread.seat is not None and not thread.items and not thread.process.claim(thread):
                self._dispatcher.retire(model, thread)
            return thread.seat

    def _stand(self, model: Model, thread: Thread, fresh: bool) -> None:
        """The engine has no KV memory for a thread now: it waits until some is freed."""
        with self._table.lock:
            model.kv_short = True
            if thread.seat is None:
                return
            self._scheduler.note("stand", thread)
            if fresh:  # nothing is open there: closing it would free nothing
                model.seats[thread.seat], thread.seat = None, None
                return
            model.vacate(thread, self._dispatcher.last_quantum)
            if thread in model.queue:
                model.queue.seat(thread, False)

    def queue_ahead(self, model: Model, thread: Thread) -> None:
        """Let the engine know the job's next prompts, so that it need not wait for us between two."""
        process = thread.process
        if process.is_chat:
            return  # its turns are not of a fresh context
        with self._table.lock:
            while len(thread.items) <= QUEUE_AHEAD and process.claim(thread, ahead=True):
                pass
        while thread.seat is not None and thread.known < len(thread.items):
            item = thread.items[thread.known]
            thread.known += 1
            model.open_host().queue(thread.seat, process.prompt(item), process.sampling(item))

    def _suspect(self, thread: Thread) -> None:
        """The engine died while it opened this sequence: a second time, and the prompt is to blame."""
        thread.deaths += 1
        if thread.deaths >= DEATHS_MAX:
            fault = KernelFault("the engine died twice on this prompt", "`dmesg` shows its last words")
            with self._table.lock:
                if thread.process.alive:
                    self._dispatcher.life.ended(thread.process, fault.exit_code, fault)

    def swap_out(self, model: Model, thread: Thread) -> None:
        """Free a seat: move its thread's KV away, or leave it to be computed again if that is cheaper."""
        self._dispatcher.drain()
        host, process = model.host, thread.process
        if thread.seat is None or host is None:
            return
        kv = None
        if thread.computed and self._swap.pays(host.info, thread.computed):
            kv = self._swap.put(process.pid, thread.index, host.dump(thread.seat))
        self._scheduler.note("swap", thread, computed_tokens=thread.computed)
        with self._table.lock:
            thread.kv = kv
            model.vacate(thread, 0)
            if thread in model.queue:
                model.queue.seat(thread, False)
                if all(each.seat is None for each in process.threads):
                    process.state = State.SWAPPED
        self._close_vacated(model)

    def copy(self, model: Model, source: Thread, thread: Thread) -> None:
        """Give a thread another's KV: within the engine if a seat is free there, or as if swapped out.

        What cannot be had is computed again, also when the engine dies of it.
        """
        host, blob = model.host, source.kv.read() if source.kv is not None else None
        if host is not None and source.seat is not None and source.computed:
            if self._copy_seat(model, source, thread):
                return
            if self._swap.pays(host.info, source.computed):
                with contextlib.suppress(LlmosError):
                    blob = host.dump(source.seat)
        if blob is not None:
            thread.kv = self._swap.put(thread.process.pid, thread.index, blob)

    def _copy_seat(self, model: Model, source: Thread, thread: Thread) -> bool:
        with self._table.lock:
            if not self._sit(model, thread):
                return False
        assert source.seat is not None and thread.seat is not None
        try:
            model.open_host().fork(source.seat, thread.seat, thread.process.sampling(thread.item))
            self.charge(model, model.open_host().borrowed_tokens())
        except LlmosError as error:
            with self._table.lock:
                model.kv_short |= isinstance(error, AdmissionRefused)
                model.vacate(thread, 0)
            return False
        with self._table.lock:
            thread.computed, thread.known = source.computed, 1
        return True

    def charge(self, model: Model, borrowed: Mapping[int, int]) -> None:
        """Each byte of KV that sequences hold together is one process's."""
        if borrowed or model.borrowed:
            with self._table.lock:
                model.borrowed = dict(borrowed)

    def _close_vacated(self, model: Model) -> None:
        """Tell the engine of the seats that are free again."""
        shared = model.to_close and model.borrowed
        while model.to_close:
            model.open_host().close(model.to_close[0])
            with self._table.lock:
                model.to_close.pop(0)
                model.kv_short = False
        if shared:
            self.charge(model, model.open_host().borrowed_tokens())
