"""`bench throughput`: output tokens per second of N processes, against a bare loop over llama.cpp.

Both sides compute the same prompts on the same file with as many seats, window and threads, in a child
process each, one after the other in one run, the order alternating. The clock runs from before the first
spawn, with the model loaded, to the end of the last process: spawning, tokenising, prompts, sampling and
the stagger of starts are in it. The raw side's runs from its first prompt token to its last output token.
"""

import argparse
import json
import random
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from kernel.errors import KernelFault
from plugins.benchmarks.machine import Machine, booted, check_idle, model_argument, model_path, options
from plugins.benchmarks.progress import Tell, progress
from plugins.benchmarks.rawside import RawSide
from plugins.benchmarks.spread import Spread
from shell.registry import Arguments, CommandSpec
from shell.render import Column, write_table
from shell.session import Shell

AIM = 0.97
_LETTERS = "abcdefghijklmnopqrstuvwxyz     "

Outputs = Sequence[Sequence[int]]


@dataclass(frozen=True, slots=True)
class Row:
    """One number of sequences. Rates are output tokens per second, all sequences together."""

    sequences: int
    llmos_tokens_per_s: float
    raw_tokens_per_s: float
    ratio: Spread  # of the pairs, LLMOS to raw
    same_outputs: bool
    identical_sequences: int  # of `sequences`, in the worst repetition
    identical_tokens: int  # per sequence, before the first that differs
    shared_tokens: int  # prompt tokens that LLMOS found in its KV cache, at most in one repetition


@dataclass(frozen=True, slots=True)
class Job:
    """What both sides compute."""

    path: Path
    prompt_characters: int
    output_tokens: int
    repeat: int
    threads: int = 0  # 0: as the driver decides


@dataclass(frozen=True, slots=True)
class _Run:
    prompts: tuple[tuple[int, ...], ...]
    outputs: tuple[tuple[int, ...], ...]
    elapsed_s: float
    shared_tokens: int = 0


def measure(job: Job, sequences: int, tell: Tell) -> Row:
    """Run both sides in turn. Raises KernelFault if a process does not end well."""
    window_tokens = job.prompt_characters + job.output_tokens + 16
    shared = options(job.path, sequences, window_tokens, job.threads)
    pairs: list[tuple[_Run, _Run]] = []
    tell(f"throughput: loading for {sequences} sequences")
    with booted(job.path, shared) as machine, RawSide(job.path, shared) as raw:
        for number in range(job.repeat + 1):
            texts = [_text(job.prompt_characters, f"{number} {each}") for each in range(sequences)]
            tell(f"throughput: {sequences} sequences, LLMOS, {number} of {job.repeat}")
            ours = _llmos(machine, texts, job.output_tokens)
            tell(f"throughput: {sequences} sequences, raw loop, {number} of {job.repeat}")
            answer = raw.generate(ours.prompts, job.output_tokens)
            pairs.append((ours, _Run(ours.prompts, answer.tokens, answer.elapsed_s)))
    return _row(pairs[1:])  # the first pair warmed caches


def _llmos(machine: Machine, texts: Sequence[str], output_tokens: int) -> _Run:
    """Spawn one process per text, and wait for all of them."""
    begin_s = time.perf_counter()
    pids = [machine.system.spawn(machine.spec(text, output_tokens)) for text in texts]
    views = [machine.system.wait(pid) for pid in pids]
    elapsed_s = time.perf_counter() - begin_s
    for view in views:
        if view is None or view.exit_code != 0:
            raise KernelFault(f"a process ended badly: {view.error if view else 'no answer'}")
    threads = [machine.kernel.table.get(pid).threads[0] for pid in pids]
    for pid in pids:
        machine.system.reap(pid)
    return _Run(
        tuple(tuple(thread.tokens[: thread.prompt_length]) for thread in threads),
        tuple(tuple(thread.tokens[thread.prompt_length :]) for thread in threads),
        elapsed_s,
        sum(view.shared_tokens for view in views if view is not None),
    )


def _text(length: int, seed: str) -> str:
    """A prompt that no sequence has had before: kept prefixes would save LLMOS what the raw loop computes."""
    return "".join(random.Random(seed).choices(_LETTERS, k=length - 1)) + "."


def _row(pairs: Sequence[tuple[_Run, _Run]]) -> Row:
    agreed = [compare(ours.outputs, theirs.outputs) for ours, theirs in pairs]
    sequences = len(pairs[0][0].outputs)
    identical = min(count for count, _ in agreed)
    return Row(
        sequences=sequences,
        llmos_tokens_per_s=Spread.of([_rate(ours) for ours, _ in pairs]).median,
        raw_tokens_per_s=Spread.of([_rate(theirs) for _, theirs in pairs]).median,
        ratio=Spread.of([_rate(ours) / _rate(theirs) for ours, theirs in pairs]),
        same_outputs=identical == sequences,
        identical_sequences=identical,
        identical_tokens=min(tokens for _, tokens in agreed),
        shared_tokens=max(ours.shared_tokens for ours, _ in pairs),
    )


def _rate(run: _Run) -> float:
    return sum(map(len, run.outputs)) / run.elapsed_s


def compare(ours: Outputs, theirs: Outputs) -> tuple[int, int]:
    """How many sequences are identical, and the tokens that every sequence has in common at its start."""
    pairs = [(list(a), list(b)) for a, b in zip(ours, theirs, strict=True)]
    return sum(a == b for a, b in pairs), min(_agreed(a, b) for a, b in pairs)


def _agreed(ours: Sequence[int], theirs: Sequence[int]) -> int:
    for place, (a, b) in enumerate(zip(ours, theirs, strict=False)):
        if a != b:
            return place
    return min(len(ours), len(theirs))


def counts(text: str) -> tuple[int, ...]:
    """`1,4,16`, for argparse."""
    numbers = tuple(int(part) for part in text.split(","))
    if not all(1 <= number <= 256 for number in numbers):
        raise argparse.ArgumentTypeError("between 1 and 256 sequences")
    return numbers


def positive(text: str) -> int:
    """A whole number above 0, for argparse."""
    if (number := int(text)) < 1:
        raise argparse.ArgumentTypeError(f"`{text}` is not above 0")
    return number


def _arguments(parser: Arguments) -> None:
    model_argument(parser)
    parser.add("--sequences", type=counts, default=(1, 4, 16), metavar="N,N", help="processes; 1,4,16")
    parser.add("--tokens", type=positive, default=128, metavar="N", help="output tokens of each; 128")
    parser.add("--prompt", type=positive, default=64, metavar="N", help="characters of each prompt; 64")
    parser.add("--threads", type=positive, default=0, metavar="N", help="compute threads of both sides")
    parser.add("--repeat", type=positive, default=5, metavar="R", help="pairs of runs; 5")
    parser.add("--json", action="store_true", help="one object")


def _run(shell: Shell, args: argparse.Namespace) -> int:
    check_idle(shell)
    with progress(shell.err) as tell:
        path = model_path(shell, args.model, tell)
        job = Job(path, args.prompt, args.tokens, args.repeat, args.threads)
        rows = [measure(job, sequences, tell) for sequences in args.sequences]
    if args.json or shell.json:
        shell.out.line(json.dumps(report(job, rows)))
        return 0
    lengths = f"{job.prompt_characters} characters + {job.output_tokens} tokens"
    shell.out.line(f"output tokens/s on {job.path.name}, {lengths} each")
    write_table(shell.out, _COLUMNS, rows)
    return 0


def report(job: Job, rows: Sequence[Row]) -> dict[str, object]:
    """What --json prints."""
    return {
        "model": str(job.path),
        "prompt_characters": job.prompt_characters,
        "output_tokens": job.output_tokens,
        "repeat": job.repeat,
        "threads": job.threads,
        "aim_ratio": AIM,
        "same_outputs": all(row.same_outputs for row in rows),
        "rows": [asdict(row) for row in rows],
    }


def _same(row: Row) -> str:
    if row.same_outputs:
        return "all"
    return f"{row.identical_sequences} of {row.sequences}, {row.identical_tokens} tokens"


_COLUMNS: list[Column[Row]] = [
    Column("SEQUENCES", lambda row: str(row.sequences), right=True, keep=90),
    Column("LLMOS", lambda row: f"{row.llmos_tokens_per_s:.1f}", right=True, keep=60),
    Column("RAW", lambda row: f"{row.raw_tokens_per_s:.1f}", right=True, keep=50),
    Column("RATIO", lambda row: row.ratio.text(3), right=True, keep=99),
    Column("SAME OUTPUT", _same, keep=70),
]

SPEC = CommandSpec(
    "bench throughput",
    "tokens/s of N processes, as a ratio to a bare loop over the same llama.cpp calls",
    _run,
    _arguments,
    ("bench throughput --sequences 1,8 --repeat 3",),
)
