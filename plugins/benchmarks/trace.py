"""Request traces: reading, writing, making them, and measuring how fairly one was served.

Not here: serving one (replay).
"""

import csv
import json
import math
import random
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from kernel.errors import LlmosError, UsageError
from kernel.fairness import OUTPUT_UNITS, PROMPT_UNITS

WINDOW_S = (30.0, 360.0)
"""When fairness is measured: all clients are backlogged, and the start is over."""

BLOCK_TOKENS = 512
"""Of Mooncake's traces (Qin et al., FAST 2025): equal hashes mean equal blocks after equal beginnings."""

MOST_TOKENS = 1_000_000
"""Of a prompt or an answer: more than any model's window."""

SERVED_COLUMNS = ("arrival_s", "client", "prompt_tokens", "output_tokens", "first_token_s", "finish_s")


@dataclass(frozen=True, slots=True)
class Request:
    """One request of a trace."""

    arrival_s: float
    client: str
    prompt_tokens: int
    output_tokens: int
    blocks: tuple[int, ...] = ()  # what its prompt is made of, BLOCK_TOKENS each; (): nobody else's words

    def prompt(self) -> str:
        """As many words; what two requests' blocks have in common, their prompts have."""
        words = [f"{part}{block} " for block in self.blocks for part in "ab" * (BLOCK_TOKENS // 2)]
        return "".join(words[: self.prompt_tokens]) + "w " * (self.prompt_tokens - len(words))


@dataclass(frozen=True, slots=True)
class Served:
    """When a request was answered, in seconds of the trace."""

    request: Request
    first_token_s: float
    finish_s: float


def read_trace(path: Path, limit: int = 0) -> list[Request]:
    """The first `limit` requests (0: all) of a CSV with the columns arrival_s, client, prompt_tokens and
    output_tokens, or of Mooncake's JSON lines. Raises UsageError, LlmosError (not readable)."""
    rows = _jsonl_requests if path.suffix == ".jsonl" else _csv_requests
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            requests = list(islice(rows(file), limit or None))
    except OSError as error:
        raise LlmosError(f"cannot read {path}: {error.strerror}") from None
    except (KeyError, TypeError, ValueError) as error:
        raise UsageError(
            f"{path} is not a trace: {error}", "columns: " + ", ".join(SERVED_COLUMNS[:4])
        ) from None
    if not requests:
        raise UsageError(f"{path} has no requests")
    return sorted(requests, key=lambda request: request.arrival_s)


def _csv_requests(file: Iterable[str]) -> Iterator[Request]:
    rows = csv.DictReader(file)
    for row in rows:
        with _told_with(rows.line_num):
            tokens = int(row["prompt_tokens"]), int(row["output_tokens"])
            yield _request(float(row["arrival_s"]), row["client"], *tokens)


def _jsonl_requests(file: Iterable[str]) -> Iterator[Request]:
    for number, line in enumerate(file, 1):
        with _told_with(number):
            row = json.loads(line)
            tokens, blocks = (row["input_length"], row["output_length"]), tuple(row.get("hash_ids", ()))
            yield _request(row["timestamp"] / 1000, "0", *tokens, blocks)


@contextmanager
def _told_with(line_number: int) -> Iterator[None]:
    """What is wrong with a row, and which it is."""
    try:
        yield
    except KeyError as error:
        raise ValueError(f"line {line_number}: no column {error}") from None
    except (TypeError, ValueError) as error:
        raise ValueError(f"line {line_number}: {error}") from None


def _request(
    arrival_s: float, client: str, prompt_tokens: int, output_tokens: int, blocks: tuple[int, ...] = ()
) -> Request:
    """Raises ValueError."""
    if not 0 <= arrival_s < math.inf:
        raise ValueError(f"arrival_s is {arrival_s}")
    for tokens in (prompt_tokens, output_tokens):
        if not isinstance(tokens, int) or not 0 <= tokens <= MOST_TOKENS:
            raise ValueError(f"{tokens} tokens; 0 to {MOST_TOKENS}")
    return Request(arrival_s, client, max(1, prompt_tokens), max(1, output_tokens), blocks)


def check_writable(path: Path) -> None:
    """Now, not after minutes of work. Raises LlmosError."""
    try:
        path.open("a").close()
    except (OSError, ValueError) as error:
        raise LlmosError(f"cannot write {path}: {getattr(error, 'strerror', None) or error}") from None


def write_served(path: Path, served: Iterable[Served]) -> None:
    """Raises LlmosError."""
    try:
        with path.open("w", newline="", encoding="utf-8") as file:
            out = csv.writer(file, lineterminator="\n")
            out.writerow(SERVED_COLUMNS)
            for each in served:
                r = each.request
                times = (f"{each.first_token_s:.3f}", f"{each.finish_s:.3f}")
                out.writerow((f"{r.arrival_s:.3f}", r.client, r.prompt_tokens, r.output_tokens, *times))
    except OSError as error:
        raise LlmosError(f"cannot write {path}: {error.strerror}") from None


def overload(
    rates: Mapping[str, float], duration_s: float, tokens: tuple[int, int] = (256, 256), seed: int = 1
) -> list[Request]:
    """Clients that each send requests of one size as a Poisson process of so many a second."""
    rng, requests = random.Random(seed), []
    for client, rate in rates.items():
        at_s = rng.expovariate(rate)
        while at_s < duration_s:
            requests.append(Request(at_s, client, *tokens))
            at_s += rng.expovariate(rate)
    return sorted(requests, key=lambda request: request.arrival_s)


@dataclass(frozen=True, slots=True)
class Gap:
    """How evenly clients were served in the window, each client's service divided by its weight."""

    max_gap: float  # service units: the largest difference between two clients at any time
    jain: float  # (sum x)^2 / (n sum x^2), 1 if all are equal
    worst_share_error: float  # relative
    service_units_per_s: float


def gap(
    served: Sequence[Served], weights: Mapping[str, float], window_s: tuple[float, float] = WINDOW_S
) -> Gap:
    """Of what clients saw: a prompt counts when its first token comes, outputs evenly until the finish.

    The measure of the VTC paper (Sheng et al., OSDI 2024, sections 3 and 5), of cumulative service from
    the start of the window on. Raises UsageError if nothing was served in the window.
    """
    events: list[tuple[float, str, float]] = []
    for each in served:
        request, first_s = each.request, each.first_token_s
        token_s = (each.finish_s - first_s) / max(1, request.output_tokens - 1)
        events.append((first_s, request.client, request.prompt_tokens * PROMPT_UNITS))
        events += [
            (first_s + token_s * n, request.client, OUTPUT_UNITS) for n in range(request.output_tokens)
        ]
    events.sort()
    meter = Meter(weights, window_s)
    for event in events:
        meter.count(*event)
    return meter.gap()


class Meter:
    """Cumulative service by client, and the largest gap so far."""

    def __init__(self, weights: Mapping[str, float], window_s: tuple[float, float] = WINDOW_S) -> None:
        self.weights = weights
        self.start_s, self.end_s = window_s
        self.max_gap = 0.0
        self._units = dict.fromkeys(weights, 0.0)
        self._base: dict[str, float] | None = None

    def count(self, at_s: float, client: str, units: float) -> None:
        """Service of a client; times never fall. What comes after the window is not counted."""
        if at_s > self.end_s:
            return
        self._units[client] += units
        if at_s > self.start_s:
            self._base = self._base or dict(self._units)
            norm = self._normed(self._base)
            self.max_gap = max(self.max_gap, max(norm) - min(norm))

    def gap(self) -> Gap:
        """Raises UsageError."""
        norm = self._normed(self._base or self._units)
        total = sum(x * w for x, w in zip(norm, self.weights.values(), strict=True))
        if not total:
            raise UsageError(f"nothing was served from {self.start_s:.0f} s to {self.end_s:.0f} s")
        mean = total / sum(self.weights.values())
        jain = sum(norm) ** 2 / (len(norm) * sum(x * x for x in norm))
        error = max(abs(x / mean - 1) for x in norm)
        return Gap(self.max_gap, jain, error, total / (self.end_s - self.start_s))

    def _normed(self, base: Mapping[str, float]) -> list[float]:
        units = self._units
        return [(units[client] - base[client]) / weight for client, weight in self.weights.items()]
