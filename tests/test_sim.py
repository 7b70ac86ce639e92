"""The simulated engine: pure tokens, exact time, honest KV states, and faults when asked for."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from drivers.sim import END_TOKEN, HANG_S, SimDriver, SimEngine
from drivers.simmodel import SimFaults, SimModel
from kernel.device import (
    DeviceInfo,
    EngineHost,
    EngineOptions,
    Prompt,
    Quantum,
    QuantumEnd,
    Sampling,
    SequenceStep,
    StepEvent,
)
from kernel.errors import (
    AdmissionRefused,
    CheckpointInvalid,
    ContextFull,
    Interrupted,
    ModelInvalid,
    ModelNotFound,
    UsageError,
    WorkerDied,
)

ENDLESS = SimModel(mean_tokens=0)
WORD = Prompt(text="word")


class Hand:
    """A hand-fed clock: sleeping is what moves it."""

    def __init__(self) -> None:
        self.now_s = 0.0

    def sleep(self, seconds: float) -> None:
        self.now_s += seconds


def engine_of(model: SimModel = ENDLESS, hand: Hand | None = None, **options: int) -> SimEngine:
    return SimEngine(model, EngineOptions(**options), (hand or Hand()).sleep)


def run(engine: SimEngine, quota: dict[int, int]) -> list[SequenceStep]:
    """All that happens until the quotas are used up or nothing is left to run."""
    steps: list[SequenceStep] = []
    while event := engine.step(quota):
        steps += event.sequences
    return steps


def drawn(steps: list[SequenceStep], seq: int) -> list[int]:
    return [step.token for step in steps if step.seq == seq and step.token is not None]


def alone(seed: int, words: int, count: int) -> list[int]:
    engine = engine_of()
    engine.open(0, Prompt(text="word " * words), Sampling(seed=seed))
    return drawn(run(engine, {0: words - 1 + count}), 0)


@given(
    chunk_tokens=st.integers(1, 9),
    quanta=st.lists(st.dictionaries(st.integers(0, 3), st.integers(0, 7)), max_size=12),
)
def test_tokens_do_not_depend_on_neighbours_chunks_or_quotas(
    chunk_tokens: int, quanta: list[dict[int, int]]
) -> None:
    engine = engine_of(replace(ENDLESS, chunk_tokens=chunk_tokens))
    for seq in range(4):
        engine.open(seq, Prompt(text="word " * (seq * 5 + 1)), Sampling(seed=seq))
    steps = [step for quota in quanta for step in run(engine, dict(quota))]
    for seq in range(4):
        tokens = drawn(steps, seq)
        assert tokens == alone(seq, seq * 5 + 1, len(tokens))


def test_quota_counts_every_token_computed() -> None:
    engine = engine_of(replace(ENDLESS, chunk_tokens=4))
    engine.open(0, Prompt(text="word " * 10), Sampling())
    quota = {0: 13, 7: 5}
    counts = [(step.prompt_tokens, step.token is not None) for step in run(engine, quota)]
    assert counts == [(4, False), (4, False), (2, True), (0, True), (0, True), (0, True)]
    assert quota == {0: 0, 7: 5}  # nobody sits in 7


def test_step_time_is_the_model_of_it_and_passes_on_the_clock() -> None:
    model = replace(ENDLESS, base_s=1.0, decode_s=0.1, prompt_token_s=0.01, kv_token_s=0.001)
    hand = Hand()
    engine = engine_of(model, hand)
    engine.open(0, Prompt(text="word " * 50), Sampling())
    engine.open(1, Prompt(text="word " * 50), Sampling())
    prefill, decode = engine.step({0: 50, 1: 50}), engine.step({0: 1, 1: 1})
    assert prefill is not None and decode is not None
    assert prefill.step_s == pytest.approx(1.0 + 100 * 0.01)
    assert decode.step_s == pytest.approx(1.0 + 2 * 0.1 + 100 * 0.001)
    assert hand.now_s == prefill.step_s + decode.step_s


def test_shared_prefixes_cost_nothing_and_change_no_token() -> None:
    engine = engine_of(replace(ENDLESS, shares_prefixes=True), sequences=4)
    system, chat = "word " * 40, [Prompt(text="word " * 40 + f"{name} asks", max_tokens=5) for name in "ab"]
    assert engine.open(0, chat[0], Sampling(seed=1)).shared_tokens == 0
    first = drawn(run(engine, {0: 100}), 0)
    engine.close(0)
    opened = engine.open(1, chat[1], Sampling(seed=1))  # from one that is closed
    assert (opened.shared_tokens, len(opened.tokens)) == (40, 42)
    steps = run(engine, {1: 100})
    assert sum(step.prompt_tokens for step in steps) == 2
    plain = engine_of(sequences=4)
    plain.open(1, chat[1], Sampling(seed=1))
    assert drawn(steps, 1) == drawn(run(plain, {1: 100}), 1)
    assert engine.open(2, chat[0], Sampling(seed=1)).shared_tokens == 41  # all but the last
    assert drawn(run(engine, {2: 100}), 2) == first
    engine.open(0, WORD, Sampling())  # on the seat that was left
    engine.close(2)
    engine.open(2, WORD, Sampling())
    assert engine.open(3, chat[0], Sampling()).shared_tokens == 40  # what is overwritten is not shared
    assert engine.open(3, Prompt(text="quite other " + system), Sampling()).shared_tokens == 0


def test_sequences_end_for_each_of_the_three_reasons() -> None:
    engine = engine_of(SimModel(mean_tokens=20), context_tokens=50)
    ends = {}
    for seed in range(20):
        engine.open(0, WORD, Sampling(seed=seed))
        last = run(engine, {0: 1000})[-1]
        assert (last.finish == "stop") == (last.token == END_TOKEN)
        ends[last.finish] = seed
        assert engine.step({0: 10}) is None
    assert set(ends) == {"stop", "context"}
    engine.open(0, replace(WORD, max_tokens=7), Sampling(ignore_eos=True))
    steps = run(engine, {0: 1000})
    assert (len(drawn(steps, 0)), steps[-1].finish) == (7, "length")


def test_length_of_answers_has_the_mean_that_was_asked_for() -> None:
    engine = engine_of(SimModel(mean_tokens=30))
    lengths = []
    for seed in range(400):
        engine.open(0, WORD, Sampling(seed=seed))
        lengths.append(len(drawn(run(engine, {0: 4000}), 0)))
    assert 25 < sum(lengths) / len(lengths) < 35


def test_fork_goes_the_same_way_and_its_own() -> None:
    engine = engine_of()
    engine.open(0, WORD, Sampling(seed=3))
    run(engine, {0: 10})
    engine.fork(0, 1)
    steps = run(engine, {0: 5, 1: 10})
    assert drawn(steps, 1)[:5] == drawn(steps, 0)
    engine.close(0)
    assert drawn(run(engine, {0: 5, 1: 5}), 0) == []


@given(count=st.integers(0, 30), prompt_words=st.integers(1, 20))
def test_restored_and_replayed_sequences_go_on_alike(count: int, prompt_words: int) -> None:
    engine = engine_of(replace(ENDLESS, chunk_tokens=7))
    opened = engine.open(0, Prompt(text="word " * prompt_words, max_tokens=40), Sampling(seed=9))
    tokens = [*opened.tokens, *drawn(run(engine, {0: count}), 0)]
    known = Prompt(tokens=tuple(tokens), prompt_tokens=prompt_words, max_tokens=40)
    restored = engine.restore(1, known, Sampling(seed=9), engine.dump(0))
    assert restored.shared_tokens == min(count, prompt_words + 40 - 1)
    engine.open(2, known, Sampling(seed=9))
    steps = run(engine, dict.fromkeys(range(3), 1000))
    assert drawn(steps, 0) == drawn(steps, 1) == drawn(steps, 2) != []
    assert [step.finish for step in steps if step.finish] == ["length"] * 3


def test_chat_turn_is_computed_and_answered() -> None:
    engine = engine_of()
    engine.open(0, Prompt(messages=(("user", "hello there"),), max_tokens=3), Sampling())
    run(engine, {0: 100})
    turn = engine.feed(0, Prompt(messages=(("user", "and now"),), max_tokens=4))
    steps = run(engine, {0: 100})
    assert len(turn.tokens) == 4  # role mark, role, two words
    assert steps[0].prompt_tokens == 5  # with the last token of the answer before
    assert (len(drawn(steps, 0)), steps[-1].finish) == (4, "length")


def test_dump_has_the_size_of_the_kv_it_stands_for() -> None:
    engine = engine_of(replace(ENDLESS, kv_bytes_per_token=512))
    engine.open(0, Prompt(text="word " * 100), Sampling())
    run(engine, {0: 100})
    assert 100 * 512 <= len(engine.dump(0)) < 100 * 512 + 64


@given(at=st.integers(0, 10_000), flip=st.integers(1, 255), cut=st.booleans())
def test_damaged_kv_is_refused_and_nothing_is_open(at: int, flip: int, cut: bool) -> None:
    engine = engine_of(replace(ENDLESS, kv_bytes_per_token=16))
    opened = engine.open(0, Prompt(text="word " * 20), Sampling())
    run(engine, {0: 10})
    kv = bytearray(engine.dump(0))
    if cut:
        del kv[at % len(kv) :]
    else:
        kv[at % len(kv)] ^= flip
    with pytest.raises(CheckpointInvalid):
        engine.restore(0, Prompt(tokens=opened.tokens, prompt_tokens=20), Sampling(), bytes(kv))
    assert engine.step({0: 5}) is None


def test_kv_of_other_tokens_or_another_model_is_refused() -> None:
    engine = engine_of()
    engine.open(0, WORD, Sampling())
    run(engine, {0: 10})
    for target, prompt in ((engine, Prompt(text="different")), (engine_of(replace(ENDLESS, seed=2)), WORD)):
        with pytest.raises(CheckpointInvalid):
            target.restore(1, prompt, Sampling(), engine.dump(0))


@pytest.mark.parametrize(
    ("call", "error"),
    [
        (lambda e: e.open(0, Prompt(), Sampling()), UsageError),
        (lambda e: e.open(0, Prompt(tokens=(4096,)), Sampling()), UsageError),
        (lambda e: e.open(2, WORD, Sampling()), UsageError),
        (lambda e: e.open(0, Prompt(text="word " * 8), Sampling()), ContextFull),
        (lambda e: e.feed(1, Prompt(text="word " * 7)), ContextFull),
        (lambda e: e.feed(0, WORD), UsageError),
        (lambda e: e.fork(1, 2), UsageError),
        (lambda e: e.fork(1, 1), UsageError),
        (lambda e: e.dump(0), UsageError),
    ],
)
def test_wrong_calls_raise_and_change_nothing(
    call: Callable[[SimEngine], object], error: type[Exception]
) -> None:
    engine = engine_of(context_tokens=8, sequences=2)
    engine.open(1, WORD, Sampling(seed=1))
    with pytest.raises(error):
        call(engine)
    assert drawn(run(engine, {0: 5, 1: 5}), 1) == alone(1, 1, 5)


# -- faults -------------------------------------------------------------------------------------

CPU = DeviceInfo("cpu", "sim", "a simulated processor", 1 << 30)


def opened_by_driver(model: SimModel, hand: Hand, driver: SimDriver | None = None) -> EngineHost:
    driver = driver or SimDriver([CPU], sleep=hand.sleep, models={"nano.sim": model})
    info = driver.inspect(Path("nano.sim"))
    return driver.open(info, CPU, EngineOptions(), lambda fraction: True, lambda level, line: None)


def test_death_and_hang_raise_and_stay() -> None:
    for faults, passed_s in ((SimFaults(die_at_step=3), 0.0), (SimFaults(hang_at_step=3), HANG_S)):
        hand = Hand()
        host = opened_by_driver(replace(ENDLESS, base_s=0.0, decode_s=0.0, faults=faults), hand)
        host.open(0, WORD, Sampling())
        host.start(Quantum(1, {0: 10}))
        assert [isinstance(host.poll(), StepEvent) for _ in range(2)] == [True, True]
        started_s = hand.now_s
        for _ in range(2):
            with pytest.raises(WorkerDied):
                host.poll()
        assert hand.now_s - started_s >= passed_s


def test_nth_call_fails_with_the_error_named_and_the_next_works() -> None:
    faults = SimFaults(fail_open_at=2, fail_dump_at=1, fail_restore_at=1, fail_with="AdmissionRefused")
    engine = engine_of(replace(ENDLESS, faults=faults))
    engine.open(0, WORD, Sampling())
    for call in (
        lambda: engine.open(1, WORD, Sampling()),
        lambda: engine.dump(0),
        lambda: engine.restore(1, WORD, Sampling(), b""),
    ):
        with pytest.raises(AdmissionRefused):
            call()
    engine.open(1, WORD, Sampling())
    engine.restore(1, Prompt(tokens=engine.open(0, WORD, Sampling()).tokens), Sampling(), engine.dump(0))


def test_one_step_is_slow() -> None:
    engine = engine_of(replace(ENDLESS, faults=SimFaults(slow_at_step=2, slow_s=7.0)))
    engine.open(0, WORD, Sampling())
    took_s = [event.step_s for _ in range(3) if (event := engine.step({0: 1}))]
    assert [seconds > 7.0 for seconds in took_s] == [False, True, False]


def test_faults_of_the_first_loads_are_gone_after_them() -> None:
    hand = Hand()
    model = replace(ENDLESS, faults=SimFaults(refuse_load="AdmissionRefused", first_loads=2))
    driver = SimDriver([CPU], sleep=hand.sleep, models={"nano.sim": model})
    for _ in range(2):
        with pytest.raises(AdmissionRefused):
            opened_by_driver(model, hand, driver)
    assert opened_by_driver(model, hand, driver).info.sequences == model.sequences


def test_load_takes_its_time_and_can_be_cancelled() -> None:
    hand = Hand()
    driver = SimDriver([CPU], sleep=hand.sleep, models={"nano.sim": replace(ENDLESS, load_s=10.0)})
    told: list[float] = []

    def progress(fraction: float) -> bool:
        told.append(fraction)
        return fraction < 0.5

    with pytest.raises(Interrupted):
        driver.open(
            driver.inspect(Path("nano.sim")), CPU, EngineOptions(), progress, lambda level, line: None
        )
    assert hand.now_s == pytest.approx(5.0)
    assert told == sorted(told)


# -- models -------------------------------------------------------------------------------------


def test_estimate_is_what_the_engine_takes() -> None:
    driver = SimDriver([CPU], models={"nano.sim": ENDLESS})
    options = EngineOptions(context_tokens=100, sequences=3)
    estimate = driver.estimate(driver.inspect(Path("nano.sim")), options, CPU)
    info = SimEngine(ENDLESS, options, lambda seconds: None).info
    assert estimate.total_bytes == info.weights_bytes + info.kv_bytes + info.compute_bytes
    assert estimate.kv_bytes == 3 * 100 * ENDLESS.kv_bytes_per_token
    assert driver.confirm(driver.inspect(Path("nano.sim")), options, CPU) == estimate


def test_model_comes_from_a_file_or_from_its_name(tmp_path: Path) -> None:
    driver = SimDriver([CPU])
    path = tmp_path / "small.sim"
    path.write_text(json.dumps({"context_tokens": 77, "base_s": 1, "faults": {"die_at_step": 4}}))
    assert driver.inspect(path).context_tokens == 77
    assert driver.inspect(Path("any.sim")).context_tokens == SimModel().context_tokens
    with pytest.raises(ModelNotFound):
        driver.inspect(tmp_path / "other.gguf")


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[1]",
        '{"colour": 1}',
        '{"seed": "x"}',
        '{"seed": true}',
        '{"sequences": 0}',
        '{"faults": 3}',
        '{"faults": {"die_at_step": 1.5}}',
        '{"load_s": {}}',
        "[" * 9999,
    ],
)
def test_bad_model_files_are_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "bad.sim"
    path.write_text(text)
    with pytest.raises(ModelInvalid):
        SimDriver([CPU]).inspect(path)


def test_interrupted_quantum_ends_inline() -> None:
    host = opened_by_driver(ENDLESS, Hand())
    host.open(0, WORD, Sampling())
    host.start(Quantum(1, {0: 10}))
    host.poll()
    host.interrupt(1)
    assert host.poll() == QuantumEnd(1, interrupted=True)
