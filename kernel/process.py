"""Processes, their threads, and the process table.

Owner: the kernel. Lock: everything here is guarded by the table's lock (`ProcessTable.lock`),
the first in the lock order; it is never held while a driver runs or a file is written.
Not here: who runs next (scheduler), what a program does at a turn's end (kernel).
"""

import itertools
import threading
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field, fields, replace
from enum import Enum, IntEnum
from typing import Any, Protocol, TypeVar

from kernel.clock import Clock
from kernel.config import KernelConfig
from kernel.device import Opened, Prompt, Sampling
from kernel.errors import AdmissionRefused, LlmosError, NotPermitted, ProcessNotFound, UsageError
from kernel.fairness import WEIGHTS, weight_of
from kernel.monitor import Rate
from kernel.stream import Stream

T = TypeVar("T")


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


DEFAULT_SAMPLING = Sampling()  # one for all who ask for no other


@dataclass(frozen=True, slots=True)
class ProcessSpec:
    """What to run; all that is needed to run it again.

    `prompts` are answered each from a fresh context, `threads` of them at a time, and each of them
    `samples` times, with one seed after another; the output is in order. With `lines`, each reply is
    one line of output (line breaks inside it become spaces). With `raw`, the chat template is not applied.
    `system` is said before every prompt, in the model's own way.
    Program "chat": the prompts, and then what the user says, are turns of one conversation.
    """

    model: str
    prompts: tuple[str, ...]
    program: str = "generate"
    system: str = ""
    lines: bool = False
    raw: bool = False
    sampling: Sampling = DEFAULT_SAMPLING
    max_tokens: int = 0  # output tokens per prompt; 0 = until the window is full
    nice: int = 0
    command: str = ""
    group: str = ""  # the group whose weight it shares; "": its own, by nice
    context_tokens: int = 0  # asked of the model if this process makes it load; 0 = the driver's choice
    sink: str = ""  # where the shell sends the output; nothing to the kernel, comes back with `resume`
    threads: int = 1
    samples: int = 1
    cpus: float = 0.0  # processors that it needs from its admission to its end, in fractions
    gpus: float = 0.0
    mem_bytes: int = 0  # of RAM, beside the model's weights and KV
    wait: bool = True  # what does not fit now waits; False: it is refused

    @property
    def items(self) -> int:
        """Replies to give."""
        return len(self.prompts) * self.samples


def check_nice(nice: int) -> None:
    """Raises UsageError."""
    if not -20 <= nice < -20 + len(WEIGHTS):
        raise UsageError(f"nice value {nice} is out of range", "-20 (most) to 19 (least)")


def check_spec(spec: ProcessSpec) -> None:
    """Raises UsageError."""
    check_nice(spec.nice)
    if spec.program not in ("generate", "chat"):
        raise UsageError(f"no program {spec.program}")
    chat = spec.program == "chat"
    if not (spec.prompts or chat) or not all(prompt.strip() for prompt in spec.prompts):
        raise UsageError("the prompt is empty", "give words, -f FILE, or standard input")
    if chat and (spec.threads > 1 or spec.samples > 1 or spec.raw or spec.lines):
        raise UsageError("a chat has one thread, one reply to each turn, and the model's chat template")
    sampling = spec.sampling
    for name, value, least, most in (
        ("temperature", sampling.temperature, 0.0, 100.0),
        ("top_p", sampling.top_p, 0.0, 1.0),
        ("min_p", sampling.min_p, 0.0, 1.0),
        ("top_k", sampling.top_k, 0, 2**31 - 1),
        ("repeat_penalty", sampling.repeat_penalty, 0.01, 100.0),
        ("seed", sampling.seed, 0, 2**63 - 1),
        ("max_tokens", spec.max_tokens, 0, 2**31 - 1),
        ("ctx", spec.context_tokens, 0, 2**31 - 1),
        ("threads", spec.threads, 1, 256),
        ("samples", spec.samples, 1, 10_000),
        ("cpus", spec.cpus, 0.0, 1e6),
        ("gpus", spec.gpus, 0.0, 1e6),
        ("mem", spec.mem_bytes, 0, 2**63 - 1),
    ):
        if not least <= value <= most:
            raise UsageError(f"{name} {value} is out of range", f"{least} to {most}")


def spec_from(values: dict[str, Any]) -> ProcessSpec:
    """A specification from what `asdict` made of one. Raises KeyError, TypeError (it may be anybody's)."""
    plain = dict(values)
    sampling = _typed(Sampling, plain.pop("sampling"))
    plain["prompts"] = tuple(plain["prompts"])
    if not all(type(prompt) is str for prompt in plain["prompts"]):
        raise TypeError("prompts")
    return _typed(ProcessSpec, plain | {"sampling": sampling})


def _typed(kind: type[T], values: dict[str, Any]) -> T:
    """A flat dataclass from a mapping, each value of its default's type."""
    made = kind(**values)
    for name, default in ((f.name, f.default) for f in fields(kind)):  # type: ignore[arg-type]
        value = getattr(made, name)
        if isinstance(default, float) and type(value) is int:
            continue
        if isinstance(default, str | int | float) and type(value) is not type(default):
            raise TypeError(name)
    return made


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
    prompt_length: int = 0  # how many of `tokens` are prompt
    reply_bounds: tuple[int, ...] = ()  # where a chat's earlier replies begin and end in it, in turn
    computed: int = 0  # tokens whose KV exists
    kv: Swapped | None = field(default=None, repr=False)  # KV state swapped out
    granted: int = 0  # tokens granted in quanta in flight and not yet computed
    deaths: int = 0  # of the engine, while it opened this sequence
    lag: float = 0.0  # service units owed, kept while it is not runnable

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
        if self.prompt_length < len(self.tokens):
            self.reply_bounds += (self.prompt_length, len(self.tokens))
        self.tokens = [*self.tokens, *opened.tokens]
        self.prompt_length, self.begun = len(self.tokens), True
        self.process.prompt_tokens += len(opened.tokens)
        self.process.shared_tokens += opened.shared_tokens

    def draw(self, token: int) -> None:
        """A token has been drawn; its own KV is computed in the step after."""
        self.tokens = self.tokens or []
        self.tokens.append(token)
        self.computed = len(self.tokens) - 1

    def restart(self) -> None:
        """Forget the sequence: the next item begins."""
        self.tokens = self.reply_bounds = ()
        self.prompt_length = self.computed = 0
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
