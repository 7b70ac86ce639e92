"""The sides of `bench throughput`: each does the same work, one after the other, round by round.

Owner: the throughput benchmark. Not here: how often, what is made of it (throughput).
"""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from kernel.errors import KernelFault
from plugins.benchmarks.machine import Machine
from plugins.benchmarks.rawside import RawSide
from plugins.benchmarks.server import Request, Server

Outputs = Sequence[Sequence[int]]


@dataclass(frozen=True, slots=True)
class Run:
    prompts: tuple[tuple[int, ...], ...]
    outputs: tuple[tuple[int, ...], ...]
    elapsed_s: float
    shared_tokens: int = 0

    @property
    def rate(self) -> float:
        return sum(map(len, self.outputs)) / self.elapsed_s


@dataclass(frozen=True, slots=True)
class Rates:
    """Output tokens per second of one side in one round, and the CPU time that the whole took."""

    whole: float
    cpu_s: float
    decode: float | None = None


@dataclass(frozen=True, slots=True)
class Round:
    """All sides, once."""

    ours: Run
    theirs: Outputs  # of the raw loop
    rates: Mapping[str, Rates]


@dataclass(frozen=True, slots=True)
class Sides:
    """Everyone, loaded and idle."""

    machine: Machine
    raw: RawSide
    servers: Mapping[str, Server]
    decode: bool

    def round(self, texts: Sequence[str], output_tokens: int, tell: Callable[[str], None]) -> Round:
        tell("LLMOS")
        begin_s = self._llmos_cpu_s()
        ours = self._llmos(texts, output_tokens)
        cpu_s = self._llmos_cpu_s() - begin_s
        again = self._llmos(texts, output_tokens) if self.decode else None
        rates = {"llmos": Rates(ours.rate, cpu_s, again.rate if again else None)}
        tell("raw loop")
        theirs, rates["raw"] = self._raw(ours, output_tokens)
        for name, server in self.servers.items():
            tell(f"server, {name}")
            begin_s = cpu_s_of(server.pid)
            whole = _ask(server, ours, output_tokens, cached=False)
            cpu_s = cpu_s_of(server.pid) - begin_s
            again_rate = _ask(server, ours, output_tokens, cached=True) if self.decode else None
            rates[name] = Rates(whole, cpu_s, again_rate)
        return Round(ours, theirs, rates)

    def _raw(self, ours: Run, output_tokens: int) -> tuple[Outputs, Rates]:
        begin_s = cpu_s_of(self.raw.pid)
        answer = self.raw.generate(ours.prompts, output_tokens)
        cpu_s = cpu_s_of(self.raw.pid) - begin_s
        tokens = len(ours.prompts) * output_tokens
        decode = (tokens - len(ours.prompts)) / answer.decode_s if self.decode else None
        return answer.tokens, Rates(tokens / answer.elapsed_s, cpu_s, decode)

    def _llmos_cpu_s(self) -> float:
        worker = self.machine.model.worker_pid
        return time.process_time() + (cpu_s_of(worker) if worker else 0.0)

    def _llmos(self, texts: Sequence[str], output_tokens: int) -> Run:
        """Spawn one process per text, and wait for all of them."""
        machine = self.machine
        begin_s = time.perf_counter()
        pids = [machine.system.spawn(machine.spec(text, output_tokens)) for text in texts]
        views = [machine.system.wait(pid) for pid in pids]
        elapsed_s = time.perf_counter() - begin_s
        for view in views:
            if view is None or view.exit_code != 0 or view.output_tokens != output_tokens:
                raise KernelFault(f"a process ended badly: {view.error if view else 'no answer'}")
        threads = [machine.kernel.table.get(pid).threads[0] for pid in pids]
        for pid in pids:
            machine.system.reap(pid)
        return Run(
            tuple(tuple(thread.tokens[: thread.prompt_length]) for thread in threads),
            tuple(tuple(thread.tokens[thread.prompt_length :]) for thread in threads),
            elapsed_s,
            sum(view.shared_tokens for view in views if view is not None),
        )


def _ask(server: Server, ours: Run, output_tokens: int, *, cached: bool) -> float:
    """The server's rate with the same prompts, each on the slot that it had before."""
    asked = [Request(prompt, output_tokens, slot, cached) for slot, prompt in enumerate(ours.prompts)]
    answers = server.ask(asked)
    for prompt, answer in zip(ours.prompts, answers, strict=True):
        if (answer.prompt_tokens, answer.output_tokens) != (len(prompt), output_tokens):
            done = f"{answer.prompt_tokens} + {answer.output_tokens}"
            raise KernelFault(
                f"the server did other work: {done} tokens, not {len(prompt)} + {output_tokens}"
            )
    begin_s, end_s = min(a.begin_s for a in answers), max(a.end_s for a in answers)
    return len(asked) * output_tokens / (end_s - begin_s)


def cpu_s_of(pid: int) -> float:
    """CPU time that a process has used, all threads; in steps of 10 ms."""
    import psutil

    times = psutil.Process(pid).cpu_times()
    return max(0.01, times.user + times.system)
