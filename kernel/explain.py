"""`why`: what a process waits for, why it ended, what share it is due and receives, in words.

Lock: the process table's, held by the caller.
"""

from kernel.models import Model
from kernel.process import Process, Signal, State

_NEXT = {  # under each policy, who gets a seat
    "fair": "the one with the earliest deadline is next: `renice` moves it up",
    "fifo": "who came first is next",
    "rr": "who has waited longest is next",
    "priority": "the one with the lowest nice value is next: `renice` moves it up",
}


def explain(process: Process, model: Model | None, now_s: float) -> tuple[str, ...]:
    """Sentences, the most important first."""
    if not process.alive:
        return _ended(process)
    if process.state is State.STOPPED:
        return (
            "It was stopped.",
            f"`cont {process.pid}` lets it go on where it was.",
            *_share(process, model),
        )
    if process.state is State.SLEEPING:
        return ("It waits for its user to speak.", *_share(process, model), *_failures(process))
    if model is not None and held_out(process, model):
        return ("It was swapped out by hand.", f"`swapin {process.pid}` lets it go on where it was.")
    if model is None or model.host is None:
        return (_loading(process, model),)
    if all(thread.seat is None for thread in process.threads):
        return (_no_seat(model), *_share(process, model))
    return (
        *_at_work(process, model, now_s),
        *_share(process, model),
        *_failures(process),
    )


def _at_work(process: Process, model: Model, now_s: float) -> tuple[str, ...]:
    """With a seat: it draws, computes what it has to know before, or another has the turn."""
    rate, reads = rate_of(process, now_s), _reads(process)
    if rate >= 0.5 or (process.state is State.RUNNING and not reads):
        return (f"It runs: {rate:.0f} output tokens/s now.", *reads)
    if process.state is State.RUNNING:
        return reads
    return (f"It waits for its turn, under the policy {model.queue.policy.name}.", *reads)


def _reads(process: Process) -> tuple[str, ...]:
    """How far it is with its prompt, if that is not computed yet."""
    begun = [thread for thread in process.threads if thread.prefilling]
    if not begun:
        return ()
    what = "its prompt" if len(process.threads) == 1 else f"{len(begun)} prompts"
    if any(len(thread.tokens) > thread.prompt_length for thread in begun):
        what = "again what it has read and said"
    done, known = sum(t.computed for t in begun), sum(len(t.tokens) for t in begun)
    return (f"It computes {what}: {done} of {known} tokens are done.",)


def rate_of(process: Process, now_s: float) -> float:
    """Output tokens per second."""
    return process.rate.per_s(now_s) if process.rate else 0.0


def held_out(process: Process, model: Model) -> bool:
    """Whether it is to stay out of its engine until somebody says otherwise."""
    return process.state is State.SWAPPED and not any(t in model.queue for t in process.threads)


def _ended(process: Process) -> tuple[str, ...]:
    code, error = process.exit_code, process.error
    seconds = (process.ended_s or 0.0) - process.started_s
    what = f"after {seconds:.1f} s and {process.output_tokens} output tokens"
    if error is not None:
        return tuple(filter(None, (f"It failed (exit code {code}) {what}: {error.message}.", error.hint)))
    if code and code > 128:
        return (f"It was ended by the signal {Signal(code - 128).name} (exit code {code}) {what}.",)
    return (f"It ended by itself {what}: {process.items_done} of {process.items} prompts answered.",)


def _loading(process: Process, model: Model | None) -> str:
    if model is None:
        return f"It waits for {process.model}, which nobody loads."
    died = f" again: {model.error.message}" if model.error else ""
    return f"It waits for {model.name} to load{died} ({model.progress:.0%} done)."


def _no_seat(model: Model) -> str:
    waiting, policy = model.users - sum(seat is not None for seat in model.seats), model.queue.policy.name
    return (
        f"It waits for one of the {len(model.seats)} seats of {model.name}; {waiting} processes wait, and "
        f"{_NEXT.get(policy, f'the policy {policy} says who is next')}."
    )


def _share(process: Process, model: Model | None) -> tuple[str, ...]:
    """Due and received, and the part of the model's service that the weight stands for."""
    if model is None:
        return ()
    members = [thread for thread in process.threads if thread in model.queue]
    due = process.share_due + sum(model.queue.due(thread) for thread in members)
    lines = [f"Since it started it received {process.share_received:.0f} of {due:.0f} service units due."]
    if members and model.queue.policy.grouped:
        part = sum(thread.weight for thread in members) / model.queue.weight
        lines.append(f"Nice {process.nice} is due {part:.1%} of {model.name}'s service now.")
    return tuple(lines)


def _failures(process: Process) -> tuple[str, ...]:
    if process.error is None:
        return ()
    return (f"{process.items_failed} prompts failed so far; one of them: {process.error.message}.",)
