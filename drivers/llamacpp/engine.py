"""The llama.cpp engine: sequences of one model, computed together.

Owner: one thread of one process, usually a worker's. Fills `kernel.device.Engine`. Every argument is
checked before native code sees it. A sequence takes a seat of a slab for as long as it is open.
Not here: time sharing (the kernel), which tokens go into a pass (planner.py), the context (slab.py).
"""

import ctypes
import time
from collections.abc import MutableMapping
from typing import Any, Final

from drivers.llamacpp import kvstate
from drivers.llamacpp.convoys import Convoys
from drivers.llamacpp.loading import Loaded, load
from drivers.llamacpp.passes import Passes
from drivers.llamacpp.prompts import Prompts
from drivers.llamacpp.sampler import Sampler, check
from drivers.llamacpp.sequence import Sequence
from drivers.llamacpp.sharing import Sharing
from drivers.prompt_queue import PromptQueue
from kernel.device import EngineOptions, LogLine, Opened, Progress, Prompt, Sampling, SequenceStep, StepEvent
from kernel.errors import AdmissionRefused, CheckpointInvalid, KernelFault, UsageError

ANSWER_TOKENS: Final = 512  # room that a sequence gets at first for its answer; moving is cheap


def open_engine(
    path: str, options: EngineOptions, abort_flag: Any, progress: Progress, log: LogLine
) -> "LlamaEngine":
    """Load a GGUF file on the CPU.

    `abort_flag` is a writable ctypes buffer of two zero bytes, or None: setting the first (from
    anywhere) cuts the forward pass short that is running, and the pass then clears it. Raises
    ModelNotFound, ModelInvalid, UsageError, AdmissionRefused, Interrupted.
    """
    return LlamaEngine(load(path, options, _flag(abort_flag), progress, log, on_gpu=False))


def open_engine_on_gpu(
    path: str, options: EngineOptions, abort_flag: Any, progress: Progress, log: LogLine
) -> "LlamaEngine":
    """The same on the first GPU that this process sees."""
    return LlamaEngine(load(path, options, _flag(abort_flag), progress, log, on_gpu=True))


def _flag(abort_flag: Any) -> Any:
    if abort_flag is None:
        return ctypes.create_string_buffer(2)
    if ctypes.sizeof(abort_flag) < 2:
        raise UsageError("the abort flag has two bytes")
    return abort_flag


class LlamaEngine:
    """Fills `kernel.device.Engine`."""

    def __init__(self, loaded: Loaded) -> None:
        self.info = loaded.info
        self._weights = loaded.weights
        self._slabs = loaded.slabs
        self._model = loaded.model
        self._sharing = Sharing(loaded.slabs, loaded.costs, loaded.weights.can_roll_back)
        self._convoys = Convoys(self._sharing)
        self._passes = Passes(loaded.weights)
        self._prompts = Prompts(loaded.weights, loaded.info.context_tokens)
        self._sequences: dict[int, Sequence] = {}
        self._complete: list[Sequence] = []  # already when they were opened; not told yet
        self._queue = PromptQueue()
        self._closed = False

    def open(self, seq: int, prompt: Prompt, sampling: Sampling) -> Opened:
        opened = self._open(seq, prompt, sampling)
        self._queue.drop(seq)
        return opened

    def _open(self, seq: int, prompt: Prompt, sampling: Sampling) -> Opened:
        self._check(seq)
        tokens, answer_at = self._prompts.first(prompt)
        sequence = self._start(seq, tokens, answer_at, prompt, sampling, shares=True)
        return Opened(tuple(tokens), sequence.computed)

    def queue(self, seq: int, prompt: Prompt, sampling: Sampling) -> None:
        self._check(seq)
        self._queue.add(seq, prompt, sampling)

    def feed(self, seq: int, prompt: Prompt) -> Opened:
        sequence = self._get(seq)
        added = self._prompts.next(prompt, sequence.tokens)
        tokens = len(sequence.tokens) + len(added)
        if tokens > sequence.slab.window_tokens:
            self._move(sequence, self._need(tokens, tokens, prompt.max_tokens))
        self._forget(sequence)
        if sequence.prompt_tokens < len(sequence.tokens):
            sequence.reply_bounds += (sequence.prompt_tokens, len(sequence.tokens))
        sequence.tokens += added
        sequence.begin_answer(len(sequence.tokens), prompt.max_tokens, self._weights)
        return Opened(tuple(added))

    def fork(self, source: int, target: int, sampling: Sampling | None = None) -> None:
        self._check(target)
        original = self._get(source)
        if source == target:
            raise UsageError(f"sequence {source} cannot be forked onto itself")
        drawn = sampling or original.sampling
        check(drawn)
        tokens, old, family = len(original.tokens), self._sequences.get(target), None
        if not (drawn.exact or original.sampling.exact):
            family = self._slabs.beside(original, original.computed, tokens - original.computed, old)
        need = self._need(tokens, original.prompt_tokens, original.max_tokens)
        room = family or self._slabs.room(need, old)
        self.close(target)
        twin = original.copy(target, drawn, Sampler(drawn))
        seating = self._slabs.arrange(room)
        seat = seating.vacate()
        self._sequences[target] = twin
        seating.enter(twin, seat)
        if twin.finish and not twin.reported:
            self._complete.append(twin)
        if seating.slab.unified:
            seating.slab.share(original.seat, seat, twin.computed)
        elif twin.computed and not twin.slab.write(seat, original.slab.read(original.seat), twin.computed):
            self.close(target)
            raise KernelFault("llama.cpp did not take the state of a sequence")

    def dump(self, seq: int) -> bytes:
        sequence = self._get(seq)
        state = sequence.slab.read(sequence.seat)
        return kvstate.pack(self._model, sequence.tokens[: sequence.computed], state)

    def restore(self, seq: int, prompt: Prompt, sampling: Sampling, kv: bytes) -> Opened:
        self._check(seq)
        tokens, answer_at = self._prompts.replayed(prompt)
        computed, state = kvstate.unpack(self._model, tokens, kv)
        sequence = self._start(seq, tokens, answer_at, prompt, sampling, shares=False)
        self._queue.drop(seq)
        if computed and not sequence.slab.write(sequence.seat, state, computed):
            self.close(seq)
            raise CheckpointInvalid("llama.cpp does not take this KV state")
        sequence.computed = computed
        if computed >= sequence.prompt_tokens:
            sequence.given_tokens = computed  # what is left was drawn, and is computed as any drawn token
        return Opened(tuple(tokens), computed)

    def close(self, seq: int) -> None:
        self._queue.drop(seq)
        self._end(seq)

    def _end(self, seq: int) -> None:
        sequence = self._sequences.pop(seq, None)
        if sequence:
            sequence.sampler.free()
            self._convoys.leave(sequence)
            self._sharing.leave(sequence)
            self._forget(sequence)

    def _forget(self, sequence: Sequence) -> None:
        """There is nothing to be told or done for it any more."""
        for waiting in (self._complete, self._passes.outgrown):
            if sequence in waiting:
                waiting.remove(sequence)
        sequence.stuck = False

    def borrowed_tokens(self) -> dict[int, int]:
        borrowed: dict[int, int] = {}
        for slab in (family.slab for family in self._slabs.families()):
            by_seat = {each.seat: each.id for each in self._sequences.values() if each.slab is slab}
            borrowed |= {by_seat[seat]: tokens for seat, tokens in slab.commons.borrowed(by_seat).items()}
        return borrowed

    def shutdown(self) -> None:
        for seq in list(self._sequences):
            self.close(seq)
        self._closed = True
        self._slabs.free()
        self._weights.free()

    def step(self, quota_tokens: MutableMapping[int, int]) -> StepEvent | None:
        begin_s = time.perf_counter()
        told = self._queue.take_up(quota_tokens, self._is_over, self._open)
        if self._complete:
            told += self._told(quota_tokens)
        if self._passes.outgrown:
            told += self._grow(quota_tokens)
        for family in self._slabs.families():
            while crowded := family.crowded_out(quota_tokens):
                crowded.rests = True
                if crowded not in self._passes.outgrown:
                    self._passes.outgrown.append(crowded)
                told += self._grow(quota_tokens)
        taken, waiting = self._convoys.prepare(quota_tokens)
        told += [SequenceStep(seq, 0, None, "", shared_tokens=tokens) for seq, tokens in taken.items()]
        done = self._pass(quota_tokens, waiting)
        if done is None and not told:
            return None
        return StepEvent(0, time.perf_counter() - begin_s, (*told, *(done or ())))

    def _pass(self, quota_tokens: MutableMapping[int, int], waiting: set[int]) -> list[SequenceStep] | None:
        """One pass of the slab whose turn it is, of those that have something to compute."""
        for seating in self._slabs.in_turn:
            ready = seating.by_seat
            if waiting:
                ready = [each for each in ready if each.id not in waiting]
            chosen = seating.plan(ready, quota_tokens)
            if chosen:
                told = self._passes.run(seating.slab, chosen)
                for done in told:
                    spent = done.prompt_tokens + (done.token is not None)
                    quota_tokens[done.seq] = max(0, quota_tokens[done.seq] - spent)
                self._slabs.had_turn(seating)
                return told
        return None

    def _grow(self, quota_tokens: MutableMapping[int, int]) -> list[SequenceStep]:
        """Move those that have outgrown their seats; who finds no room is told so once, and rests."""
        told: list[SequenceStep] = []
        for sequence in list(self._passes.outgrown):
            if not sequence.rests:  # founding a family has moved it to another seat
                self._forget(sequence)
                continue
            if quota_tokens.get(sequence.id, 0) <= 0:
                continue
            try:
                self._move(sequence, len(sequence.tokens))
            except AdmissionRefused:
                if not sequence.stuck:
                    told.append(SequenceStep(sequence.id, 0, None, "", stuck=True))
                sequence.stuck = True
            else:
                self._forget(sequence)
        return told

    def _move(self, sequence: Sequence, tokens: int) -> None:
        """To a seat for so many tokens. Raises AdmissionRefused; then it sits where it was."""
        if sequence.slab.unified:
            self._convoys.leave(sequence)  # from elsewhere, nobody there can share its cells
        self._slabs.move(sequence, tokens)

    def _is_over(self, seq: int) -> bool:
        """Whether a sequence is not there, or has finished and told it."""
        return seq not in self._sequences or self._sequences[seq].reported

    def _told(self, quota_tokens: MutableMapping[int, int]) -> list[SequenceStep]:
        """Ends that no step has told yet."""
        told: list[SequenceStep] = []
        for sequence in list(self._complete):
            if quota_tokens.get(sequence.id, 0) > 0:
                sequence.reported = True
                self._complete.remove(sequence)
                told.append(SequenceStep(sequence.id, 0, None, "", sequence.finish))
        return told

    def _start(
        self,
        seq: int,
        tokens: list[int],
        answer_at: int,
        prompt: Prompt,
        sampling: Sampling,
        shares: bool,
    ) -> Sequence:
        """Give a checked history a seat; a sequence of that number is ended first.

        If it `shares`, what it has in common with other histories need not be computed again: all but
        two tokens of a prompt (one alone is computed with other last bits), or one that was drawn.
        """
        check(sampling)
        most_tokens = 0 if sampling.exact else len(tokens) - (1 if answer_at < len(tokens) else 2)
        taken_tokens, old = most_tokens if shares else 0, self._sequences.get(seq)
        need = self._need(len(tokens), answer_at, prompt.max_tokens)
        room = self._sharing.family(tokens, taken_tokens, old) or self._slabs.room(need, old)
        self._end(seq)
        seating = self._slabs.arrange(room)
        seat = self._sharing.take(seating, tokens, taken_tokens)
        sequence = Sequence(seq, tokens, 0, 0, self.info.context_tokens, sampling, Sampler(sampling))
        sequence.computed, sequence.shareable_tokens = seat.shared_tokens, most_tokens
        sequence.reply_bounds = prompt.reply_bounds if prompt.tokens else ()
        self._sequences[seq] = sequence
        seating.enter(sequence, seat.number)
        sequence.begin_answer(answer_at, prompt.max_tokens, self._weights)
        if sequence.finish:
            self._complete.append(sequence)
        if seat.kin:
            self._convoys.join(sequence, seat.kin, seat.kin_tokens)
        return sequence

    def _need(self, tokens: int, answer_at: int, max_tokens: int) -> int:
        """Tokens of the seat to look for: the history, and what is left of the answer, within reason."""
        end = answer_at + max_tokens if max_tokens else tokens + ANSWER_TOKENS
        return min(max(tokens, min(end, tokens + ANSWER_TOKENS)), self.info.context_tokens)

    def _check(self, seq: int) -> None:
        if self._closed:
            raise KernelFault("the engine is shut down")
        if not 0 <= seq < self.info.sequences:
            raise UsageError(f"sequence {seq}; this engine has 0 to {self.info.sequences - 1}")

    def _get(self, seq: int) -> Sequence:
        self._check(seq)
        if seq not in self._sequences:
            raise UsageError(f"sequence {seq} is not open")
        return self._sequences[seq]
