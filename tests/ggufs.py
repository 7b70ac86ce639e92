"""Small models for tests: random weights, equal on every machine, written once per test session."""

import ctypes
import os
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from drivers.llamacpp.engine import LlamaEngine, open_engine, open_engine_on_gpu
from drivers.llamacpp.writer import Recipe, write_random
from kernel.device import EngineOptions, Prompt, Sampling, SequenceStep

NANO = Path(__file__).parents[1] / "llmos" / "builtin" / "nano.gguf"
SMALL = Recipe()
DEFAULTS = EngineOptions()
GREEDY = Sampling(temperature=0)
PLENTY = 1_000_000


def write(folder: Path, recipe: Recipe = SMALL) -> Path:
    """The model of this recipe, in `folder`."""
    path = folder / f"{zlib.crc32(repr(recipe).encode()):08x}.gguf"
    if not path.exists():
        write_random(path, recipe)
    return path


def open_quietly(path: Path, options: EngineOptions = DEFAULTS, flag: Any = None) -> LlamaEngine:
    opened = open_engine_on_gpu if os.environ.get("LLMOS_TEST_GPU") else open_engine
    return opened(str(path), options, flag, lambda _fraction: True, lambda _level, _line: None)


def new_flag() -> Any:
    """An abort flag, as the worker shares it."""
    return (ctypes.c_char * 2)()


def steps(engine: LlamaEngine, *seqs: int, quota: int = PLENTY) -> Iterator[SequenceStep]:
    """Run these sequences until none has anything to compute."""
    quota_tokens = dict.fromkeys(seqs, quota)
    while event := engine.step(quota_tokens):
        yield from event.sequences


def run(engine: LlamaEngine, *seqs: int) -> dict[int, tuple[list[int], str, str | None]]:
    """(tokens, text, finish) of each sequence, run to its end."""
    done: dict[int, tuple[list[int], str, str | None]] = {seq: ([], "", None) for seq in seqs}
    for step in steps(engine, *seqs):
        tokens, text, _ = done[step.seq]
        if step.token is not None:
            tokens.append(step.token)
        done[step.seq] = (tokens, text + step.text, step.finish)
    return done


def solo(
    engine: LlamaEngine, prompt: Prompt, sampling: Sampling = GREEDY, seq: int = 0
) -> tuple[list[int], str, str | None]:
    """Open a prompt, run it alone to its end, close it."""
    engine.open(seq, prompt, sampling)
    answer = run(engine, seq)[seq]
    engine.close(seq)
    return answer
