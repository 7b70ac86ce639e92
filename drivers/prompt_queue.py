"""Prompts that wait for the one before them: what `Engine.queue` asks of an engine.

Owner: one engine, on its thread. Not here: what beginning a prompt takes (the engine's `open`).
"""

from collections import deque
from collections.abc import Callable, Mapping

from kernel.device import Opened, Prompt, Sampling, SequenceStep
from kernel.errors import AdmissionRefused, LlmosError, WorkerDied

Begin = Callable[[int, Prompt, Sampling], Opened]


class PromptQueue:
    """First in, first out, for each sequence of an engine."""

    def __init__(self) -> None:
        self._waiting: dict[int, deque[tuple[Prompt, Sampling]]] = {}  # none is empty
        self._told_stuck: set[int] = set()

    def add(self, seq: int, prompt: Prompt, sampling: Sampling) -> None:
        self._waiting.setdefault(seq, deque()).append((prompt, sampling))

    def drop(self, seq: int) -> None:
        self._waiting.pop(seq, None)
        self._told_stuck.discard(seq)

    def clear(self) -> None:
        self._waiting.clear()
        self._told_stuck.clear()

    def take_up(
        self, quota_tokens: Mapping[int, int], is_over: Callable[[int], bool], begin: Begin
    ) -> list[SequenceStep]:
        """Begin the next prompt of each sequence that is over and has quota left; returns what to tell."""
        if not self._waiting:
            return []
        due = [seq for seq in self._waiting if quota_tokens.get(seq, 0) > 0 and is_over(seq)]
        return [told for seq in due for told in self._next_of(seq, begin)]

    def _next_of(self, seq: int, begin: Begin) -> list[SequenceStep]:
        """The first that can be begun; those before it could not. One that lacks KV memory stays first."""
        waiting = self._waiting[seq]
        told: list[SequenceStep] = []
        while waiting and not (told and told[-1].opened):
            try:
                told.append(SequenceStep(seq, 0, None, "", opened=begin(seq, *waiting[0])))
            except WorkerDied:
                raise
            except AdmissionRefused:
                return [*told, *self._stuck(seq)]
            except LlmosError as error:
                told.append(SequenceStep(seq, 0, None, "", error=error))
            waiting.popleft()
            self._told_stuck.discard(seq)
        if not waiting:
            self.drop(seq)
        return told

    def _stuck(self, seq: int) -> list[SequenceStep]:
        """Told once: who hears it frees memory, or closes the sequence."""
        if seq in self._told_stuck:
            return []
        self._told_stuck.add(seq)
        return [SequenceStep(seq, 0, None, "", stuck=True)]
