"""Processes and their threads: the rows of the process table.

Owner: the kernel. Lock: everything here is guarded by the table's lock (`ProcessTable.lock`).
Not here: the table, what was asked for (spec), who runs next (scheduler), what a turn's end means (kernel).
"""

import itertools
from dataclasses import dataclass, field, replace
from enum import Enum, IntEnum
from typing import Protocol

from kernel.device import Opened, Prompt, Sampling
from kernel.errors import LlmosError
from kernel.fairness import weight_of
from kernel.monitor import Rate
from kernel.spec import ProcessSpec
from kernel.stream import Stream


class State(Enum):
    """NEW -> RUNNABLE <-> RUNNING <-> SLEEPING | STOPPED | SWAPPED -> ZOMBIE -> reaped."""

    NEW = "NEW"
    RUNNABLE = "RUNNABLE"
    RUNNING = "RUNNING"
    SLEEPING = "SLEEPING"
    STOPPED = "STOPPED"
    SWAPPED = "SWAPPED"
    ZOMBIE = "ZOMBIE"


class Signal(IntEnum):
    """As in Unix, with its numbers."""

    INT = 2
    KILL = 9
    USR1 = 10  # write a checkpoint
    TERM = 15
    CONT = 18
    STOP = 19


@dataclass(slots=True, eq=False)
class Group:
    """Who divide one weight: processes of a user or of a large job, or the threads of one process."""

    name: str
    weight: float = 1.0


class Swapped(Protocol):
    """KV state that was moved out of its engine."""

    size_bytes: int

    def read(self) -> bytes | None:
        """None if it was lost: then it is computed again."""

    def free(self) -> None:
        """It is needed no more. Safe to call twice."""


@dataclass(slots=True, eq=False)
class Thread:
    """One sequence on one engine: the unit the scheduler runs. It answers its items one after another.

    A hundred thousand may be queued: what no engine has begun has no lists.
    """

    process: "Process"
    index: int = 0
    items: tuple[int, ...] = ()  # claimed: the one being answered, the next ones
    known: int = 0  # how many of its items the engine knows, the one being answered included
    begun: bool = False  # whether `tokens` has the prompt of its item
    pieces: list[str] | None = field(default=None, repr=False)  # of the reply so far
    seat: int | None = None  # its seat in the engine's KV cache
    tokens: list[int] | tuple[()] = field(default=(), repr=False)  # prompt, then output
    bounds: tuple[
        int, ...
    ] = ()  # where a chat's earlier replies begin and end, in turn; then the prompt's end
    computed: int = 0  # tokens whose KV exists
    kv: Swapped | None = field(default=None, repr=False)  # KV state swapped out
    granted: int = 0  # tokens granted in quanta in flight and not yet computed
    deaths: int = 0  # of the engine, while it opened this sequence
    lag: float = 0.0  # service units owed, kept while it is not runnable

    @property
    def prompt_length(self) -> int:
        """How many of `tokens` are prompt."""
        return self.bounds[-1] if self.bounds else 0

    @property
    def reply_bounds(self) -> tuple[int, ...]:
        """Where earlier replies begin and end in the prompt, in turn."""
        return self.bounds[:-1]

    @property
    def reply(self) -> str:
        """To the item it answers, so far."""
        return "".join(self.pieces or ())

    @property
    def item(self) -> int:
        """The item it answers, or, of an idle chat, the next one."""
        return self.items[0] if self.items else self.process.item

    @property
    def weight(self) -> float:
        """A process's weight is divided among its threads."""
        whole, parts = weight_of(self.process.nice), len(self.process.threads)
        return whole if parts == 1 else whole / parts

    @property
    def pending(self) -> int:
        """Tokens still to compute when the quanta in flight have ended; at least 1, if it can go on."""
        return max(1, len(self.tokens) - self.computed - self.granted)

    @property
    def prefilling(self) -> bool:
        """More is known than computed: it cannot draw a token yet."""
        return len(self.tokens) - self.computed > 1

    def begin(self, opened: Opened) -> None:
        """A prompt has been opened: its tokens are known, and perhaps some of their KV."""
        drawn = (self.prompt_length, len(self.tokens)) if self.prompt_length < len(self.tokens) else ()
        self.tokens = [*self.tokens, *opened.tokens]
        self.bounds, self.begun = (*self.reply_bounds, *drawn, len(self.tokens)), True
        self.process.prompt_tokens += len(opened.tokens)
        self.process.shared_tokens += opened.shared_tokens

    def draw(self, token: int) -> None:
        """A token has been drawn; its own KV is computed in the step after."""
        self.tokens = self.tokens or []
        self.tokens.append(token)
        self.computed = len(self.tokens) - 1

    def restart(self) -> None:
        """Forget the sequence: the next item begins."""
        self.tokens = self.bounds = ()
        self.computed = 0
        self.drop_kv()

    def drop_kv(self) -> None:
        """Give back what was swapped out."""
        if self.kv is not None:
            self.kv.free()
            self.kv = None


@dataclass(slots=True, eq=False)
class Process:
    """One row of the table."""

    pid: int
    ppid: int
    spec: ProcessSpec = field(repr=False)
    model: str  # resolved name
    nice: int
    started_s: float  # the clock's seconds
    started_wall_s: float
    group: Group | None = None
    state: State = State.NEW
    threads: tuple[Thread, ...] = field(default=(), repr=False)  # that have something to answer
    rate: Rate | None = None  # of output tokens, from the first one on
    replies: list[str] | tuple[()] = field(default=(), repr=False)  # finished items, in order
    early: dict[int, str] | None = field(default=None, repr=False)  # finished before one of lower number
    waits_for: str = ""
    prompt_tokens: int = 0
    output_tokens: int = 0
    shared_tokens: int = 0
    device_s: float = 0.0
    share_due: float = 0.0
    share_received: float = 0.0
    first_token_s: float | None = None
    ended_s: float | None = None
    exit_code: int | None = None
    error: LlmosError | None = None
    items_failed: int = 0
    reaped: bool = False
    admitted: bool = False  # its declared needs are claimed
    turns: list[str] | None = field(default=None, repr=False)  # of a chat, after `spec.prompts`
    hung_up: bool = False  # nothing more will be said
    _stdout: Stream | None = field(default=None, repr=False)

    @property
    def stdout(self) -> Stream:
        """Made when it is first written to, or read."""
        if self._stdout is None:
            self._stdout = Stream()
            if not self.alive:
                self._stdout.close()
        return self._stdout

    @property
    def item(self) -> int:
        """The first item that is not finished; its reply goes to the output as it comes."""
        return len(self.replies)

    @property
    def is_chat(self) -> bool:
        return self.spec.program == "chat"

    @property
    def items(self) -> int:
        """Replies to give, as far as is known."""
        return self.spec.items + len(self.turns or ())

    @property
    def is_over(self) -> bool:
        """All is answered, and nothing more will be asked."""
        return self.items_done == self.items and (self.hung_up or not self.is_chat)

    @property
    def is_idle(self) -> bool:
        """A chat that waits for its user."""
        return self.items_done == self.items and not self.is_over

    @property
    def items_done(self) -> int:
        return len(self.replies) + len(self.early or ())

    @property
    def alive(self) -> bool:
        return self.state is not State.ZOMBIE

    def asked(self, item: int) -> str:
        """What an item is to answer."""
        spec = self.spec
        return (
            spec.prompts[item // spec.samples] if item < spec.items else (self.turns or ())[item - spec.items]
        )

    def prompt(self, item: int) -> Prompt:
        """The same as the engine wants it."""
        spec, limit, text = self.spec, self.spec.max_tokens, self.asked(item)
        if spec.raw:
            return Prompt(text=text, max_tokens=limit)
        opens = spec.system and not (self.is_chat and item)
        system = (("system", spec.system),) if opens else ()
        return Prompt(messages=(*system, ("user", text)), max_tokens=limit)

    def sampling(self, item: int) -> Sampling:
        """How its tokens are drawn."""
        sampling, sample = self.spec.sampling, item % self.spec.samples
        return replace(sampling, seed=(sampling.seed + sample) % 2**63) if sample else sampling

    def tokens(self) -> int:
        """Tokens now in the window, all threads."""
        return sum(len(thread.tokens) for thread in self.threads)

    def claim(self, thread: Thread, *, ahead: bool = False) -> bool:
        """Give a thread the next item; False if none is left, or, `ahead` of time, too few for the others."""
        taken = {item for each in self.threads for item in each.items} | set(self.early or ())
        item = next(item for item in itertools.count(self.item) if item not in taken)
        if item + (len(self.threads) - 1 if ahead else 0) >= self.items:
            return False
        thread.items += (item,)
        return True

    def say(self, thread: Thread, text: str) -> None:
        """A piece of a reply: to the output, if it is the next in order, as the spec wants it."""
        thread.pieces = thread.pieces or []
        thread.pieces.append(text)
        if thread.items[0] == self.item:
            self._print(text)

    def finish_item(self, thread: Thread, error: LlmosError | None = None) -> None:
        """A thread's item is answered, or could not be; a job of many goes on after a bad one."""
        item, text = thread.items[0], thread.reply
        thread.items, thread.pieces, thread.begun = thread.items[1:], None, False
        if error is not None:
            self.items_failed += 1
            self.error = error if self.is_chat else self.error or error
        if item == self.item:
            self._close(text)
        else:
            self.early = {**(self.early or {}), item: text}
        while self.early and self.item in self.early:
            self.recall(self.early.pop(self.item))

    def recall(self, reply: str) -> None:
        """The reply to the next item in order is known as a whole."""
        self._print(reply)
        self._close(reply)

    def _close(self, reply: str) -> None:
        self.replies = self.replies or []
        self.replies.append(reply)
        if self.spec.lines or self.is_chat:
            self.stdout.write("\n")
        elif self.spec.samples > 1:
            self.stdout.write("\n" if self.item == self.spec.items else "\n\n")
        self.open_item()

    def open_item(self) -> None:
        """The next item in order goes to the output: what there is of it already, then more as it comes."""
        if self.spec.samples > 1 and not self.spec.lines and self.item < self.spec.items:
            self.stdout.write(f"==> {self.item + 1} <==\n")
        for thread in self.threads:
            if thread.items and thread.items[0] == self.item:
                self._print(thread.reply)

    def _print(self, text: str) -> None:
        self.stdout.write(" ".join(text.splitlines()) if self.spec.lines and "\n" in text else text)
