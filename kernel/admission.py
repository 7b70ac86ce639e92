"""Admission: who is let in, and who waits.

A process is let in when what it declared is free and its model is open, or the bytes to open it are free.
Who waits holds nothing, so no two can wait for one another. There is one line, by nice value and then
arrival; one passes another only if it asks for nothing that the other asks for.
Owner: the kernel. Lock: the process table's, held by the caller of every method.
Not here: the amounts (memory), which model makes room (eviction), how one is opened and closed (residency).
"""

import math
import threading
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING

from kernel.errors import AdmissionRefused
from kernel.eviction import Eviction
from kernel.memory import Asks, Claim, Pool
from kernel.models import Model, ModelState
from kernel.process import Process, State
from kernel.spec import ProcessSpec

if TYPE_CHECKING:
    from kernel.kernel import Kernel

DECLARED = "declared"
"""The ledger's kind for what processes say they need."""

RESIDENT = (ModelState.LOADING, ModelState.LOADED, ModelState.QUARANTINED)


def owner_of(pid: int) -> str:
    """A process's name in the ledger."""
    return f"process {pid}"


def needs_of(spec: ProcessSpec) -> dict[str, int]:
    """What a specification declares, by pool; processors in thousandths, never less than was said."""
    milli = {"cpus": spec.cpus, "gpus": spec.gpus}
    needs = {pool: math.ceil(round(count * 1000, 6)) for pool, count in milli.items()}
    needs["ram"] = spec.mem_bytes
    return {pool: amount for pool, amount in needs.items() if amount}


@dataclass(slots=True, eq=False)
class Ticket:
    """A place in the line: a process's, or of a model that somebody asked to load."""

    model: Model
    process: Process | None
    needs: Mapping[str, int]  # declared, and not held yet
    order: int
    since_s: float
    waits: bool  # a person who does not wait has no patience either
    room_coming: bool = False  # models are being evicted for it

    @property
    def key(self) -> tuple[int, int]:
        return (self.process.nice if self.process else 0), self.order


class Admission:
    """The line of those who wait, and the rules by which it moves."""

    def __init__(self, kernel: "Kernel") -> None:
        self.kernel = kernel
        self.ledger = kernel.ledger
        self._eviction = Eviction(kernel)
        self.line: dict[Ticket, None] = {}
        self._of_pid: dict[int, Ticket] = {}
        self._blocked: dict[str, tuple[int, int]] = {}  # pool -> key of the first who waits for some of it
        self._claimant: Ticket | None = None  # the first whose model waits for memory
        self._order = 0
        self._settling = self._again = False
        self._watch: threading.Thread | None = None  # while somebody waits

    def add_processors(self) -> None:
        resources = self.kernel.parts.resources
        kinds = [dispatcher.device.kind for dispatcher in self.kernel.dispatchers.values()]
        gpus = sum(kind in ("cuda", "metal") for kind in kinds) if resources.gpus is None else resources.gpus
        for name, count in (("cpus", resources.cpus), ("gpus", gpus)):
            if count:
                self.ledger.add_pool(Pool(name, count * 1000, counted=True))

    # Asking

    def check(self, spec: ProcessSpec, model: Model) -> None:
        """Raises AdmissionRefused: it can never be, or not now and it is not to wait."""
        self._check_possible(model, needs_of(spec))
        if not spec.wait:
            self._check_now(spec, model)

    def _check_now(self, spec: ProcessSpec, model: Model) -> None:
        key, asks = (spec.nice, self._order), self._asks(model, needs_of(spec))
        ticket = self._ticket(model, None, waits=False)
        ahead, room = self._ahead_of(key, asks), self._eviction.room(self.ledger.short(asks), ticket)
        if ahead is not None or room is None or self._closed(model, key):
            self.forget(model)
            raise self._refusal(model, asks, ahead, "the process")

    def enter(self, process: Process) -> None:
        """Let a process run, or have it wait: after its spawn, and after each stop and sleep.

        Only a newcomer can be refused: who has run and finds his model gone has work to lose.
        """
        model, waits = self.kernel.models[process.model], process.spec.wait or process.admitted
        ticket = self._of_pid.get(process.pid) or self._ticket(model, process, waits=waits)
        asks = self._asks(model, ticket.needs)
        if not process.admitted:
            model.usage.count(self.kernel.clock.now_s())
        ahead = self._ahead_of(ticket.key, asks)
        if ahead is None and self._let_in(ticket, asks):
            self._leave_line(ticket)
            return
        self.line[ticket] = None
        self._of_pid[process.pid] = ticket
        process.state, process.waits_for = State.NEW, self._waits_for(asks, model)
        if ahead is None and asks:
            self.settle()
        if ticket in self.line and not waits and not ticket.room_coming:
            refused = self._refusal(model, asks, ahead, "the process")
            self.kernel.ended(process, refused.exit_code, refused)

    def load(self, model: Model, *, wait: bool) -> None:
        """Open a model as soon as there is room. Raises AdmissionRefused; then its record is gone."""
        if model.state is not ModelState.WAITING:
            return
        self._check_possible(model, {})
        asks = self._asks(model, {})
        ticket = self._ticket(model, None, waits=wait)
        ahead = self._ahead_of(ticket.key, asks)
        self.line[ticket] = None
        self.settle()
        if ticket in self.line and not wait and not ticket.room_coming:
            refused = self._refusal(model, asks, ahead, model.name)
            self._leave_line(ticket)
            self.forget(model)
            self.settle()
            raise refused

    def left(self, process: Process) -> None:
        """A process has ended: what it held goes to who waits."""
        ticket = self._of_pid.get(process.pid)
        if ticket is not None:
            self._leave_line(ticket)
        held = self.ledger.release_kind(owner_of(process.pid), DECLARED) if process.admitted else 0
        model = self.kernel.models[process.model]
        self.forget(model)
        if self.line and (ticket or held or not len(model.queue)):
            self.settle_soon()

    def dropped(self, model: Model) -> None:
        """A model is wanted no more: nobody waits for it to be loaded."""
        for ticket in [t for t in self.line if t.model is model and t.process is None]:
            self._leave_line(ticket)

    def settle_soon(self) -> None:
        """`settle`; a kernel that is stepped by hand does it at its next step, not in the middle of one."""
        if self.kernel.parts.threaded:
            self.settle()
        elif self.line:
            self.kernel.dispatcher_of(next(iter(self.line)).model).submit(self.settle)

    # The line

    def settle(self) -> None:
        """Something was freed, or somebody came: let in who can be let in, in order."""
        with self.kernel.table.lock:
            if self._settling or not self.line or self.kernel.down:
                self._again = True
                return
            self._settling = self._again = True
            try:
                while self._again:
                    self._again = False
                    self._pass()
            finally:
                self._settling = False
            if self.line and self._watch is None and self.kernel.parts.threaded:
                watch = threading.Thread(target=self._look_after, name="admission", daemon=True)
                with suppress(RuntimeError):  # no more threads: whoever settles next tries again
                    watch.start()
                    self._watch = watch

    def _pass(self) -> None:
        self._blocked, self._claimant = {}, None
        for ticket in sorted(self.line, key=lambda ticket: ticket.key):
            process, model = ticket.process, ticket.model
            if ticket not in self.line or (process and process.state is State.STOPPED):
                continue
            if model.state not in RESIDENT and model.device.pool in self._blocked:
                asks = ticket.needs  # its memory it cannot have yet; the line may be long
            elif self._let_in(ticket, asks := self._asks(model, ticket.needs)):
                self._leave_line(ticket)
                continue
            if self._claimant is None and model.state is ModelState.WAITING:
                self._claimant = ticket
            for pool in asks:
                self._blocked.setdefault(pool, ticket.key)

    def _let_in(self, ticket: Ticket, asks: Asks) -> bool:
        return not asks.keys() & self._blocked.keys() and self._try(ticket, asks)

    def _try(self, ticket: Ticket, asks: Asks) -> bool:
        """Let one in, if there is room for it now; begin to make room if not."""
        process, model = ticket.process, ticket.model
        if model.state is ModelState.EVICTING or (process and self._closed(model, ticket.key)):
            return False
        if short := self.ledger.short(asks):
            self._make_room(short, ticket)
            return False
        claims: list[Claim] = []
        if process is not None:
            owner = owner_of(process.pid)
            claims = [(pool, owner, {DECLARED: size}) for pool, size in ticket.needs.items()]
        opens = model.state is ModelState.WAITING
        if opens:
            claims.append((model.device.pool, model.name, model.estimate_sizes()))
        try:
            self.ledger.claim_all(claims)
        except AdmissionRefused:  # measured memory: somebody took it this moment
            return False
        if process is not None:
            process.admitted = True
        if opens:
            self.kernel.residency.open(model)
        if process is not None and process.alive:  # the load may have failed already
            self.kernel.let_run(process, model)
        return True

    def _look_after(self) -> None:
        """Other programs free memory without telling, and patience comes to an end."""
        while True:
            self.kernel.clock.sleep(self.kernel.config.waiting_poll_s)
            with self.kernel.table.lock:
                if not self.line or self.kernel.down:
                    self._watch = None
                    return
                self.settle()

    # Making room

    def _make_room(self, short: Asks, ticket: Ticket) -> None:
        """Evict idle models, if that is enough; no model goes for nothing."""
        victims = self._eviction.room(short, ticket)
        ticket.room_coming = victims is not None
        for model in victims or ():
            self.kernel.residency.begin_eviction(model)

    def _closed(self, model: Model, key: tuple[int, int]) -> bool:
        """Whether a model takes nobody new: it is to run dry for one who has waited too long."""
        claimant = self._claimant
        if claimant is None or claimant.model is model or key < claimant.key or claimant not in self.line:
            return False
        asks = self._asks(claimant.model, {})
        return self._eviction.closes(model, claimant, self.ledger.short(asks))

    # Words and small parts

    def explain(self, process: Process) -> tuple[str, ...] | None:
        """For `why`: what it waits for, and behind whom; None if it does not wait here."""
        ticket = self._of_pid.get(process.pid)
        if ticket is None:
            return None
        asks = self._asks(ticket.model, ticket.needs)
        lines = [f"It waits to be admitted: {process.waits_for}."]
        refused = self.ledger.refusal(asks, "it")
        if refused is not None:
            lines.append(f"{refused.message[0].upper()}{refused.message[1:]}; {refused.hint}.")
        before = [t for t in self.line if t.key < ticket.key]
        lines.append(f"{len(before)} wait before it; `renice` moves it up." if before else "It is the next.")
        return tuple(lines)

    def check_integrity(self) -> None:
        """Every claim has its owner, and every owner its claims. Raises AssertionError."""
        alive = {owner_of(p.pid): p for p in self.kernel.table if p.alive}
        for owner, process in alive.items():
            held = {pool: kinds.get(DECLARED, 0) for pool, kinds in self.ledger.held(owner).items()}
            declared = {pool: amount for pool, amount in held.items() if amount}
            assert declared == (needs_of(process.spec) if process.admitted else {}), (process, declared)
            waits, queue = process.pid in self._of_pid, self.kernel.models[process.model].queue
            assert not (waits and any(thread in queue for thread in process.threads)), process
            assert process.admitted or waits or process.state in (State.NEW, State.STOPPED), process
        for model in self.kernel.models.values():
            self._check_model(model)
        known = alive.keys() | self.kernel.models.keys()
        owners = {
            owner.partition(".")[0] if owner.startswith("process ") else owner
            for owner in self.ledger.owners()
        }
        assert owners <= known, owners - known
        assert set(self._of_pid.values()) == {t for t in self.line if t.process is not None}

    def _check_model(self, model: Model) -> None:
        held = self.ledger.held(model.name)
        assert model.state in (*RESIDENT, ModelState.EVICTING) or not len(model.queue), model.name
        if model.state in (ModelState.LOADED, ModelState.EVICTING) and model.host is not None:
            assert held == {model.device.pool: model.measured_sizes()}, (model.name, held)
        elif model.state is ModelState.LOADING:
            assert model.restarts_s or held == {model.device.pool: model.estimate_sizes()}, (model.name, held)
        elif model.state in (ModelState.WAITING, ModelState.FAILED, ModelState.QUARANTINED):
            assert not held, (model.name, held)

    def _ticket(self, model: Model, process: Process | None, *, waits: bool) -> Ticket:
        self._order += 1
        needs = {} if process is None or process.admitted else needs_of(process.spec)
        return Ticket(model, process, needs, self._order, self.kernel.clock.now_s(), waits)

    def _leave_line(self, ticket: Ticket) -> None:
        self.line.pop(ticket, None)
        if ticket.process is not None:
            self._of_pid.pop(ticket.process.pid, None)
            ticket.process.waits_for = ""
        if not self.line:
            self._blocked, self._claimant = {}, None

    def forget(self, model: Model) -> None:
        """A record that only stood for what was asked, and is asked no more."""
        waited_for = model.users or any(t.model is model for t in self.line)
        if model.state is ModelState.WAITING and not waited_for:
            self.kernel.models.pop(model.name, None)

    @staticmethod
    def _asks(model: Model, needs: Asks) -> dict[str, int]:
        asks = dict(needs)
        if model.state not in RESIDENT:
            pool = model.device.pool
            asks[pool] = asks.get(pool, 0) + model.estimate.total_bytes
        return asks

    def _check_possible(self, model: Model, needs: Asks) -> None:
        """The model's bytes count even if it is open: what can never be beside its own model can never be."""
        pool, asks = model.device.pool, dict(needs)
        bytes_needed = model.held_bytes() or model.estimate.total_bytes
        try:
            self.ledger.check_possible({pool: bytes_needed}, model.name)
            asks[pool] = asks.get(pool, 0) + bytes_needed
            self.ledger.check_possible(asks, "the process")
        except AdmissionRefused:
            self.forget(model)
            raise

    def _ahead_of(self, key: tuple[int, int], asks: Asks) -> tuple[int, int] | None:
        """The first in the line who waits for some of the same, and comes before."""
        return min(
            (self._blocked[p] for p in asks if p in self._blocked and self._blocked[p] <= key), default=None
        )

    def _refusal(self, model: Model, asks: Asks, ahead: tuple[int, int] | None, who: str) -> AdmissionRefused:
        refused = self.ledger.refusal(asks, who if asks.keys() - {model.device.pool} else model.name)
        if refused is None:
            what = "others wait for it already" if ahead else f"{model.name} takes nobody new just now"
            return AdmissionRefused(f"{who} would have to wait: {what}", "`--wait` waits for its turn")
        pinned = ", ".join(m.name for m in self.kernel.models.values() if m.pinned and m.device.pool in asks)
        kept = f"pinned are {pinned}: `unpin` lets them make room" if pinned else ""
        return AdmissionRefused(
            refused.message, "; ".join(filter(None, (refused.hint, kept, "`--wait` waits")))
        )

    def _waits_for(self, asks: Asks, model: Model) -> str:
        if not asks:
            return f"{model.name}, which takes nobody new: another model has waited for its memory too long"
        said = ", ".join(self.ledger.say(pool, amount) for pool, amount in asks.items())
        return f"{said} for {model.name}" if model.state not in RESIDENT else said
