"""One forward pass: compute what was planned, draw, and tell what became of each sequence.

Owner: the engine. Not here: what to compute (planner.py), the native calls (slab.py, sampler.py).
"""

import numpy as np
import numpy.typing as npt

from drivers.llamacpp.planner import Plan
from drivers.llamacpp.sequence import Sequence
from drivers.llamacpp.slab import Slab
from drivers.llamacpp.weights import Weights
from kernel.device import SequenceStep


class Passes:
    """Runs passes on the slabs of one model."""

    def __init__(self, weights: Weights) -> None:
        self.outgrown: list[Sequence] = []  # those that wait for a larger seat
        self._weights = weights
        self._ends = np.array(sorted(weights.ends), np.intp)

    def run(self, slab: Slab, chosen: Plan) -> list[SequenceStep]:
        rows = slab.compute(chosen)
        return self._aborted(slab, chosen) if rows is None else self._drawn(slab, chosen, rows)

    def _drawn(self, slab: Slab, chosen: Plan, rows: list[int]) -> list[SequenceStep]:
        """Draw a token for every sequence that is computed to its end."""
        told: list[SequenceStep] = []
        ready = [sequence for sequence, count in chosen if sequence.computed + count == len(sequence.tokens)]
        tokens = iter(self.draw(slab, ready, rows) if ready else ())
        for sequence, count in chosen:
            given = sequence.given_tokens - sequence.computed
            prompt_tokens = 0 if given <= 0 else min(given, count)
            sequence.computed += count
            if sequence.computed < len(sequence.tokens):
                told.append(SequenceStep(sequence.id, prompt_tokens, None, ""))
                continue
            token = next(tokens)
            text = sequence.append(token, self._weights)
            if sequence.rests:
                self._rested(sequence)
            told.append(SequenceStep(sequence.id, prompt_tokens, token, text, sequence.finish))
        return told

    def _rested(self, sequence: Sequence) -> None:
        sequence.reported = sequence.finish is not None
        if not sequence.reported:
            self.outgrown.append(sequence)

    def draw(self, slab: Slab, ready: list[Sequence], rows: list[int]) -> list[int]:
        """The next tokens, from the logits of the last pass."""
        logits = slab.logits()[: len(ready)]
        for index, sequence in enumerate(ready):
            if sequence.sampler.edits:
                sequence.sampler.edit(logits[index], sequence.tokens, self._ends)
        if all(sequence.sampler.greedy for sequence in ready):
            return logits.argmax(axis=1).tolist()  # type: ignore[no-any-return]
        return [
            _arg_max(logits[index])
            if sequence.sampler.greedy
            else sequence.sampler.draw(slab.context, rows[index], len(sequence.tokens))
            for index, sequence in enumerate(ready)
        ]

    def _aborted(self, slab: Slab, chosen: Plan) -> list[SequenceStep]:
        """After a pass that was cut short: keep what was finished, but for what a draw still needs."""
        told: list[SequenceStep] = []
        for sequence, count in chosen:
            before = sequence.computed
            done = slab.computed(sequence.seat)
            if sequence.sampling.exact and not before + count == done < len(sequence.tokens):
                done = before  # its chunks have one shape
                slab.cut(sequence.seat, done)
            elif done == len(sequence.tokens):  # its logits are lost: compute the end once more
                done = max(before, done - min(count, 2))
                slab.cut(sequence.seat, done)
            if not self._weights.can_roll_back and done < before + count:
                done = 0
                slab.cut(sequence.seat, 0)
            sequence.computed = done
            if done > before:
                told.append(SequenceStep(sequence.id, min(done, sequence.given_tokens) - before, None, ""))
        return told


def _arg_max(row: npt.NDArray[np.float32]) -> int:
    return int(row.argmax())
