"""The contracts that drivers fill, and the values that cross them.

Two levels, on purpose. An `Engine` is one model open on one device: plain, single-threaded code
that computes. An `EngineHost` is what the dispatcher holds: the same engine behind a queue of
quanta, either in a supervised child process (`drivers.worker`) or on the dispatcher's own thread
(`InlineHost` here). The kernel cannot tell which.

Not here: who runs next (scheduler), what memory is left (memory), where model files are (llmos.store).
"""

from collections.abc import Callable, Mapping, MutableMapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, NamedTuple, Protocol

from kernel.errors import LlmosError

Finish = Literal["stop", "length", "context"]
"""Why a sequence ended: end-of-generation token, max_tokens reached, context window full."""

Progress = Callable[[float], bool]
"""Told the fraction (0 to 1) of a load that is done; returns False to cancel it."""


@dataclass(frozen=True, slots=True)
class DeviceInfo:
    """A thing with memory and compute. `name` is unique on the machine: "cpu", "gpu0"."""

    name: str
    kind: Literal["cpu", "cuda", "metal", "sim"]
    description: str
    memory_bytes: int

    @property
    def pool(self) -> str:
        """The ledger's name for its memory: a CPU computes in the host's RAM."""
        return "ram" if self.kind == "cpu" else self.name


@dataclass(frozen=True, slots=True)
class ModelInfo:
    """What a file's header says, read without loading it."""

    path: Path
    format: str  # "gguf", "safetensors", "sim"
    architecture: str
    file_bytes: int
    parameters: int
    context_tokens: int  # the window the model was trained for
    quantization: str  # "Q8_0", "F16", ...
    kv_bytes_per_token: int  # at 16-bit keys and values


@dataclass(frozen=True, slots=True)
class EngineOptions:
    """How to open a model. `context_tokens` is per sequence; 0 lets the driver choose."""

    context_tokens: int = 0
    sequences: int = 0  # seats in the KV cache; 0 lets the driver choose
    threads: int = 0  # compute threads; 0 lets the driver choose
    kv_tokens: int = 0  # KV cache for all sequences together; 0 lets the driver choose


@dataclass(frozen=True, slots=True)
class Estimate:
    """Bytes a model will take on its device before a byte is loaded."""

    weights_bytes: int
    kv_bytes: int
    compute_bytes: int

    @property
    def total_bytes(self) -> int:
        return self.weights_bytes + self.kv_bytes + self.compute_bytes


@dataclass(frozen=True, slots=True)
class EngineInfo:
    """An open engine, as measured after the load."""

    context_tokens: int  # per sequence, at most
    sequences: int  # sequences that can be open at once; fewer, if they are long
    weights_bytes: int
    kv_bytes_per_token: int
    kv_bytes: int  # for the KV of all sequences together; fixed at the load
    compute_bytes: int
    step_cost_s: Mapping[int, float]  # measured seconds of one decode step, by sequences in it
    prefill_token_s: float  # measured seconds per prompt token in a chunk
    copy_token_s: float = 0.0  # measured seconds to dump, or to restore, a token's KV
    abortable: bool = False  # a pass that is cut short costs no more than that pass


@dataclass(frozen=True, slots=True)
class Sampling:
    """How the next token is drawn: a pure function of (seed, position, logits). temperature 0 is greedy.

    `exact`: the logits, too, are to depend on nothing but the tokens: not on what runs beside the
    sequence, on quotas and interrupts, nor on a dump and restore or a replay in between.
    """

    temperature: float = 0.8
    top_k: int = 40
    top_p: float = 0.95
    min_p: float = 0.05
    repeat_penalty: float = 1.0
    seed: int = 0
    ignore_eos: bool = False
    exact: bool = False


@dataclass(frozen=True, slots=True)
class Prompt:
    """What a sequence starts from: text (tokenised by the engine) or tokens (a replay).

    `messages` wins over `text`: the model file's chat template is applied to it; a pair is
    (role, content). With `tokens`, the first `prompt_tokens` of them are prompt, the rest were
    generated before: they are computed again, not emitted again. So were, in a chat,
    replies within the prompt: an exact sequence computes them one by one, as they were drawn.
    """

    text: str = ""
    messages: tuple[tuple[str, str], ...] = ()
    tokens: tuple[int, ...] = ()
    prompt_tokens: int = 0
    max_tokens: int = 0  # output tokens allowed in all; 0 = until the context window is full
    reply_bounds: tuple[int, ...] = ()  # where those begin and end, in turn


@dataclass(frozen=True, slots=True)
class Opened:
    """A sequence has begun: the prompt as tokens, and how many of them are already in the KV cache."""

    tokens: tuple[int, ...]
    shared_tokens: int = 0


class SequenceStep(NamedTuple):
    """What one step did for one sequence. A tuple: one is made for every token, on both sides of the wire.

    A prompt of its queue that it took up, or could not, and KV that was taken over from another sequence
    are told in entries of their own, without tokens, before the entry of what was then computed: so a
    step may speak of a sequence more than once.
    """

    seq: int
    prompt_tokens: int  # prompt (or replayed) tokens computed in this step
    token: int | None  # the token drawn; None while the prompt is not finished
    text: str  # complete characters that became ready
    finish: Finish | None = None
    opened: Opened | None = None  # the next prompt of its queue has begun
    error: LlmosError | None = None  # the next prompt of its queue cannot be; the one after it is up
    shared_tokens: int = 0  # tokens of its prompt that need not be computed any more: another one did
    stuck: bool = False  # it has outgrown its place, and KV memory is short: it rests until some is freed


class StepEvent(NamedTuple):
    """One forward pass of an engine."""

    quantum: int
    step_s: float  # device seconds, sampling included
    sequences: tuple[SequenceStep, ...]


@dataclass(frozen=True, slots=True)
class QuantumEnd:
    """A quantum is over: quotas used up, nothing left to run, or interrupted."""

    quantum: int
    interrupted: bool = False
    borrowed_tokens: Mapping[int, int] = field(default_factory=dict)  # as `Engine.borrowed_tokens`, now


@dataclass(frozen=True, slots=True)
class Quantum:
    """One grant of steps: tokens to compute (prompt and output alike) per sequence, the best claim first."""

    id: int
    quota_tokens: Mapping[int, int]


@dataclass(frozen=True, slots=True)
class GpuSample:
    """One GPU. What the card or its driver does not tell is None."""

    name: str
    memory_total_bytes: int
    memory_used_bytes: int
    utilization_percent: float | None
    temperature_c: float | None
    power_w: float | None
    power_limit_w: float | None
    pcie_received_bytes_s: float | None  # by the GPU
    pcie_sent_bytes_s: float | None


@dataclass(frozen=True, slots=True)
class HostSample:
    """The machine at one moment. Rates are means since the sample before; 0 in the first."""

    time_s: float  # monotonic
    cpu_percent: float  # of all cores together, 0 to 100
    core_percents: tuple[float, ...]
    load_average: tuple[float, float, float]  # over 1, 5 and 15 minutes
    ram_total_bytes: int
    ram_available_bytes: int
    ram_ours_bytes: int  # resident, of this process and all below it; shared pages count in each
    swap_total_bytes: int
    swap_used_bytes: int
    disk_read_bytes_s: float
    disk_written_bytes_s: float
    gpus: tuple[GpuSample, ...]


class Engine(Protocol):
    """One model open on one device. Single-threaded; may live in a child process.

    `seq` is chosen by the caller, below `info.sequences`. A wrong argument raises a LlmosError
    and changes nothing; it never aborts the process.

    KV memory may be short before the numbers are: then `open`, `feed`, `fork` and `restore` raise
    AdmissionRefused and change nothing, until others have been closed. A single sequence always fits.
    """

    info: EngineInfo

    def open(self, seq: int, prompt: Prompt, sampling: Sampling) -> Opened:
        """Begin a sequence; on a seq in use, end the old one, and its queue, first.

        Raises ContextFull (the prompt leaves no room for one token), UsageError (an empty prompt,
        or one the model has no tokens for); then what was there is still there.
        """

    def queue(self, seq: int, prompt: Prompt, sampling: Sampling) -> None:
        """Have a prompt begin on `seq` by itself, in a fresh context, as soon as the one before has finished.

        In order, any number; also on a seq that is not open, or has finished already. The engine begins
        it in the first step after the one that told the finish in which `seq` has quota left, and goes
        on within that quota. `SequenceStep` tells it, and what `open` would have raised; one for which KV
        memory is short is `stuck`, and begins when there is some. The prompt is
        not looked at before. `close`, and `open`, `restore` and `fork` onto the seq, drop its queue;
        `dump` and a fork from it leave the queue out; `feed` goes before it. Raises UsageError (no such seq).
        """

    def feed(self, seq: int, prompt: Prompt) -> Opened:
        """Append a chat turn to a sequence that has finished, keeping its KV. Raises as `open`.

        Returns only the new tokens. `prompt.max_tokens` counts anew.
        """

    def step(self, quota_tokens: MutableMapping[int, int]) -> StepEvent | None:
        """Run one forward pass over sequences with quota left, and deduct what was computed.

        Returns None if no sequence with quota has anything to compute. `quantum` is 0 in the
        event; the host fills it in. All steps of a quantum get the same mapping, in the order of claims: of
        prompts, the first goes first. They go in chunks between other sequences' tokens. A step cut short by
        `abort` reports what it finished, perhaps nothing. An exact sequence may go past its quota by the
        rest of a chunk, if its chunks have to be of one shape.
        """

    def fork(self, source: int, target: int, sampling: Sampling | None = None) -> None:
        """Make `target` a copy of `source`, KV included; with `sampling`, its next tokens are drawn so.

        Not necessarily in bytes of its own: both may go on from the same KV.
        The tokens that the source has drawn already are common to both. Raises UsageError.
        """

    def borrowed_tokens(self) -> Mapping[int, int]:
        """By sequence: how many of its first tokens have KV that one opened before has in the same bytes.

        Those that borrow nothing are left out. All together hold what each has computed, less this.
        """

    def dump(self, seq: int) -> bytes:
        """The KV state of a sequence as bytes. The sequence goes on."""

    def restore(self, seq: int, prompt: Prompt, sampling: Sampling, kv: bytes) -> Opened:
        """Begin a sequence whose KV is known: `prompt.tokens` are all its tokens.

        Raises CheckpointInvalid if the engine does not take these bytes; then nothing is open.
        """

    def close(self, seq: int) -> None:
        """End a sequence and free its KV. Closing one that is not open does nothing."""

    def shutdown(self) -> None:
        """Release everything."""


class EngineHost(Protocol):
    """An engine behind a queue of quanta. One thread (the dispatcher) calls all but `interrupt`.

    Every method but `interrupt` and `shutdown` raises WorkerDied if the engine is gone. Calls other than
    `start` and `poll` take effect between two steps, also in the middle of a quantum. `queue` and `close`
    return at once; what follows from a queued prompt is told by the steps.
    """

    @property
    def info(self) -> EngineInfo:
        """As measured after the load."""

    def start(self, quantum: Quantum) -> None:
        """Queue a quantum and return at once. At most two are queued; ids rise."""

    def poll(self, timeout_s: float | None = None) -> StepEvent | QuantumEnd | None:
        """Wait for the next event, in order; None when the time is up (or nothing is queued)."""

    def interrupt(self, quantum: int, *, hard: bool = False) -> None:
        """End every quantum up to this id after the current step; with `hard`, within it.

        From any thread. The QuantumEnd still arrives.
        """

    def open(self, seq: int, prompt: Prompt, sampling: Sampling) -> Opened: ...
    def queue(self, seq: int, prompt: Prompt, sampling: Sampling) -> None: ...
    def feed(self, seq: int, prompt: Prompt) -> Opened: ...
    def fork(self, source: int, target: int, sampling: Sampling | None = None) -> None: ...
    def borrowed_tokens(self) -> Mapping[int, int]: ...
    def dump(self, seq: int) -> bytes: ...
    def restore(self, seq: int, prompt: Prompt, sampling: Sampling, kv: bytes) -> Opened: ...
    def close(self, seq: int) -> None: ...
    def shutdown(self) -> None: ...


LogLine = Callable[[str, str], None]
"""Takes one line of an engine's chatter: (level, text); level is "debug", "info", "warn", "error"."""


class Driver(Protocol):
    """Code that opens engines of one kind."""

    name: str

    def devices(self) -> Sequence[DeviceInfo]:
        """Devices this driver can use on this machine; none is not an error."""

    def inspect(self, path: Path) -> ModelInfo:
        """Read the header in pure Python. Raises ModelInvalid, ModelNotFound."""

    def free_bytes(self, device: DeviceInfo) -> int | None:
        """Memory of a device that nobody uses now, other programs included; None if it does not tell."""

    def estimate(self, model: ModelInfo, options: EngineOptions, device: DeviceInfo) -> Estimate:
        """Bytes needed, before loading: from the file's header, at once."""

    def confirm(self, model: ModelInfo, options: EngineOptions, device: DeviceInfo) -> Estimate:
        """The same as the native library counts them, in a process of its own: slower, a second at most.

        Raises ModelInvalid if it refuses the file, or dies of it.
        """

    def open(
        self,
        model: ModelInfo,
        device: DeviceInfo,
        options: EngineOptions,
        progress: Progress,
        log: LogLine,
    ) -> EngineHost:
        """Load. Raises ModelInvalid, AdmissionRefused, Interrupted (cancelled), WorkerDied."""


@dataclass
class InlineHost:
    """Hosts an engine on the calling thread: `poll` runs the next step. No supervision."""

    engine: Engine
    _queue: list[tuple[int, dict[int, int]]] = field(default_factory=list)
    _stop_through: int = -1

    @property
    def info(self) -> EngineInfo:
        return self.engine.info

    def start(self, quantum: Quantum) -> None:
        self._queue.append((quantum.id, dict(quantum.quota_tokens)))

    def poll(self, timeout_s: float | None = None) -> StepEvent | QuantumEnd | None:
        if not self._queue:
            return None
        quantum_id, quota = self._queue[0]
        interrupted = quantum_id <= self._stop_through
        event = None if interrupted else self.engine.step(quota)
        if event is None:
            self._queue.pop(0)
            return QuantumEnd(quantum_id, interrupted, self.engine.borrowed_tokens())
        return StepEvent(quantum_id, event.step_s, event.sequences)

    def interrupt(self, quantum: int, *, hard: bool = False) -> None:
        self._stop_through = max(self._stop_through, quantum)

    def open(self, seq: int, prompt: Prompt, sampling: Sampling) -> Opened:
        return self.engine.open(seq, prompt, sampling)

    def queue(self, seq: int, prompt: Prompt, sampling: Sampling) -> None:
        self.engine.queue(seq, prompt, sampling)

    def feed(self, seq: int, prompt: Prompt) -> Opened:
        return self.engine.feed(seq, prompt)

    def fork(self, source: int, target: int, sampling: Sampling | None = None) -> None:
        self.engine.fork(source, target, sampling)

    def borrowed_tokens(self) -> Mapping[int, int]:
        return self.engine.borrowed_tokens()

    def dump(self, seq: int) -> bytes:
        return self.engine.dump(seq)

    def restore(self, seq: int, prompt: Prompt, sampling: Sampling, kv: bytes) -> Opened:
        return self.engine.restore(seq, prompt, sampling, kv)

    def close(self, seq: int) -> None:
        self.engine.close(seq)

    def shutdown(self) -> None:
        self.engine.shutdown()
