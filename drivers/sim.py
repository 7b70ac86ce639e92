"""A deterministic engine without weights: made tokens, a model of time, and faults on demand.

Each token is a pure function of (seed, position, token before), so that forks, replays and restores
can be checked whatever ran beside them. Time passes through an injected `sleep`: the real one in a
worker, a hand-fed clock's in a test, where a simulated day takes seconds.

Not here: what a model is and which faults it has (simmodel), anything that computes.
"""

import os
import signal
import struct
import time
import zlib
from array import array
from collections.abc import Callable, Mapping, MutableMapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from drivers.brake import AbortFlag
from drivers.commons import Commons
from drivers.prefixes import Prefixes, common_tokens
from drivers.prompt_queue import PromptQueue
from drivers.simmodel import SimFaults, SimModel, error_named, read_model
from kernel.device import (
    DeviceInfo,
    EngineInfo,
    EngineOptions,
    Estimate,
    Finish,
    InlineHost,
    LogLine,
    ModelInfo,
    Opened,
    Progress,
    Prompt,
    Sampling,
    SequenceStep,
    StepEvent,
)
from kernel.errors import (
    AdmissionRefused,
    CheckpointInvalid,
    ContextFull,
    Interrupted,
    UsageError,
    WorkerDied,
)

VOCABULARY = 4096
END_TOKEN = 0
ROLE_TOKEN = 1  # opens a turn of a chat
HANG_S = 120.0  # longer than any worker's deadline
ABORT_CHECK_S = 0.002
LOAD_PARTS = 20

_KV_HEAD = struct.Struct("<8sqII")  # magic, model seed, tokens, bytes per token; then the body, then its CRC
_KV_MAGIC = b"SIMKV\0\0\1"
_CRC = struct.Struct("<I")
_MASK = 2**64 - 1

_SYLLABLES = tuple(c + v for c in "bdfgklmnprstvzhj" for v in "aeio")
WORDS = ("", "", *(" " + a + b for a in _SYLLABLES for b in _SYLLABLES))[:VOCABULARY]
"""What each token reads as."""


def hash_step(seed: int, position: int, before: int) -> int:
    """64 well-mixed bits; multipliers as in SplitMix64 (Steele, Lea, Flood 2014)."""
    bits = (seed * 0x9E3779B97F4A7C15 + position * 0xBF58476D1CE4E5B9 + before * 0x94D049BB133111EB) & _MASK
    bits = ((bits ^ (bits >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    return bits ^ (bits >> 31)


def tokenize(prompt: Prompt) -> list[int]:
    """One token per word. Raises UsageError for an empty prompt, or tokens that no model has."""
    tokens = list(prompt.tokens) or [token for text in _turns(prompt) for token in _tokens_of(text)]
    if not tokens:
        raise UsageError("the prompt is empty")
    if min(tokens) < 0 or max(tokens) >= VOCABULARY:
        raise UsageError("a token of the prompt is not in the vocabulary")
    return tokens


def _turns(prompt: Prompt) -> list[str]:
    return [f"\0 {role} {content}" for role, content in prompt.messages] or [prompt.text]


def _tokens_of(text: str) -> list[int]:
    words = (word.encode("utf-8", "surrogatepass") for word in text.split())
    return [ROLE_TOKEN if word == b"\0" else 2 + zlib.crc32(word) % (VOCABULARY - 2) for word in words]


@dataclass(slots=True)
class _Sequence:
    tokens: list[int]  # all that are known: prompt and drawn
    computed_tokens: int  # how many of them are in the KV cache
    seed: int
    ignore_eos: bool
    length_limit: int  # tokens at which it has drawn all it may; 0 = none
    is_prefill: bool = True
    is_finished: bool = False
    is_stuck: bool = False  # its next token has no place in the KV pool

    @property
    def pending_tokens(self) -> int:
        return len(self.tokens) - self.computed_tokens


class SimEngine:
    """An `Engine` that makes up tokens. Owner: the one thread that calls it."""

    def __init__(
        self,
        model: SimModel,
        options: EngineOptions,
        sleep: Callable[[float], None],
        *,
        abort_flag: AbortFlag | None = None,
        die: Callable[[], None] | None = None,
    ) -> None:
        self.info = _info(model, options)
        self._model = model
        self._faults = model.faults
        self._sleep = sleep
        self._abort_flag = abort_flag
        self._die = die  # how to end without a word; None: by WorkerDied
        self._sequences: dict[int, _Sequence] = {}
        self._kept: dict[int, _Sequence] = {}  # what closed ones left on their seats, if it is shared
        self._prefixes: Prefixes[int] = Prefixes()
        self._commons = Commons()  # what forks have in common
        self._queue = PromptQueue()
        self._steps = 0
        self._calls: dict[str, int] = {}

    def open(self, seq: int, prompt: Prompt, sampling: Sampling) -> Opened:
        opened = self._open(seq, prompt, sampling)
        self._queue.drop(seq)
        return opened

    def _open(self, seq: int, prompt: Prompt, sampling: Sampling) -> Opened:
        self._perhaps_fail("open", self._faults.fail_open_at)
        tokens = self._fitting(tokenize(prompt), held_tokens=0)
        self._reserve(seq, len(tokens))
        shared = self._shared_tokens(tokens) if self._model.shares_prefixes else 0
        self._sit(seq, self._begin(tokens, shared, prompt, sampling))
        return Opened(tuple(tokens), shared)

    def queue(self, seq: int, prompt: Prompt, sampling: Sampling) -> None:
        self._queue.add(self._seat(seq), prompt, sampling)

    def feed(self, seq: int, prompt: Prompt) -> Opened:
        sequence = self._held(seq)
        tokens = self._fitting(tokenize(prompt), held_tokens=len(sequence.tokens))
        self._reserve(seq, len(sequence.tokens) + len(tokens))
        sequence.tokens += tokens
        sequence.length_limit = len(sequence.tokens) + prompt.max_tokens if prompt.max_tokens else 0
        sequence.is_prefill = True
        sequence.is_finished = False
        return Opened(tuple(tokens))

    def step(self, quota_tokens: MutableMapping[int, int]) -> StepEvent | None:
        news = self._queue.take_up(quota_tokens, self._is_over, self._open)
        news += self._stuck(quota_tokens)
        plan = self._plan(quota_tokens)
        if not plan:
            return StepEvent(0, 0.0, tuple(news)) if news else None
        self._steps += 1
        self._perhaps_break()
        step_s = self._cost_s(plan)
        passed_s = self._pass_time(step_s)
        if passed_s < step_s:
            return StepEvent(0, passed_s, tuple(news))
        for seq, _, count in plan:
            quota_tokens[seq] -= count
        return StepEvent(0, step_s, tuple(news + [self._advance(*item) for item in plan]))

    def fork(self, source: int, target: int, sampling: Sampling | None = None) -> None:
        original = self._held(source)
        if source == target:
            raise UsageError(f"sequence {source} cannot be forked onto itself")
        twin = replace(original)
        self._reserve(target, twin.pending_tokens)
        twin.tokens = list(twin.tokens)
        if sampling is not None:
            twin.seed, twin.ignore_eos = self._seed(sampling), sampling.ignore_eos
        self._sit(target, twin)
        self._commons.share(source, target, twin.computed_tokens)
        self._queue.drop(target)

    def borrowed_tokens(self) -> dict[int, int]:
        return self._commons.borrowed(self._sequences)

    def dump(self, seq: int) -> bytes:
        self._perhaps_fail("dump", self._faults.fail_dump_at)
        sequence = self._held(seq)
        count = sequence.computed_tokens
        width = self.info.kv_bytes_per_token
        head = _KV_HEAD.pack(_KV_MAGIC, self._model.seed, count, width)
        body = array("i", sequence.tokens[:count]).tobytes().ljust(count * width, b"\0")
        return head + body + _CRC.pack(zlib.crc32(body))

    def restore(self, seq: int, prompt: Prompt, sampling: Sampling, kv: bytes) -> Opened:
        tokens = tokenize(prompt)
        self._reserve(self._seat(seq), len(tokens))
        self.close(seq)
        self._perhaps_fail("restore", self._faults.fail_restore_at)
        cached = self._cached_tokens(kv)
        if cached != tokens[: len(cached)]:
            raise CheckpointInvalid("the KV state is of other tokens")
        computed_tokens = min(len(cached), len(tokens) - 1)
        sequence = self._begin(tokens, computed_tokens, prompt, sampling)
        sequence.is_prefill = sequence.pending_tokens > 1
        sequence.is_finished = not sequence.is_prefill and self._finish(sequence) is not None
        self._sit(seq, sequence)
        return Opened(tuple(tokens), computed_tokens)

    def close(self, seq: int) -> None:
        sequence = self._sequences.pop(seq, None)
        self._commons.cut(seq, 0)
        if sequence is not None and self._model.shares_prefixes:
            self._kept[seq] = sequence
        self._queue.drop(seq)

    def shutdown(self) -> None:
        self._sequences.clear()
        self._queue.clear()

    # -- sequences ------------------------------------------------------------------------------

    def _seat(self, seq: int) -> int:
        if not 0 <= seq < self.info.sequences:
            raise UsageError(f"no seat {seq}: the engine has {self.info.sequences}")
        return seq

    def _sit(self, seq: int, sequence: _Sequence) -> None:
        """Put a sequence on a seat; what was there, or was kept there, is lost."""
        self._sequences.pop(seq, None)
        self._sequences[self._seat(seq)] = sequence
        self._commons.cut(seq, 0)
        self._kept.pop(seq, None)
        self._prefixes.forget(seq)

    def _shared_tokens(self, tokens: list[int]) -> int:
        """How many of these tokens some seat has computed; never the last one, which is to be drawn from."""
        holders = self._kept | self._sequences
        for seq, holder in holders.items():
            self._prefixes.learn(seq, holder.tokens, holder.computed_tokens)
        seats, likely = self._prefixes.find(tokens[:-1])
        held = [holders[seq] for seq in seats]
        return max((common_tokens(tokens[:-1], h.tokens, h.computed_tokens, likely) for h in held), default=0)

    def _held(self, seq: int) -> _Sequence:
        if seq not in self._sequences:
            raise UsageError(f"no sequence in seat {seq}")
        return self._sequences[seq]

    def _free_tokens(self, but: int) -> int:
        """Room in the KV pool, but for what one seat holds."""
        others = {seq: len(each.tokens) for seq, each in self._sequences.items() if seq != but}
        held = sum(others.values()) - sum(self._commons.borrowed(others).values())
        return self._model.kv_pool_tokens - held

    def _reserve(self, seq: int, tokens: int) -> None:
        """Raises AdmissionRefused if the KV pool has no room for so many tokens and the next one."""
        if self._model.kv_pool_tokens and tokens >= self._free_tokens(but=seq):
            raise AdmissionRefused("the KV pool is full")

    def _stuck(self, quota_tokens: Mapping[int, int]) -> list[SequenceStep]:
        """Who has no room for another token: it is told once, and rests until there is some."""
        told: list[SequenceStep] = []
        if not self._model.kv_pool_tokens:
            return told
        room = self._free_tokens(but=-1)
        for seq in quota_tokens:
            sequence = self._sequences.get(seq)
            if sequence is None or sequence.is_finished:
                continue
            if room < 1 and not sequence.is_stuck:
                told.append(SequenceStep(seq, 0, None, "", stuck=True))
            sequence.is_stuck = room < 1
            room -= 1
        return told

    def _fitting(self, tokens: list[int], held_tokens: int) -> list[int]:
        limit = self.info.context_tokens
        if held_tokens + len(tokens) >= limit:
            raise ContextFull(f"{held_tokens + len(tokens)} tokens leave no room in a window of {limit}")
        return tokens

    def _begin(self, tokens: list[int], computed: int, prompt: Prompt, sampling: Sampling) -> _Sequence:
        prompt_tokens = prompt.prompt_tokens if prompt.tokens else len(tokens)
        limit = prompt_tokens + prompt.max_tokens if prompt.max_tokens else 0
        return _Sequence(tokens, computed, self._seed(sampling), sampling.ignore_eos, limit)

    def _seed(self, sampling: Sampling) -> int:
        return (sampling.seed if sampling.temperature > 0 else 0) ^ self._model.seed

    def _finish(self, sequence: _Sequence) -> Finish | None:
        """Why no token is to follow the last one, if so."""
        length = len(sequence.tokens)
        if sequence.tokens[-1] == END_TOKEN and not sequence.ignore_eos:
            return "stop"
        if 0 < sequence.length_limit <= length:
            return "length"
        return "context" if length >= self.info.context_tokens else None

    def _cached_tokens(self, kv: bytes) -> list[int]:
        """The tokens in a KV state of ours. Raises CheckpointInvalid."""
        head, body, crc = kv[: _KV_HEAD.size], kv[_KV_HEAD.size : -_CRC.size], kv[-_CRC.size :]
        if len(head) < _KV_HEAD.size or crc != _CRC.pack(zlib.crc32(body)):
            raise CheckpointInvalid("the KV state is damaged")
        magic, seed, count, width = _KV_HEAD.unpack(head)
        ours = (_KV_MAGIC, self._model.seed, self.info.kv_bytes_per_token)
        if (magic, seed, width) != ours or len(body) != count * width:
            raise CheckpointInvalid("the KV state is of another model")
        return array("i", body[: 4 * count]).tolist()

    # -- a step ---------------------------------------------------------------------------------

    def _is_over(self, seq: int) -> bool:
        return seq not in self._sequences or self._sequences[seq].is_finished

    def _plan(self, quota_tokens: Mapping[int, int]) -> list[tuple[int, _Sequence, int]]:
        """(seat, sequence, tokens to compute): one for each that decodes, a shared chunk for prompts."""
        room_tokens = self._model.chunk_tokens
        plan = []
        for seq, quota in quota_tokens.items():
            sequence = self._sequences.get(seq)
            if sequence is None or sequence.is_finished or sequence.is_stuck or quota <= 0:
                continue
            count = 1
            if sequence.is_prefill:
                count = min(sequence.pending_tokens, quota, room_tokens)
                room_tokens -= count
            if count:
                plan.append((seq, sequence, count))
        return plan

    def _cost_s(self, plan: Sequence[tuple[int, _Sequence, int]]) -> float:
        model = self._model
        prompt_tokens = sum([count for _, sequence, count in plan if sequence.is_prefill])
        decoding = sum([not sequence.is_prefill for _, sequence, _ in plan])
        kv_tokens = sum([sequence.computed_tokens for _, sequence, _ in plan])
        cost_s = model.base_s + decoding * model.decode_s + prompt_tokens * model.prompt_token_s
        cost_s += kv_tokens * model.kv_token_s
        return cost_s + (self._faults.slow_s if self._steps == self._faults.slow_at_step else 0.0)

    def _pass_time(self, step_s: float) -> float:
        """Sleep; less than `step_s` if the abort flag is raised meanwhile. Returns the time slept."""
        if self._abort_flag is None:
            self._sleep(step_s)
            return step_s
        passed_s = 0.0
        while passed_s < step_s and self._abort_flag[0] == b"\0":
            part_s = min(ABORT_CHECK_S, step_s - passed_s)
            self._sleep(part_s)
            passed_s = step_s if part_s < ABORT_CHECK_S else passed_s + part_s
        return passed_s

    def _advance(self, seq: int, sequence: _Sequence, count: int) -> SequenceStep:
        """Compute `count` tokens of a sequence, and draw one if no known token is left."""
        sequence.computed_tokens += count
        prompt_tokens = count if sequence.is_prefill else 0
        if sequence.pending_tokens:
            return SequenceStep(seq, prompt_tokens, None, "")
        sequence.is_prefill = False
        finish = self._finish(sequence)  # of a replay that had drawn all it may
        token = None if finish else self._draw(sequence)
        finish = finish or self._finish(sequence)
        sequence.is_finished = finish is not None
        return SequenceStep(seq, prompt_tokens, token, "" if token is None else WORDS[token], finish)

    def _draw(self, sequence: _Sequence) -> int:
        bits = hash_step(sequence.seed, len(sequence.tokens), sequence.tokens[-1])
        mean = self._model.mean_tokens
        ends = mean > 0 and not sequence.ignore_eos and (bits >> 32) % mean == 0
        token = END_TOKEN if ends else 2 + bits % (VOCABULARY - 2)
        sequence.tokens.append(token)
        return token

    # -- faults ---------------------------------------------------------------------------------

    def _perhaps_fail(self, call: str, fail_at: int) -> None:
        self._calls[call] = self._calls.get(call, 0) + 1
        if self._calls[call] == fail_at:
            raise error_named(self._faults.fail_with)(f"{call} {fail_at} fails, as planned")

    def _perhaps_break(self) -> None:
        """A step too far stays a step too far: a broken engine does not recover."""
        if 0 < self._faults.hang_at_step <= self._steps:
            self._sleep(HANG_S)
            raise WorkerDied("sim engine hangs, as planned")
        if 0 < self._faults.die_at_step <= self._steps:
            if self._die is not None:
                self._die()
            raise WorkerDied("sim engine died, as planned")


def _info(model: SimModel, options: EngineOptions) -> EngineInfo:
    context_tokens = min(options.context_tokens or model.context_tokens, model.context_tokens)
    sequences = options.sequences or model.sequences
    return EngineInfo(
        context_tokens=context_tokens,
        sequences=sequences,
        weights_bytes=model.weights_bytes,
        kv_bytes_per_token=model.kv_bytes_per_token,
        kv_bytes=model.kv_bytes_per_token * (model.kv_pool_tokens or context_tokens * sequences),
        compute_bytes=model.compute_bytes,
        step_cost_s={n: model.base_s + n * model.decode_s for n in range(1, sequences + 1)},
        prefill_token_s=model.prompt_token_s,
        copy_token_s=model.copy_token_s,
        abortable=True,
    )


def load(model: SimModel, sleep: Callable[[float], None], progress: Progress) -> None:
    """Take the time a load takes. Raises what `refuse_load` names, Interrupted (progress said False)."""
    if model.faults.refuse_load:
        raise error_named(model.faults.refuse_load)("the load is refused, as planned")
    for part in range(1, LOAD_PARTS + 1):
        sleep(model.load_s / LOAD_PARTS)
        if not progress(part / LOAD_PARTS):
            raise Interrupted("load cancelled")


def open_engine(
    path: str, options: EngineOptions, abort_flag: AbortFlag, progress: Progress, log: LogLine
) -> SimEngine:
    """The factory for `drivers.worker`: real time, and faults that hit the whole process."""
    model = read_model(Path(path))
    load(model, time.sleep, progress)
    log("info", f"sim engine with seed {model.seed}")
    return SimEngine(model, options, time.sleep, abort_flag=abort_flag, die=_die_as_process)


def _die_as_process() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


class SimDriver:
    """Opens `SimEngine`s on the dispatcher's own thread.

    `models` are known by file name without a file; `sleep` is where their time passes.
    """

    name = "sim"

    def __init__(
        self,
        devices: Sequence[DeviceInfo],
        *,
        sleep: Callable[[float], None] = time.sleep,
        models: Mapping[str, SimModel] | None = None,
    ) -> None:
        self._devices = tuple(devices)
        self._sleep = sleep
        self._models = dict(models or {})
        self._loads: dict[Path, int] = {}

    def devices(self) -> Sequence[DeviceInfo]:
        return self._devices

    def inspect(self, path: Path) -> ModelInfo:
        model = self._model(path)
        return ModelInfo(
            path=path,
            format="sim",
            architecture="sim",
            file_bytes=model.weights_bytes,
            parameters=model.weights_bytes // 2,
            context_tokens=model.context_tokens,
            quantization="F16",
            kv_bytes_per_token=model.kv_bytes_per_token,
        )

    def free_bytes(self, device: DeviceInfo) -> int | None:
        return None

    def estimate(self, model: ModelInfo, options: EngineOptions, device: DeviceInfo) -> Estimate:
        info = _info(self._model(model.path), options)
        return Estimate(info.weights_bytes, info.kv_bytes, info.compute_bytes)

    def confirm(self, model: ModelInfo, options: EngineOptions, device: DeviceInfo) -> Estimate:
        return self.estimate(model, options, device)

    def open(
        self, model: ModelInfo, device: DeviceInfo, options: EngineOptions, progress: Progress, log: LogLine
    ) -> InlineHost:
        sim = self._model(model.path)
        self._loads[model.path] = self._loads.get(model.path, 0) + 1
        if 0 < sim.faults.first_loads < self._loads[model.path]:
            sim = replace(sim, faults=SimFaults())
        load(sim, self._sleep, progress)
        log("info", f"sim engine with seed {sim.seed} on {device.name}")
        return InlineHost(SimEngine(sim, options, self._sleep))

    def _model(self, path: Path) -> SimModel:
        return self._models.get(path.name) or read_model(path)
