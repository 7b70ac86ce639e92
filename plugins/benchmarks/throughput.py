"""`bench throughput`: output tokens per second of N processes, against a bare loop and llama.cpp's server.

All sides compute the same prompts on the same file with as many seats, window and threads, in a child
process each, one after the other in one run, round by round. The clock runs from before the first spawn (or
request), with the model loaded, to the end of the last: tokenising, prompts, sampling, text, and the stagger
of starts are in it. The raw side's runs from its first prompt token to its last output token.
Of long contexts, decode is measured too: the same once more, with the prompts found in the KV cache.
CPU ratios compare the CPU time of the processes that do the work (of LLMOS both, kernel and worker): who
else uses the machine hardly touches them, but what overlaps counts in full.
"""

import argparse
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path

from plugins.benchmarks.command import Report, benchmark
from plugins.benchmarks.machine import (
    booted,
    check_idle,
    device_argument,
    model_argument,
    model_path,
    options,
    random_text,
)
from plugins.benchmarks.progress import Tell
from plugins.benchmarks.rawside import RawSide
from plugins.benchmarks.server import Server, server_argument, server_path
from plugins.benchmarks.sides import Outputs, Round, Sides
from plugins.benchmarks.spread import Spread
from shell.registry import Arguments
from shell.render import Column
from shell.session import Shell

AIM = 0.99
AIM_SERVER = 1.0
AIM_SERVER_LONG = 2.0  # of 16 sequences
CONTEXTS = {"short": (64, 128), "long": (1000, 64)}  # characters of the prompt, output tokens
SETTINGS: Mapping[str, tuple[str, ...]] = {
    "default": (),
    "no-flash": ("-fa", "off"),
    "unified": ("-kvu",),
}
WARM_UP = (64, 8)


@dataclass(frozen=True, slots=True)
class ServerRow:
    """llama.cpp's server with one choice of settings. Ratios are LLMOS to it."""

    settings: str
    tokens_per_s: float
    ratio: Spread
    cpu_ratio: Spread
    decode_ratio: Spread | None


@dataclass(frozen=True, slots=True)
class Row:
    """One number of sequences. Rates are output tokens per second, all sequences together."""

    sequences: int
    prompt_tokens: int  # of all sequences together
    llmos_tokens_per_s: float
    raw_tokens_per_s: float
    ratio: Spread  # of the pairs, LLMOS to raw
    cpu_ratio: Spread
    decode_ratio: Spread | None
    same_outputs: bool
    identical_sequences: int  # of `sequences`, in the worst repetition
    identical_tokens: int  # per sequence, before the first that differs
    shared_tokens: int  # prompt tokens that LLMOS found in its KV cache, at most in one repetition
    servers: tuple[ServerRow, ...] = ()

    @property
    def best_server(self) -> ServerRow | None:
        """The settings with which the server is fastest."""
        return max(self.servers, key=lambda each: each.tokens_per_s, default=None)


@dataclass(frozen=True, slots=True)
class Job:
    """What all sides compute."""

    path: Path
    prompt_characters: int
    output_tokens: int
    repeat: int
    threads: int = 0  # 0: as the driver decides
    decode: bool = False  # whether decode is measured by itself
    server: Path | None = None
    settings: tuple[str, ...] = ()
    device: str = ""  # "": as the kernel decides


def measure(job: Job, sequences: int, tell: Tell) -> Row:
    """Run all sides in turn. Raises KernelFault if a process does not end well, or one did other work."""
    window_tokens = max(sum(WARM_UP), job.prompt_characters + job.output_tokens) + 16
    shared = options(job.path, sequences, window_tokens, job.threads)
    tell(f"throughput: loading for {sequences} sequences")
    with ExitStack() as stack:
        machine = stack.enter_context(booted(job.path, shared, device=job.device))
        raw = stack.enter_context(RawSide(job.path, shared, machine.on_gpu))
        servers: dict[str, Server] = {}
        if job.server:
            for name in job.settings:
                server = Server(job.server, job.path, shared, machine.on_gpu, SETTINGS[name])
                servers[name] = stack.enter_context(server)
        sides = Sides(machine, raw, servers, job.decode)
        sides.round(_texts(sequences, WARM_UP[0], "warm-up"), WARM_UP[1], tell)
        rounds = []
        for number in range(job.repeat):

            def telling(side: str, at: int = number + 1) -> None:
                tell(f"throughput: {sequences} sequences, {side}, {at} of {job.repeat}")

            texts = _texts(sequences, job.prompt_characters, str(number))
            rounds.append(sides.round(texts, job.output_tokens, telling))
    return _row(rounds)


def _texts(sequences: int, length: int, seed: str) -> list[str]:
    """Prompts that nobody has had before: LLMOS keeps prefixes, and would save what others compute."""
    return [random_text(length, f"{seed} {each}") for each in range(sequences)]


def _row(rounds: Sequence[Round]) -> Row:
    first = rounds[0]
    agreed = [compare(each.ours.outputs, each.theirs) for each in rounds]
    sequences = len(first.theirs)
    identical = min(count for count, _ in agreed)
    return Row(
        sequences=sequences,
        prompt_tokens=sum(map(len, first.ours.prompts)),
        llmos_tokens_per_s=_middle(rounds, "llmos"),
        raw_tokens_per_s=_middle(rounds, "raw"),
        ratio=_ratio(rounds, "raw"),
        cpu_ratio=_cpu_ratio(rounds, "raw"),
        decode_ratio=_decode_ratio(rounds, "raw"),
        same_outputs=identical == sequences,
        identical_sequences=identical,
        identical_tokens=min(tokens for _, tokens in agreed),
        shared_tokens=max(each.ours.shared_tokens for each in rounds),
        servers=tuple(
            ServerRow(
                name,
                _middle(rounds, name),
                _ratio(rounds, name),
                _cpu_ratio(rounds, name),
                _decode_ratio(rounds, name),
            )
            for name in first.rates
            if name in SETTINGS
        ),
    )


def _middle(rounds: Sequence[Round], side: str) -> float:
    return Spread.of([each.rates[side].whole for each in rounds]).median


def _ratio(rounds: Sequence[Round], side: str) -> Spread:
    return Spread.of([each.rates["llmos"].whole / each.rates[side].whole for each in rounds])


def _cpu_ratio(rounds: Sequence[Round], side: str) -> Spread:
    return Spread.of([each.rates[side].cpu_s / each.rates["llmos"].cpu_s for each in rounds])


def _decode_ratio(rounds: Sequence[Round], side: str) -> Spread | None:
    pairs = [(each.rates["llmos"].decode, each.rates[side].decode) for each in rounds]
    ratios = [ours / theirs for ours, theirs in pairs if ours and theirs]
    return Spread.of(ratios) if ratios else None


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


def settings(text: str) -> tuple[str, ...]:
    """`default,unified`, for argparse."""
    names = tuple(text.split(","))
    if unknown := [name for name in names if name not in SETTINGS]:
        raise argparse.ArgumentTypeError(f"no settings `{unknown[0]}`; there are {', '.join(SETTINGS)}")
    return names


def _arguments(parser: Arguments) -> None:
    model_argument(parser)
    server_argument(parser)
    device_argument(parser)
    told = "short: prompts of 64 characters and 128 tokens; long: 1000 and 64, and decode by itself"
    parser.add("--context", choices=sorted(CONTEXTS), default="short", help=told)
    parser.add("--sequences", type=counts, default=(1, 4, 16), metavar="N,N", help="processes; 1,4,16")
    parser.add("--tokens", type=positive, default=0, metavar="N", help="output tokens of each")
    parser.add("--prompt", type=positive, default=0, metavar="N", help="characters of each prompt")
    parser.add("--threads", type=positive, default=0, metavar="N", help="compute threads of all sides")
    parser.add("--repeat", type=positive, default=3, metavar="R", help="rounds; 3")
    told = f"of the server: {', '.join(SETTINGS)}; default,no-flash"
    parser.add("--settings", type=settings, default=("default", "no-flash"), metavar="S,S", help=told)


def _job(path: Path, server: Path | None, args: argparse.Namespace) -> Job:
    prompt, tokens = CONTEXTS[args.context]
    return Job(
        path,
        args.prompt or prompt,
        args.tokens or tokens,
        args.repeat,
        args.threads,
        args.context == "long",
        server,
        args.settings,
        args.device,
    )


def _run(shell: Shell, args: argparse.Namespace, tell: Tell) -> Report[Row]:
    check_idle(shell)
    server = server_path(args.server)
    path = model_path(shell, args.model, tell)
    job = _job(path, server, args)
    rows = [measure(job, sequences, tell) for sequences in args.sequences]
    lengths = f"{job.prompt_characters} characters + {job.output_tokens} tokens"
    head = f"output tokens/s on {job.path.name}, {lengths} each; ratios are LLMOS to the other"
    columns = _COLUMNS + (_SERVER_COLUMNS if job.server else [])
    columns = [c for c in columns if job.decode or "DECODE" not in c.header]
    return Report(report(job, rows), columns, rows, head)


def report(job: Job, rows: Sequence[Row]) -> dict[str, object]:
    """What --json prints."""
    return {
        "model": str(job.path),
        "prompt_characters": job.prompt_characters,
        "output_tokens": job.output_tokens,
        "repeat": job.repeat,
        "threads": job.threads,
        "server": str(job.server) if job.server else None,
        "aim_ratio": AIM,
        "aim_server_ratio": AIM_SERVER,
        "aim_server_ratio_of_16_long": AIM_SERVER_LONG,
        "same_outputs": all(row.same_outputs for row in rows),
        "rows": [asdict(row) for row in rows],
    }


def _same(row: Row) -> str:
    if row.same_outputs:
        return "all"
    return f"{row.identical_sequences} of {row.sequences}, {row.identical_tokens} tokens"


def _server(text: Callable[[ServerRow], str]) -> Callable[[Row], str]:
    return lambda row: text(row.best_server) if row.best_server else ""


def _text(spread: Spread | None) -> str:
    return spread.text() if spread else ""


_COLUMNS: list[Column[Row]] = [
    Column("SEQUENCES", lambda row: str(row.sequences), right=True, keep=90),
    Column("LLMOS", lambda row: f"{row.llmos_tokens_per_s:.1f}", right=True, keep=60),
    Column("RAW", lambda row: f"{row.raw_tokens_per_s:.1f}", right=True, keep=50),
    Column("RATIO", lambda row: row.ratio.text(3), right=True, keep=99),
    Column("BY CPU", lambda row: f"{row.cpu_ratio.median:.2f}", right=True, keep=75),
    Column("DECODE", lambda row: _text(row.decode_ratio), right=True, keep=80),
    Column("SAME", _same, keep=70),
]

_SERVER_COLUMNS: list[Column[Row]] = [
    Column("SERVER", _server(lambda best: f"{best.tokens_per_s:.1f}"), right=True, keep=55),
    Column("RATIO TO SERVER", _server(lambda best: best.ratio.text()), right=True, keep=98),
    Column("BY CPU", _server(lambda best: f"{best.cpu_ratio.median:.2f}"), right=True, keep=74),
    Column("DECODE TO SERVER", _server(lambda best: _text(best.decode_ratio)), right=True, keep=79),
    Column("SETTINGS", _server(lambda best: best.settings), keep=40),
]

SPEC = benchmark(
    "throughput",
    "tokens/s of N processes, as a ratio to a bare loop and to llama.cpp's server",
    _run,
    _arguments,
    (
        "bench throughput --sequences 1,8 --repeat 5",
        "bench throughput --server build/bin/llama-server --context long --sequences 16 --repeat 1",
    ),
    notes="The server is compared with where there is one. Of its settings, the fastest in each row counts; "
    "--json has all of them. Each long round computes 1000 tokens per sequence on every side.",
)
