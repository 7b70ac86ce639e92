"""The yardstick in a process of its own: `python -m plugins.benchmarks.rawside FILE NUMBERS`.

A child, as the LLMOS engine is one, so that what the parent does meanwhile costs both the same. It is
idle until a line of JSON says what to compute. It draws as the other side does: the tokens that would end
an answer are excluded, at the same cost, and its context lives as long, so neither meets memory cold.
What still differs: it computes one prompt after the other in whole chunks, and its clock does not count
tokenising, text, and the way of a prompt and of the tokens from one process to another.
Owner: the throughput benchmark. Not here: the loop (drivers.llamacpp.rawloop).
"""

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

from kernel.device import EngineOptions
from kernel.errors import WorkerDied

_ENVIRONMENT = {"OMP_WAIT_POLICY": "PASSIVE", "GGML_NO_BACKTRACE": "1"}  # as drivers.child sets them


@dataclass(frozen=True, slots=True)
class RawAnswer:
    """The output of each prompt; the seconds until each had its first token, and from there to the last."""

    tokens: tuple[tuple[int, ...], ...]
    prefill_s: float
    decode_s: float

    @property
    def elapsed_s(self) -> float:
        return self.prefill_s + self.decode_s


class RawSide:
    """The child, as the parent sees it."""

    def __init__(self, path: Path, options: EngineOptions, on_gpu: bool) -> None:
        numbers = (options.sequences, options.context_tokens, options.threads, int(on_gpu))
        words = [str(path), *map(str, numbers)]
        import_path = os.pathsep.join(entry or str(Path.cwd()) for entry in sys.path)
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-m", "plugins.benchmarks.rawside", *words],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env={**os.environ, **_ENVIRONMENT, "PYTHONPATH": import_path},
            start_new_session=True,  # ^C is for the parent
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._process.kill()
        self._process.communicate()

    @property
    def pid(self) -> int:
        return self._process.pid

    def generate(self, prompts: Sequence[Sequence[int]], output_tokens: int) -> RawAnswer:
        """Continue all prompts together, greedily. Raises WorkerDied."""
        assert self._process.stdin is not None and self._process.stdout is not None
        try:
            self._process.stdin.write(json.dumps([list(map(list, prompts)), output_tokens]).encode() + b"\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            pass  # the end of its output says the same
        line = self._process.stdout.readline()
        if not line:
            raise WorkerDied(f"the raw loop died: exit status {self._process.wait()}")
        tokens, prefill_s, decode_s = json.loads(line)
        return RawAnswer(tuple(map(tuple, tokens)), prefill_s, decode_s)


def main() -> int:
    """Serve until standard input ends."""
    from drivers.llamacpp import rawloop  # imports the native library, after the environment is set

    seats, window_tokens, threads, on_gpu = map(int, sys.argv[2:6])
    loop = rawloop.RawLoop(sys.argv[1], seats, window_tokens, threads, bool(on_gpu))
    for line in sys.stdin:
        prompts, output_tokens = json.loads(line)
        run = loop.generate(prompts, output_tokens, ignore_eos=True)
        print(json.dumps([run.tokens, run.prefill_s, run.decode_s]), flush=True)
    loop.free()
    return 0


if __name__ == "__main__":
    sys.exit(main())
