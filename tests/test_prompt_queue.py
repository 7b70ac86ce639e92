"""Prompts queued behind a sequence: begun by the engine itself, and told by its steps."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from ggufs import NANO, open_quietly

from drivers.sim import SimEngine
from drivers.simmodel import SimModel
from drivers.worker import WorkerHost
from kernel.device import (
    EngineHost,
    EngineOptions,
    InlineHost,
    Prompt,
    Quantum,
    QuantumEnd,
    Sampling,
    SequenceStep,
)
from kernel.errors import ContextFull, UsageError

WARM = Sampling(temperature=0.9, seed=3)
PLENTY = 100_000
TOO_LONG = Prompt(text="x " * 5000)
EMPTY = Prompt()


def inline_sim(_folder: Path) -> EngineHost:
    model = SimModel(base_s=0.0, decode_s=0.0, prompt_token_s=0.0, mean_tokens=20, context_tokens=512)
    return InlineHost(SimEngine(model, EngineOptions(), lambda seconds: None))


def worker_sim(folder: Path) -> EngineHost:
    path = folder / "nano.sim"
    path.write_text('{"base_s": 0.0001, "mean_tokens": 20, "context_tokens": 512}')
    return spawned("drivers.sim:open_engine", path)


def inline_llama(_folder: Path) -> EngineHost:
    return InlineHost(open_quietly(NANO, EngineOptions(sequences=4)))


def worker_llama(_folder: Path) -> EngineHost:
    return spawned("drivers.llamacpp.engine:open_engine", NANO)


def spawned(factory: str, path: Path) -> WorkerHost:
    options = EngineOptions(sequences=4, threads=1)
    return WorkerHost.spawn(factory, path, options, lambda _fraction: True, lambda _level, _line: None)


Make = Callable[[Path], EngineHost]


@pytest.fixture(params=[inline_sim, worker_sim, inline_llama, worker_llama], ids=lambda make: make.__name__)
def host(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[EngineHost]:
    made = request.param(tmp_path)
    yield made
    made.shutdown()


def asks(text: str, max_tokens: int = 12) -> Prompt:
    return Prompt(text=text, max_tokens=max_tokens)


def run(host: EngineHost, quantum: int, quota: dict[int, int]) -> list[SequenceStep]:
    """All that a quantum tells."""
    host.start(Quantum(quantum, quota))
    told: list[SequenceStep] = []
    while not isinstance(event := host.poll(20.0), QuantumEnd):
        assert event is not None
        told += event.sequences
    return told


def told_of(steps: list[SequenceStep]) -> list[object]:
    """What happened to a sequence, without when: what began or failed, its tokens, why it ended."""
    story: list[object] = []
    for step in steps:
        if step.error is not None:
            story.append(type(step.error))
        if step.opened is not None:
            story.append(step.opened.tokens)
        if step.token is not None:
            story.append(step.token)
        if step.finish is not None:
            story.append(step.finish)
    return story


def answer(host: EngineHost, quantum: int, prompt: Prompt, seq: int = 1) -> list[object]:
    opened = host.open(seq, prompt, WARM)
    return [opened.tokens, *told_of(run(host, quantum, {seq: PLENTY}))]


def test_queued_prompts_are_answered_in_order_as_if_each_were_opened(host: EngineHost) -> None:
    prompts = [asks(f"what about {topic}?") for topic in ("memory", "the disk", "jobs", "me")]
    expected = [answer(host, number, prompt) for number, prompt in enumerate(prompts)]
    first = host.open(0, prompts[0], WARM)
    for prompt in prompts[1:]:
        host.queue(0, prompt, WARM)
    story = [first.tokens, *told_of(run(host, 9, {0: PLENTY}))]
    assert story == [event for each in expected for event in each]
    assert run(host, 10, {0: PLENTY}) == []


def test_a_prompt_queued_after_the_finish_or_on_an_empty_seat_begins(host: EngineHost) -> None:
    expected = answer(host, 1, asks("hello"))
    host.open(0, asks("first", max_tokens=1), WARM)
    run(host, 2, {0: PLENTY})
    for seq in (0, 2):
        host.queue(seq, asks("hello"), WARM)
        assert run(host, 3 + seq, {1: PLENTY}) == []  # it has no quota
        assert told_of(run(host, 13 + seq, {seq: PLENTY})) == expected


def test_prompts_that_cannot_be_are_told_and_passed_over(host: EngineHost) -> None:
    expected = answer(host, 1, asks("hello"))
    host.open(0, asks("first", max_tokens=1), WARM)
    for prompt in (TOO_LONG, EMPTY, asks("hello"), EMPTY):
        host.queue(0, prompt, WARM)
    steps = run(host, 2, {0: PLENTY})
    errors = [step for step in steps if step.error]
    assert told_of(steps)[2:] == [ContextFull, UsageError, *expected, UsageError]
    assert all((step.prompt_tokens, step.token, step.finish) == (0, None, None) for step in errors)
    host.queue(0, asks("hello"), WARM)
    assert told_of(run(host, 3, {0: PLENTY})) == expected


def test_open_and_close_drop_the_queue_and_dump_leaves_it(host: EngineHost) -> None:
    expected = answer(host, 1, asks("hello"))
    host.open(0, asks("first"), WARM)
    host.queue(0, asks("never"), WARM)
    assert answer(host, 2, asks("hello"), seq=0) == expected
    host.queue(0, asks("never"), WARM)
    host.close(0)
    assert run(host, 3, {0: PLENTY}) == []
    opened = host.open(0, asks("hello"), WARM)
    host.queue(0, asks("never"), WARM)
    kv = host.dump(0)
    host.restore(2, Prompt(tokens=opened.tokens, max_tokens=12), WARM, kv)
    host.restore(0, Prompt(tokens=opened.tokens, max_tokens=12), WARM, kv)
    for seq in (0, 2):
        assert [opened.tokens, *told_of(run(host, 4 + seq, {seq: PLENTY}))] == expected


def test_a_failed_open_keeps_the_queue(host: EngineHost) -> None:
    expected = answer(host, 1, asks("hello"))
    host.open(0, asks("first", max_tokens=1), WARM)
    host.queue(0, asks("hello"), WARM)
    with pytest.raises(UsageError):
        host.open(0, EMPTY, WARM)
    assert told_of(run(host, 2, {0: PLENTY}))[2:] == expected


def test_a_fork_has_no_queue_and_its_source_keeps_its_own(host: EngineHost) -> None:
    expected = answer(host, 1, asks("hello"))
    host.open(0, asks("first"), WARM)
    host.queue(0, asks("hello"), WARM)
    host.queue(2, asks("never"), WARM)
    host.fork(0, 2)
    source, twin = (told_of(run(host, 2 + seq, {seq: PLENTY})) for seq in (0, 2))
    assert source == twin + expected


def test_the_next_prompt_begins_in_the_quantum_under_way(host: EngineHost) -> None:
    host.open(0, asks("first", max_tokens=2), WARM)
    host.queue(0, asks("second", max_tokens=2), WARM)
    steps = run(host, 1, {0: PLENTY})
    finish = next(at for at, step in enumerate(steps) if step.finish)
    assert steps[finish + 1].opened is not None
    assert steps[finish + 2].prompt_tokens > 0  # computed in the very step that began it


def test_no_such_seat(host: EngineHost) -> None:
    for seq in (-1, host.info.sequences):
        with pytest.raises(UsageError):
            host.queue(seq, asks("hello"), WARM)


def test_a_fork_draws_in_its_own_way_from_there(host: EngineHost) -> None:
    prompt = asks("tell me a story", max_tokens=30)
    endless = Sampling(temperature=1.5, top_k=0, top_p=1.0, min_p=0.0, seed=1, ignore_eos=True, exact=True)
    other = Sampling(temperature=1.5, top_k=0, top_p=1.0, min_p=0.0, seed=2, ignore_eos=True, exact=True)
    opened = host.open(0, prompt, endless)
    begun = told_of(run(host, 1, {0: len(opened.tokens) + 9}))
    host.fork(0, 1)
    host.fork(0, 2, other)
    same, twin, stranger = (told_of(run(host, 2 + seq, {seq: PLENTY})) for seq in range(3))
    assert same == twin
    assert stranger != same and len(stranger) == len(same)
    history = opened.tokens + tuple(token for token in begun if isinstance(token, int))
    host.open(3, Prompt(tokens=history, prompt_tokens=len(opened.tokens), max_tokens=30), other)
    assert told_of(run(host, 9, {3: PLENTY})) == stranger  # as if the history had been its own
