"""The llama.cpp engine: sequences of one model, computed together.

Owner: one thread of one process, usually a worker's. Fills `kernel.device.Engine`. Every argument is
checked before native code sees it. A sequence takes a seat of the slab for as long as it is open.
Not here: time sharing (the kernel), which tokens go into a pass (planner.py), the context (slab.py).
"""

import ctypes
import time
from collections.abc import MutableMapping
from pathlib import Path
from typing import Any

import numpy as np

from drivers.llamacpp import estimate, kvstate, layout, native, parts
from drivers.llamacpp.buffers import Buffers, admit
from drivers.llamacpp.calibrate import measure
from drivers.llamacpp.families import Families
from drivers.llamacpp.invariance import is_invariant
from drivers.llamacpp.planner import Plan, Planner
from drivers.llamacpp.prompts import Prompts
from drivers.llamacpp.sampler import Sampler
from drivers.llamacpp.seating import Seating
from drivers.llamacpp.sequence import Sequence
from drivers.llamacpp.slab import Slab
from drivers.llamacpp.weights import Weights, fingerprint
from drivers.prompt_queue import PromptQueue
from kernel.device import (
    EngineInfo,
    EngineOptions,
    LogLine,
    Opened,
    Progress,
    Prompt,
    Sampling,
    SequenceStep,
    StepEvent,
)
from kernel.errors import CheckpointInvalid, KernelFault, UsageError


def open_engine(
    path: str, options: EngineOptions, abort_flag: Any, progress: Progress, log: LogLine
) -> "LlamaEngine":
    """Load a GGUF file on the CPU.

    `abort_flag` is a writable ctypes buffer of two zero bytes, or None: setting the first (from
    anywhere) cuts the forward pass short that is running, and the pass then clears it. Raises
    ModelNotFound, ModelInvalid, UsageError, AdmissionRefused, Interrupted.
    """
    return _open(path, options, abort_flag, progress, log, on_gpu=False)


def open_engine_metal(
    path: str, options: EngineOptions, abort_flag: Any, progress: Progress, log: LogLine
) -> "LlamaEngine":
    """The same on the GPU of the local build."""
    return _open(path, options, abort_flag, progress, log, on_gpu=True)


def _open(
    path: str, options: EngineOptions, abort_flag: Any, progress: Progress, log: LogLine, on_gpu: bool
) -> "LlamaEngine":
    head = parts.read(Path(path))
    decided = layout.decide(head, options, layout.free_ram_bytes(), layout.cores())
    admit(estimate.estimate(head, decided, on_gpu).total_bytes)
    buffers = Buffers()
    native.start(log, buffers.hear)
    weights = Weights(path, on_gpu, progress)
    slab: Slab | None = None
    try:
        slab = Slab(weights, decided, _flag(abort_flag))
        costs = measure(slab)
    except BaseException:
        if slab:
            slab.free()
        weights.free()
        raise
    info = EngineInfo(
        context_tokens=slab.window_tokens,
        sequences=slab.seats,
        weights_bytes=weights.bytes + buffers.repacked_bytes,
        kv_bytes_per_token=buffers.kv_bytes // (slab.window_tokens * slab.seats),
        kv_bytes=buffers.kv_bytes,
        compute_bytes=buffers.compute_bytes,
        step_cost_s=costs.step_s,
        prefill_token_s=costs.prefill_token_s,
    )
    seating = Seating(slab, costs, weights.can_roll_back)
    exact_alone = on_gpu or not weights.can_roll_back or not is_invariant(head)
    planner = Planner(slab.capacity_tokens, exact_alone)
    return LlamaEngine(weights, slab, info, seating, planner, fingerprint(head))


def _flag(abort_flag: Any) -> Any:
    if abort_flag is None:
        return ctypes.create_string_buffer(2)
    if ctypes.sizeof(abort_flag) < 2:
        raise UsageError("the abort flag has two bytes")
    return abort_flag


class LlamaEngine:
    """Fills `kernel.device.Engine`."""

    def __init__(
        self,
        weights: Weights,
        slab: Slab,
        info: EngineInfo,
        seating: Seating,
        planner: Planner,
        model: bytes,
    ) -> None:
        self.info = info
        self._weights = weights
        self._slab = slab
        self._seating = seating
        self._planner = planner
        self._families = Families(seating)
        self._model = model
        self._prompts = Prompts(weights, info.context_tokens)
        self._ends = np.array(sorted(weights.ends), np.intp)
        self._sequences: dict[int, Sequence] = {}
        self._queue = PromptQueue()
        self._closed = False

    def open(self, seq: int, prompt: Prompt, sampling: Sampling) -> Opened:
        opened = self._open(seq, prompt, sampling)
        self._queue.drop(seq)
        return opened

    def _open(self, seq: int, prompt: Prompt, sampling: Sampling) -> Opened:
        self._check(seq)
        tokens, answer_at = self._prompts.first(prompt)
        sequence = self._start(seq, tokens, answer_at, prompt.max_tokens, sampling, shares=True)
        return Opened(tuple(tokens), sequence.computed)

    def queue(self, seq: int, prompt: Prompt, sampling: Sampling) -> None:
        self._check(seq)
        self._queue.add(seq, prompt, sampling)

    def feed(self, seq: int, prompt: Prompt) -> Opened:
        sequence = self._get(seq)
        added = self._prompts.next(prompt, sequence.tokens)
        sequence.tokens += added
        sequence.begin_answer(len(sequence.tokens), prompt.max_tokens, self._weights)
        return Opened(tuple(added))

    def fork(self, source: int, target: int, sampling: Sampling | None = None) -> None:
        self._check(target)
        original = self._get(source)
        if source == target:
            raise UsageError(f"sequence {source} cannot be forked onto itself")
        sampler = Sampler(sampling or original.sampling)
        self.close(target)
        twin = original.copy(target, self._seating.take((), 0).number, sampling or original.sampling, sampler)
        self._enter(twin)
        if twin.computed and not self._slab.write(twin.seat, self._slab.read(original.seat), twin.computed):
            self.close(target)
            raise KernelFault("llama.cpp did not take the state of a sequence")

    def dump(self, seq: int) -> bytes:
        sequence = self._get(seq)
        return kvstate.pack(self._model, sequence.tokens[: sequence.computed], self._slab.read(sequence.seat))

    def restore(self, seq: int, prompt: Prompt, sampling: Sampling, kv: bytes) -> Opened:
        self._check(seq)
        tokens, answer_at = self._prompts.replayed(prompt)
        computed, state = kvstate.unpack(self._model, tokens, kv)
        sequence = self._start(seq, tokens, answer_at, prompt.max_tokens, sampling, shares=False)
        self._queue.drop(seq)
        if computed and not self._slab.write(sequence.seat, state, computed):
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
            self._families.leave(sequence)
            self._seating.leave(sequence)

    def shutdown(self) -> None:
        for seq in list(self._sequences):
            self.close(seq)
        self._closed = True
        self._slab.free()
        self._weights.free()

    def step(self, quota_tokens: MutableMapping[int, int]) -> StepEvent | None:
        begin_s = time.perf_counter()
        told = self._queue.take_up(quota_tokens, self._is_over, self._open) + self._told(quota_tokens)
        taken, waiting = self._families.prepare(quota_tokens)
        told += [SequenceStep(seq, 0, None, "", shared_tokens=tokens) for seq, tokens in taken.items()]
        seated = self._seating.by_seat
        ready = [each for each in seated if each.id not in waiting] if waiting else seated
        chosen = self._planner.plan(ready, quota_tokens)
        if chosen:
            rows = self._slab.compute(chosen)
            told += self._aborted(chosen) if rows is None else self._drawn(chosen, rows)
            for done in told:
                spent = done.prompt_tokens + (done.token is not None)
                quota_tokens[done.seq] = max(0, quota_tokens[done.seq] - spent)
        elif not told:
            return None
        return StepEvent(0, time.perf_counter() - begin_s, tuple(told))

    def _is_over(self, seq: int) -> bool:
        """Whether a sequence is not there, or has finished and told it."""
        return seq not in self._sequences or self._sequences[seq].reported

    def _told(self, quota_tokens: MutableMapping[int, int]) -> list[SequenceStep]:
        """Ends that no step has told yet: histories that were complete when they were opened."""
        told: list[SequenceStep] = []
        for sequence in self._seating.by_seat:
            if sequence.finish and not sequence.reported and quota_tokens.get(sequence.id, 0) > 0:
                sequence.reported = True
                told.append(SequenceStep(sequence.id, 0, None, "", sequence.finish))
        return told

    def _drawn(self, chosen: Plan, rows: list[int]) -> list[SequenceStep]:
        """After a pass: draw a token for every sequence that is computed to its end."""
        told: list[SequenceStep] = []
        ready = [sequence for sequence, count in chosen if sequence.computed + count == len(sequence.tokens)]
        tokens = iter(self._draw(ready, rows) if ready else ())
        for sequence, count in chosen:
            given = sequence.given_tokens - sequence.computed
            prompt_tokens = 0 if given <= 0 else min(given, count)
            sequence.computed += count
            if sequence.computed < len(sequence.tokens):
                told.append(SequenceStep(sequence.id, prompt_tokens, None, ""))
                continue
            token = next(tokens)
            text = sequence.append(token, self._weights)
            sequence.reported = sequence.finish is not None
            told.append(SequenceStep(sequence.id, prompt_tokens, token, text, sequence.finish))
        return told

    def _draw(self, ready: list[Sequence], rows: list[int]) -> list[int]:
        logits = self._slab.logits()[: len(ready)]
        for index, sequence in enumerate(ready):
            if sequence.sampler.edits:
                sequence.sampler.edit(logits[index], sequence.tokens, self._ends)
        if all(sequence.sampler.greedy for sequence in ready):
            return logits.argmax(axis=1).tolist()  # type: ignore[no-any-return]
        return [
            int(logits[index].argmax())
            if sequence.sampler.greedy
            else sequence.sampler.draw(self._slab.context, rows[index], len(sequence.tokens))
            for index, sequence in enumerate(ready)
        ]

    def _aborted(self, chosen: Plan) -> list[SequenceStep]:
        """After a pass that was cut short: keep what was finished, but for what a draw still needs."""
        told: list[SequenceStep] = []
        for sequence, count in chosen:
            before = sequence.computed
            done = self._slab.computed(sequence.seat)
            if sequence.sampling.exact and not before + count == done < len(sequence.tokens):
                done = before  # its chunks have one shape
                self._slab.cut(sequence.seat, done)
            elif done == len(sequence.tokens):  # its logits are lost: compute the end once more
                done = max(before, done - min(count, 2))
                self._slab.cut(sequence.seat, done)
            if not self._weights.can_roll_back and done < before + count:
                done = 0
                self._slab.cut(sequence.seat, 0)
            sequence.computed = done
            if done > before:
                told.append(SequenceStep(sequence.id, min(done, sequence.given_tokens) - before, None, ""))
        return told

    def _start(
        self,
        seq: int,
        tokens: list[int],
        answer_at: int,
        max_tokens: int,
        sampling: Sampling,
        shares: bool,
    ) -> Sequence:
        """Give a checked history a seat; a sequence of that number is ended first.

        If it `shares`, what it has in common with other histories need not be computed again: all but
        two tokens of a prompt (one alone is computed with other last bits), or one that was drawn.
        """
        sampler = Sampler(sampling)
        self._end(seq)
        most_tokens = 0 if sampling.exact else len(tokens) - (1 if answer_at < len(tokens) else 2)
        seat = self._seating.take(tokens, most_tokens if shares else 0)
        window = self.info.context_tokens
        sequence = Sequence(seq, seat.number, tokens, 0, 0, window, sampling, sampler, seat.shared_tokens)
        sequence.shareable_tokens = most_tokens
        sequence.begin_answer(answer_at, max_tokens, self._weights)
        if seat.kin:
            self._families.join(sequence, seat.kin, seat.kin_tokens)
        self._enter(sequence)
        return sequence

    def _enter(self, sequence: Sequence) -> None:
        self._sequences[sequence.id] = sequence
        self._seating.enter(sequence)

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
