"""`bench fairness`, `bench latency`, `bench scale`: the commands around what is measured under simulation.

Not here: the measurements (replay, scale).
"""

import argparse
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

from kernel.errors import UsageError
from kernel.policy import POLICIES
from plugins.benchmarks import replay, scale
from plugins.benchmarks.command import Report, benchmark
from plugins.benchmarks.progress import Tell
from shell.registry import Arguments
from shell.render import Column
from shell.session import Shell

Row = tuple[str, Mapping[str, float]]


def _fairness_arguments(parser: Arguments) -> None:
    parser.add(
        "trace", metavar="TRACE", completes=("file",), help="arrival_s,client,prompt_tokens,output_tokens"
    )
    parser.add("--weights", default="", metavar="W,W,...", help="of the clients, in order of name; equal")
    parser.add("--policy", default="fair", choices=sorted(POLICIES), help="fair")
    parser.add("--served", metavar="FILE", completes=("file",), help="write when each request was answered")
    parser.add("--requests", type=int, default=0, metavar="N", help="the first N only")


def _fairness(_shell: Shell, args: argparse.Namespace, tell: Tell) -> Report[Row]:
    served, limit = Path(args.served) if args.served else None, _count(args.requests)
    weights = _weights(args.weights)
    result = replay.fairness(Path(args.trace), weights, args.policy, served, limit, _counting(tell))
    return _report(result, [(args.policy, result)])


def _weights(text: str) -> tuple[float, ...]:
    try:
        weights = tuple(float(word) for word in text.split(",")) if text else ()
    except ValueError:
        weights = (math.nan,)
    if not all(0.001 <= weight <= 1000.0 for weight in weights):
        raise UsageError("--weights are numbers from 0.001 to 1000, parted by commas", "--weights 1,2,3,4")
    return weights


def _latency_arguments(parser: Arguments) -> None:
    parser.add("trace", metavar="TRACE", completes=("file",), help="CSV, or Mooncake's JSON lines")
    parser.add(
        "--requests", type=int, default=replay.LATENCY_REQUESTS, metavar="N", help="the first N; 0: all"
    )
    parser.add("--prefixes", action="store_true", help="share them, as the trace's block hashes say")


def _latency(_shell: Shell, args: argparse.Namespace, tell: Tell) -> Report[Row]:
    result = replay.latency(
        Path(args.trace),
        limit=_count(args.requests),
        shares_prefixes=args.prefixes,
        report=_counting(tell),
    )
    return _report(result, list(result.items()))


def _count(requests: int) -> int:
    if requests < 0:
        raise UsageError("--requests is 0 (all) or more")
    return requests


def _counting(tell: Tell) -> replay.Report:
    return lambda done, of: tell(f"replaying: request {done} of {of}") if done % 20 == 0 else None


def _scale(_shell: Shell, _args: argparse.Namespace, tell: Tell) -> Report[Row]:
    tell("spawning")
    result = scale.scale()
    head = f"{result.bytes_per_process:.0f} bytes per queued process"
    return _report(result.report(), list(result.processes.items()), head)


def _report(value: object, rows: Sequence[Row], head: str = "") -> Report[Row]:
    names = list(rows[0][1])
    columns: list[Column[Row]] = [Column("", lambda row: row[0], keep=99)]
    columns += [
        Column(name.upper(), lambda row, name=name: f"{row[1][name]:.6g}", right=True, keep=90 - at)  # type: ignore[misc]
        for at, name in enumerate(names)
    ]
    return Report(value, columns, rows, head)


FAIRNESS = benchmark(
    "fairness",
    "a trace of overload through the scheduler: how evenly clients are served",
    _fairness,
    _fairness_arguments,
    ("bench fairness trace.csv --weights 1,2,3,4 --served served.csv",),
    notes="Simulated, with a KV pool of 10,000 tokens and 1,350 service units a second; gaps are of the "
    "service from 30 s to 360 s, divided by the clients' weights.",
)

LATENCY = benchmark(
    "latency",
    "a trace through the scheduler: time to first token and between tokens",
    _latency,
    _latency_arguments,
    ("bench latency trace.csv --requests 1000",),
    notes="Simulated, on an engine that the trace loads to 0.8, under fair, fifo and rr.",
)

SCALE = benchmark(
    "scale",
    "what a scheduling decision costs with 1,000 to 100,000 processes",
    _scale,
    examples=("bench scale --json",),
)
