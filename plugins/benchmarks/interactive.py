"""`bench interactive`: what somebody who chats feels while batch jobs keep the machine busy.

A client sends a prompt, reads the answer as it comes, thinks, and sends the next: first with the machine to
itself, then beside batch jobs without end, of which there are as many as seats. LLMOS is told who is who
(nice -10 against 10); llama.cpp's server serves first come, first served. Blocks of the two alternate.
TTFT is from the request to the first text that the client has; then the gaps between what it gets.
Not here: the clients themselves (clients.py).
"""

import argparse
import random
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path

from kernel.errors import UsageError
from plugins.benchmarks.clients import Batch, Client, LlmosClient, Reply, ServerClient
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
from plugins.benchmarks.server import Server, server_argument, server_path
from plugins.benchmarks.spread import Tail
from plugins.benchmarks.throughput import SETTINGS, positive
from shell.registry import Arguments
from shell.render import Column
from shell.session import Shell

AIM_TTFT = 1.5  # p99 beside the batch, over p99 unloaded
AIM_SERVER = 20.0  # the server's p99 over ours
AIM_KEPT = 0.95
PERSON_S = 21.0
"""From an answer to the next prompt: to read 24 words at 238 a minute (Brysbaert, "How many words do we read
per minute?", 2019) and to type 64 characters at 52 words of five a minute (Dhakal et al., "Observations on
typing from 136 million keystrokes", 2018)."""
PROMPT_CHARACTERS = 64
OUTPUT_TOKENS = 32
BATCH_TOKENS = 128  # of each prompt of a batch job
SETTLE_S = 0.5  # after a batch was begun or ended
ALONE_S = 4.0  # how long a batch is watched alone
WARM_UP = 2


@dataclass(frozen=True, slots=True)
class Job:
    """What is measured."""

    path: Path
    requests: int  # of each kind
    blocks: int
    batch: int
    seats: int
    think_s: float  # between an answer and the next prompt, on average
    threads: int = 0
    server: Path | None = None
    settings: str = "default"
    device: str = ""  # "": as the kernel decides

    @property
    def window_tokens(self) -> int:
        return PROMPT_CHARACTERS + BATCH_TOKENS + 16


@dataclass(slots=True)
class Load:
    """Replies beside so much load, and what the batch did meanwhile."""

    replies: list[Reply] = field(default_factory=list)
    elapsed_s: float = 0.0
    batch_tokens: int = 0


@dataclass(slots=True)
class Side:
    """What one side has done so far."""

    unloaded: Load = field(default_factory=Load)
    alone: Load = field(default_factory=Load)  # the batch without the client
    loaded: Load = field(default_factory=Load)


@dataclass(frozen=True, slots=True)
class Row:
    """One side, unloaded or beside the batch."""

    side: str
    loaded: bool
    requests: int
    first_token_s: Tail
    gap_s: Tail
    batch_kept: float | None  # the batch's tokens/s beside the client, over those alone
    all_kept: float | None  # the same with the client's own tokens
    lost_s: float | None  # of the batch's time alone, for each request; does not depend on thinking


def measure(job: Job, tell: Tell) -> list[Row]:
    """Every side, block by block. Raises what loading raises, and KernelFault for an answer that is short."""
    shared = options(job.path, job.seats, job.window_tokens, job.threads)
    with ExitStack() as stack:
        tell("interactive: loading")
        machine = stack.enter_context(booted(job.path, shared, device=job.device))
        clients: list[Client] = [LlmosClient(machine)]
        if job.server:
            words = SETTINGS[job.settings]
            server = Server(job.server, job.path, shared, machine.on_gpu, words)
            clients.append(ServerClient(stack.enter_context(server)))
        sides = {client.name: Side() for client in clients}
        for client in clients:
            _ask(client, "warm-up", WARM_UP, 0.0, Load())
        for block in range(job.blocks):
            for client in clients:
                _block(client, sides[client.name], job, block, tell)
        return [row for name, side in sides.items() for row in _rows(name, side)]


def _block(client: Client, side: Side, job: Job, block: int, tell: Tell) -> None:
    each = -(-job.requests // job.blocks)
    at = f"block {block + 1} of {job.blocks}"
    time.sleep(SETTLE_S)
    tell(f"interactive: {client.name}, unloaded, {at}")
    _ask(client, f"unloaded {block}", each, job.think_s, side.unloaded)
    with _batch(client, job, block) as batch:
        _alone(batch, side.alone, tell, f"interactive: {client.name}, batch alone, {at}")
        tell(f"interactive: {client.name}, beside {job.batch} batch jobs, {at}")
        with _watched(batch, side.loaded):
            _ask(client, f"loaded {block}", each, job.think_s, side.loaded)
        _alone(batch, side.alone, tell, f"interactive: {client.name}, batch alone, {at}")


def _alone(batch: Batch, load: Load, tell: Tell, what: str) -> None:
    """Before and after the client, so that a machine that slows down is not taken for the client's doing."""
    tell(what)
    with _watched(batch, load):
        time.sleep(ALONE_S / 2)


@contextmanager
def _batch(client: Client, job: Job, block: int) -> Iterator[Batch]:
    """Jobs without end, at work when this begins, gone when it ends."""
    batch = client.batch(job.batch, PROMPT_CHARACTERS, BATCH_TOKENS, f"batch {block}")
    try:
        time.sleep(SETTLE_S)
        yield batch
    finally:
        batch.end()


@contextmanager
def _watched(batch: Batch, load: Load) -> Iterator[None]:
    begin_s, tokens = time.monotonic(), batch.tokens()
    yield
    load.elapsed_s += time.monotonic() - begin_s
    load.batch_tokens += batch.tokens() - tokens


def _ask(client: Client, seed: str, requests: int, think_s: float, load: Load) -> None:
    thinking = random.Random(seed)
    for number in range(requests):
        load.replies.append(client.ask(random_text(PROMPT_CHARACTERS, f"{seed} {number}"), OUTPUT_TOKENS))
        time.sleep(thinking.uniform(0.5, 1.5) * think_s)


def _rows(name: str, side: Side) -> list[Row]:
    return [
        Row(
            name,
            load is side.loaded,
            len(load.replies),
            Tail.of([reply.first_token_s for reply in load.replies]),
            Tail.of([gap_s for reply in load.replies for gap_s in reply.gaps_s]),
            *(_kept(side) if load is side.loaded else (None, None, None)),
        )
        for load in (side.unloaded, side.loaded)
    ]


def _kept(side: Side) -> tuple[float, float, float]:
    """Of the batch's rate alone: what the batch kept, what it and the client had together, what it lost."""
    alone = side.alone.batch_tokens / side.alone.elapsed_s
    load, clients = side.loaded, OUTPUT_TOKENS * len(side.loaded.replies)
    kept = load.batch_tokens / load.elapsed_s / alone
    lost_s = (1 - kept) * load.elapsed_s / len(load.replies)
    return kept, (load.batch_tokens + clients) / load.elapsed_s / alone, lost_s


def slowdown(rows: Sequence[Row], side: str) -> float:
    """p99 to the first token beside the batch, over p99 unloaded."""
    by_load = {row.loaded: row for row in rows if row.side == side}
    return by_load[True].first_token_s.p99 / by_load[False].first_token_s.p99


def advantage(rows: Sequence[Row]) -> float | None:
    """The server's p99 to the first token beside the batch, over ours; None without a server."""
    p99_s = {row.side: row.first_token_s.p99 for row in rows if row.loaded}
    return p99_s["server"] / p99_s["LLMOS"] if "server" in p99_s else None


def person_kept(rows: Sequence[Row], side: str) -> float:
    """Of the batch's rate alone, what a client leaves it who reads and types as people do. Not measured: what
    a request takes from it does not depend on what comes between."""
    (lost_s,) = (row.lost_s for row in rows if row.side == side and row.lost_s is not None)
    return 1 - lost_s / PERSON_S


def _arguments(parser: Arguments) -> None:
    model_argument(parser)
    server_argument(parser)
    device_argument(parser)
    parser.add("--requests", type=positive, default=40, metavar="N", help="of each kind on each side; 40")
    parser.add("--blocks", type=positive, default=2, metavar="N", help="that they are divided into; 2")
    parser.add("--batch", type=positive, default=8, metavar="N", help="batch jobs; 8")
    parser.add("--seats", type=positive, default=0, metavar="N", help="on each side; as many as batch jobs")
    parser.add("--think", type=float, default=0.25, metavar="S", help="seconds between two prompts; 0.25")
    parser.add("--threads", type=positive, default=0, metavar="N", help="compute threads of each side")
    parser.add("--settings", choices=list(SETTINGS), default="default", help="of the server")


def _run(shell: Shell, args: argparse.Namespace, tell: Tell) -> Report[Row]:
    if not 0 <= args.think <= 60:
        raise UsageError("bench interactive: --think is 0 to 60 s")
    check_idle(shell)
    server = server_path(args.server)
    path = model_path(shell, args.model, tell)
    job = Job(
        path,
        args.requests,
        args.blocks,
        args.batch,
        args.seats or args.batch,
        args.think,
        args.threads,
        server,
        args.settings,
        args.device,
    )
    rows = measure(job, tell)
    head = f"a client beside {job.batch} batch jobs on {job.seats} seats; ms, p50 / p99 / most"
    return Report(report(job, rows), _COLUMNS, rows, head, _summary(rows))


def _summary(rows: Sequence[Row]) -> str:
    lines = [f"p99 to the first token is {slowdown(rows, 'LLMOS'):.2f} times that of an idle LLMOS"]
    if (times := advantage(rows)) is not None:
        lines.append(f"and {times:.1f} times better than the server's")
    kept = _percent(person_kept(rows, "LLMOS"))
    return f"{', '.join(lines)}\nwho reads and types for {PERSON_S:g} s in between leaves the batch {kept}"


def report(job: Job, rows: Sequence[Row]) -> dict[str, object]:
    """What --json prints."""
    return {
        "model": str(job.path),
        "server": str(job.server) if job.server else None,
        "settings": job.settings,
        "batch": job.batch,
        "seats": job.seats,
        "think_s": job.think_s,
        "threads": job.threads,
        "prompt_characters": PROMPT_CHARACTERS,
        "output_tokens": OUTPUT_TOKENS,
        "batch_tokens": BATCH_TOKENS,
        "aim_slowdown": AIM_TTFT,
        "aim_advantage": AIM_SERVER,
        "aim_kept": AIM_KEPT,
        "slowdown": slowdown(rows, "LLMOS"),
        "advantage": advantage(rows),
        "person_s": PERSON_S,
        "person_kept": person_kept(rows, "LLMOS"),
        "rows": [asdict(row) for row in rows],
    }


def _percent(value: float | None) -> str:
    return "" if value is None else f"{100 * value:.0f} %"


_COLUMNS: list[Column[Row]] = [
    Column("SIDE", lambda row: row.side, keep=99),
    Column("BESIDE", lambda row: "batch" if row.loaded else "nothing", keep=98),
    Column("REQUESTS", lambda row: str(row.requests), right=True, keep=50),
    Column("TO FIRST TOKEN", lambda row: row.first_token_s.text(1, 1000), right=True, keep=90),
    Column("BETWEEN TOKENS", lambda row: row.gap_s.text(1, 1000), right=True, keep=80),
    Column("BATCH KEPT", lambda row: _percent(row.batch_kept), right=True, keep=70),
    Column("WITH CLIENT'S", lambda row: _percent(row.all_kept), right=True, keep=60),
    Column("LOST S", lambda row: "" if row.lost_s is None else f"{row.lost_s:.2f}", right=True, keep=65),
]

SPEC = benchmark(
    "interactive",
    "a client's latency beside batch jobs, against llama.cpp's server",
    _run,
    _arguments,
    (
        "bench interactive --server build/bin/llama-server",
        "bench interactive --seats 9 --requests 100",
    ),
    notes="BATCH KEPT is the batch's tokens/s beside the client, of those alone; WITH CLIENT'S counts the "
    "client's output tokens too; what its prompts cost is in neither. Both depend on how long the client "
    "thinks. LOST S does not: of the batch's time alone, the seconds that one request takes.",
)
