"""Slabs of window classes: sequences move between them, and every token is the one they draw anyway."""

import random
from collections.abc import Iterator
from pathlib import Path

import pytest
from ggufs import GREEDY, open_quietly, run, solo, steps, write
from hypothesis import given
from hypothesis import strategies as st

from drivers.llamacpp.budget import Budget, Use, classes
from drivers.llamacpp.calibrate import Costs
from drivers.llamacpp.curve import Curve
from drivers.llamacpp.engine import LlamaEngine
from drivers.llamacpp.slab import Slab
from drivers.llamacpp.writer import Recipe
from kernel.device import EngineOptions, Prompt, Sampling
from kernel.errors import AdmissionRefused

WINDOW = 4096
SHORT = 1024
SEATS = 8
LARGE = Recipe(64, layers=6, heads=1, kv_heads=1, vocabulary=600, context_tokens=WINDOW)
TOUCHY = Sampling(1.2, 0, 1.0, 0.0, seed=5, repeat_penalty=1.1, ignore_eos=True)
EXACT = Sampling(1.2, 0, 1.0, 0.0, seed=5, repeat_penalty=1.1, ignore_eos=True, exact=True)


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("models"), LARGE)


@pytest.fixture
def engine(path: Path) -> Iterator[LlamaEngine]:
    """Memory for three long sequences, or two and two short ones."""
    made = open_quietly(path, EngineOptions(WINDOW, SEATS, kv_tokens=3 * WINDOW))
    made._sharing._costs = Costs(
        Curve([{1: 1.0}]), prefill_token_s=1.0, copy_token_s=0.001
    )  # whatever it measured
    made._slabs.unites = False  # logits of families depend on neighbours (test_llamacpp_family.py)
    yield made
    made._slabs.check_integrity()
    made.shutdown()


@pytest.fixture(scope="module")
def whole(path: Path) -> Iterator[LlamaEngine]:
    """One slab, one seat, the whole window; it shares nothing."""
    made = open_quietly(path, EngineOptions(WINDOW, 1))
    made._sharing._keeps = False
    yield made
    made.shutdown()


def words(salt: int, count: int) -> tuple[int, ...]:
    return tuple(random.Random(salt).randrange(4, 500) for _ in range(count))


def prompt_of(salt: int, count: int, max_tokens: int = 12) -> Prompt:
    return Prompt(tokens=words(salt, count), max_tokens=max_tokens)


def windows(engine: LlamaEngine) -> dict[int, int]:
    """Seats by window."""
    return {each.slab.window_tokens: each.slab.seats for each in engine._slabs.in_turn}


def window_of(engine: LlamaEngine, seq: int) -> int:
    return engine._sequences[seq].slab.window_tokens


def test_a_sequence_gets_a_seat_of_its_size(engine: LlamaEngine) -> None:
    assert windows(engine) == {SHORT: 2}  # a quarter of the memory
    engine.open(0, prompt_of(1, 500), GREEDY)
    engine.open(1, prompt_of(2, 500, max_tokens=0), GREEDY)
    assert windows(engine) == {SHORT: 2}
    engine.open(2, prompt_of(3, 800, max_tokens=0), GREEDY)  # leaves no room for a decent answer
    assert [window_of(engine, seq) for seq in range(3)] == [SHORT, SHORT, WINDOW]
    engine.open(3, prompt_of(4, 800, max_tokens=100), GREEDY)
    assert window_of(engine, 3) == SHORT
    engine._slabs.check_integrity()


@pytest.mark.parametrize("sampling", [TOUCHY, EXACT], ids=["touchy", "exact"])
def test_one_that_outgrows_its_slab_goes_on_with_the_same_tokens(
    engine: LlamaEngine, whole: LlamaEngine, sampling: Sampling
) -> None:
    prompts = [prompt_of(seq, 600 + seq, max_tokens=0) for seq in range(2)]
    prompts = [Prompt(tokens=each.tokens[:400], max_tokens=700) for each in prompts]
    engine.open(0, prompts[0], sampling)
    engine.open(1, prompts[1], sampling)
    neighbour = prompt_of(9, 30, max_tokens=800)
    engine.open(2, neighbour, sampling)
    assert {window_of(engine, seq) for seq in range(3)} == {SHORT}
    together = run(engine, 0, 1, 2)
    assert [window_of(engine, seq) for seq in range(3)] == [WINDOW, WINDOW, SHORT]
    for seq, prompt in enumerate((*prompts, neighbour)):
        assert together[seq] == solo(whole, prompt, sampling)


def test_one_alone_has_the_whole_window(path: Path, whole: LlamaEngine) -> None:
    tight = open_quietly(path, EngineOptions(WINDOW, SEATS, kv_tokens=WINDOW))
    prompt = prompt_of(1, 500, max_tokens=600)
    tight.open(1, prompt_of(2, 100), TOUCHY)
    tight.open(0, prompt, TOUCHY)
    tight.close(1)
    assert window_of(tight, 0) == SHORT
    assert run(tight, 0)[0] == solo(whole, prompt, TOUCHY)
    assert windows(tight) == {WINDOW: 1}
    tight._slabs.check_integrity()
    tight.shutdown()


def fill(engine: LlamaEngine) -> None:
    """Three long ones: there is no memory for another sequence of any length."""
    for seq in range(3):
        engine.open(seq, prompt_of(seq, 1500, max_tokens=40), TOUCHY)
    assert windows(engine) == {WINDOW: 3}


def test_what_finds_no_room_is_refused_and_changes_nothing(engine: LlamaEngine, whole: LlamaEngine) -> None:
    short = prompt_of(3, 40)
    engine.open(3, short, TOUCHY)
    run(engine, 3)
    kv = engine.dump(3)
    engine.close(3)
    fill(engine)
    with pytest.raises(AdmissionRefused):
        engine.open(3, short, GREEDY)
    with pytest.raises(AdmissionRefused):
        engine.fork(0, 3)
    with pytest.raises(AdmissionRefused):
        engine.restore(4, Prompt(tokens=(*short.tokens, *solo(whole, short, TOUCHY)[0])), TOUCHY, kv)
    assert windows(engine) == {WINDOW: 3} and sorted(engine._sequences) == [0, 1, 2]
    for seq, answer in run(engine, 0, 1, 2).items():
        assert answer == solo(whole, prompt_of(seq, 1500, max_tokens=40), TOUCHY)
    engine.open(1, short, TOUCHY)  # in the place of what was open there
    assert run(engine, 1)[1] == solo(whole, short, TOUCHY)


def test_a_chat_that_grows_beyond_its_slab(engine: LlamaEngine, whole: LlamaEngine) -> None:
    for each in (engine, whole):
        each.open(0, prompt_of(1, 300), TOUCHY)
    first = run(engine, 0)[0]
    assert first == run(whole, 0)[0]
    engine.open(1, prompt_of(2, 2000), TOUCHY)
    engine.open(2, prompt_of(3, 2000), TOUCHY)
    engine.open(3, prompt_of(6, 30), TOUCHY)
    with pytest.raises(AdmissionRefused):
        engine.feed(0, prompt_of(4, 900))
    assert window_of(engine, 0) == SHORT
    engine.feed(0, prompt_of(4, 300))
    whole.feed(0, prompt_of(4, 300))
    assert run(engine, 0)[0] == run(whole, 0)[0]
    engine.close(2)
    engine.feed(0, prompt_of(5, 900))
    whole.feed(0, prompt_of(5, 900))
    assert window_of(engine, 0) == WINDOW
    assert run(engine, 0)[0] == run(whole, 0)[0]
    whole.close(0)


def test_one_that_cannot_grow_says_so_once_and_rests_until_there_is_room(
    path: Path, whole: LlamaEngine
) -> None:
    engine = open_quietly(path, EngineOptions(WINDOW, SEATS, kv_tokens=2 * WINDOW - SHORT))
    grows, other = prompt_of(1, 500, max_tokens=600), prompt_of(2, 1500, max_tokens=300)
    engine.open(0, grows, TOUCHY)
    engine.open(1, other, TOUCHY)
    told = list(steps(engine, 0, 1, quota=1800))
    assert [step.seq for step in told if step.stuck] == [0]
    drawn = [step.token for step in told if step.seq == 0 and step.token is not None]
    assert len(drawn) == SHORT + 1 - 500  # the last one has no place
    assert len([step for step in told if step.seq == 1 and step.token is not None]) == 300
    quota = {0: 50}
    assert engine.step(quota) is None and quota == {0: 50}
    kv = engine.dump(0)  # it may be swapped out, too
    engine.close(1)
    drawn += run(engine, 0)[0][0]
    expected = solo(whole, grows, TOUCHY)[0]
    assert drawn == expected
    history = Prompt(tokens=(*grows.tokens, *expected[: SHORT + 1 - 500]), prompt_tokens=500, max_tokens=600)
    engine.close(0)
    engine.restore(2, history, TOUCHY, kv)
    assert run(engine, 2)[2][0] == expected[SHORT + 1 - 500 :]
    engine._slabs.check_integrity()
    engine.shutdown()


def test_a_slab_shrinks_under_those_who_sit_on_it(engine: LlamaEngine, whole: LlamaEngine) -> None:
    prompts = [prompt_of(seq, 200 + seq, max_tokens=60) for seq in range(6)]
    for seq, prompt in enumerate(prompts):
        engine.open(seq, prompt, TOUCHY)
    assert windows(engine)[SHORT] >= 6
    told = list(steps(engine, *range(6), quota=220))  # in the middle of their answers
    for seq in (1, 2, 5):
        engine.close(seq)
    long = prompt_of(7, 1800)
    engine.open(7, long, TOUCHY)
    assert windows(engine) == {SHORT: 3, WINDOW: 1}
    engine._slabs.check_integrity()
    told += list(steps(engine, 0, 3, 4, 7))
    for seq, prompt in ((0, prompts[0]), (3, prompts[3]), (4, prompts[4]), (7, long)):
        drawn = [step.token for step in told if step.seq == seq and step.token is not None]
        assert drawn == solo(whole, prompt, TOUCHY)[0]


def test_a_dump_goes_on_in_another_class(engine: LlamaEngine, whole: LlamaEngine) -> None:
    prompt = prompt_of(1, 300, max_tokens=40)
    expected = solo(whole, prompt, TOUCHY)[0]
    for source, target in ((engine, whole), (whole, engine)):
        source.open(0, prompt, TOUCHY)
        drawn = [step.token for step in steps(source, 0, quota=320) if step.token is not None]
        kv = source.dump(0)
        source.close(0)
        history = Prompt(tokens=(*prompt.tokens, *drawn), prompt_tokens=300, max_tokens=40)
        target.restore(0, history, TOUCHY, kv)
        assert drawn + run(target, 0)[0][0] == expected
        target.close(0)


def test_prefixes_are_shared_from_class_to_class(engine: LlamaEngine, whole: LlamaEngine) -> None:
    system = words(0, 200)
    long = Prompt(tokens=system + words(1, 1500), max_tokens=30)
    engine.open(0, long, TOUCHY)
    first = [step.token for step in steps(engine, 0, quota=1710) if step.token is not None]
    short = Prompt(tokens=system + words(2, 50), max_tokens=30)
    assert engine.open(1, short, TOUCHY).shared_tokens == 200  # of a long one that sits
    assert (window_of(engine, 0), window_of(engine, 1)) == (WINDOW, SHORT)
    longer = Prompt(tokens=short.tokens + words(3, 900), max_tokens=30)
    assert engine.open(2, longer, TOUCHY).shared_tokens >= 200
    told = run(engine, 0, 1, 2)
    assert first + told[0][0] == solo(whole, long, TOUCHY)[0]
    assert told[1] == solo(whole, short, TOUCHY)
    assert told[2] == solo(whole, longer, TOUCHY)


def test_slabs_take_turns(engine: LlamaEngine) -> None:
    engine.open(0, prompt_of(1, 100, max_tokens=0), TOUCHY)
    engine.open(1, prompt_of(2, 2000, max_tokens=0), TOUCHY)
    list(steps(engine, 1, quota=2001))
    list(steps(engine, 0, quota=101))
    quota = {0: 100, 1: 100}
    drawn = {0: 0, 1: 0}
    for _ in range(20):
        event = engine.step(quota)
        assert event
        for step in event.sequences:
            drawn[step.seq] += step.token is not None
    assert drawn == {0: 10, 1: 10}


def test_where_kv_cannot_be_moved_there_is_one_slab(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As with models that have sliding windows or recurrent layers."""
    monkeypatch.setattr(Slab, "_learn_state_form", lambda slab: setattr(slab, "plain", False))
    engine = open_quietly(path, EngineOptions(WINDOW, SEATS, kv_tokens=3 * WINDOW))
    assert windows(engine) == {WINDOW: 3} and engine.info.sequences == 3
    for seq in range(3):
        engine.open(seq, prompt_of(seq, 30), GREEDY)
    assert {finish for _, _, finish in run(engine, 0, 1, 2).values()} <= {"length", "stop"}
    assert windows(engine) == {WINDOW: 3}
    engine._slabs.check_integrity()
    engine.shutdown()


def test_other_programs_may_have_taken_the_memory(
    engine: LlamaEngine, whole: LlamaEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    short, long = prompt_of(1, 30), prompt_of(2, 1500)
    engine.open(0, short, TOUCHY)
    monkeypatch.setattr(engine._slabs, "_free_bytes", lambda: 1000)
    with pytest.raises(AdmissionRefused, match="are free"):
        engine.open(1, long, TOUCHY)
    engine.open(2, short, TOUCHY)  # there is a seat
    assert run(engine, 0)[0] == solo(whole, short, TOUCHY)


class Crowd:
    """Sequences of all lengths that come, grow, fork, are swapped and go, each as it is alone."""

    def __init__(self, engine: LlamaEngine, whole: LlamaEngine, seed: int) -> None:
        self.engine, self.whole, self.dice = engine, whole, random.Random(seed)
        self.prompts: dict[int, Prompt] = {}
        self.drawn: dict[int, list[int]] = {}
        self.refused = self.stuck = self.checked = 0

    def open(self, seq: int) -> None:
        length = self.dice.choice((5, 100, 500, 1000, 1500, 2000))
        prompt = prompt_of(self.dice.randrange(4), length, max_tokens=self.dice.choice((5, 40, 80)))
        try:
            self.engine.open(seq, prompt, TOUCHY)
        except AdmissionRefused:
            self.refused += 1
            return
        self.prompts[seq], self.drawn[seq] = prompt, []

    def end(self, seq: int) -> None:
        self.run({seq: 3000})
        if self.engine._sequences[seq].stuck:
            return
        prompt = self.prompts[seq]
        assert self.drawn[seq] == solo(self.whole, prompt, TOUCHY)[0]
        self.checked += 1
        self.close(seq)

    def close(self, seq: int) -> None:
        del self.prompts[seq], self.drawn[seq]
        self.engine.close(seq)

    def fork(self, seq: int) -> None:
        target = self.dice.choice([each for each in range(SEATS) if each != seq])
        try:
            self.engine.fork(seq, target)
        except AdmissionRefused:
            self.refused += 1
        else:
            self.prompts[target], self.drawn[target] = self.prompts[seq], self.drawn[seq].copy()

    def swap(self, seq: int) -> None:
        kv, tokens = self.engine.dump(seq), self.prompts[seq].tokens
        self.engine.close(seq)
        limit = self.prompts[seq].max_tokens
        history = Prompt(tokens=(*tokens, *self.drawn[seq]), prompt_tokens=len(tokens), max_tokens=limit)
        try:
            self.engine.restore(seq, history, TOUCHY, kv)
        except AdmissionRefused:
            self.refused += 1
            del self.prompts[seq], self.drawn[seq]

    def run(self, quota_tokens: dict[int, int]) -> None:
        while event := self.engine.step(quota_tokens):
            for step in event.sequences:
                self.stuck += step.stuck
                if step.token is not None:
                    self.drawn[step.seq].append(step.token)

    def play(self, rounds: int) -> None:
        for _ in range(rounds):
            seq = self.dice.randrange(SEATS)
            if seq in self.prompts:
                self.dice.choice((self.end, self.end, self.fork, self.swap, self.close))(seq)
            else:
                self.open(seq)
            self.engine._slabs.check_integrity()
            if self.dice.random() < 0.7:
                chosen = self.dice.sample(range(SEATS), self.dice.randrange(1, SEATS + 1))
                self.run({each: self.dice.randrange(2, 900) for each in chosen})
                self.engine._slabs.check_integrity()


def test_a_crowd_draws_what_each_draws_alone(engine: LlamaEngine, whole: LlamaEngine) -> None:
    crowd = Crowd(engine, whole, 3)
    crowd.play(45)
    assert crowd.checked > 3 and crowd.refused > 2


@pytest.mark.soak
@pytest.mark.parametrize("seed", range(20))
def test_many_crowds(engine: LlamaEngine, whole: LlamaEngine, seed: int) -> None:
    Crowd(engine, whole, 100 + seed).play(200)


use = st.integers(1, 20).flatmap(lambda seats: st.builds(Use, st.just(seats), st.integers(0, seats)))
uses = st.dictionaries(st.sampled_from(classes(16384)), use)


@given(uses, st.integers(1, 16384), st.integers(16384, 200_000))
def test_a_plan_fits_and_harms_nobody_who_sits(slabs: dict[int, Use], tokens: int, limit: int) -> None:
    budget = Budget(classes(16384), 64, limit, lambda window, seats: (window + 100) * seats + 500)
    room = budget.room(tokens, slabs)
    alone = not any(use.taken for use in slabs.values())
    assert room is not None or not alone or limit < 16384 + 600
    if room is None:
        return
    after = {**slabs}
    for window, seats in room.resize.items():
        assert seats >= slabs.get(window, Use(0, 0)).taken
        after[window] = Use(seats, slabs.get(window, Use(0, 0)).taken)
    assert room.window_tokens >= tokens
    assert after[room.window_tokens].taken < after[room.window_tokens].seats <= 64
    assert not room.resize or budget.used_bytes(after) <= limit


def test_classes_end_at_the_window() -> None:
    assert classes(512) == (512,)
    assert classes(1024) == (1024,)
    assert classes(4096) == (1024, 4096)
    assert classes(131_072) == (1024, 4096, 16_384, 65_536, 131_072)


def test_a_machine_that_is_busy_for_a_moment_leaves_no_hole_in_the_curve(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It ended the load, and all who waited for it, with `KeyError: 4`."""
    from drivers.llamacpp import calibrate

    real, passes = calibrate._pass_s, 0

    def disturbed(slab: Slab, sequences: int, tokens: int) -> float:
        nonlocal passes
        passes += 1
        return real(slab, sequences, tokens) + (1.0 if passes in (6, 7) else 0.0)  # in the second round

    monkeypatch.setattr(calibrate, "_pass_s", disturbed)
    engine = open_quietly(write(tmp_path), EngineOptions(sequences=8, context_tokens=64))
    assert sorted(engine.info.step_cost_s) == [1, 2, 4, 8]
    assert max(engine.info.step_cost_s.values()) < 1.0
    engine.shutdown()


def test_a_round_is_divided_where_that_is_cheaper() -> None:
    points = {1: 3.0, 2: 9.0, 4: 12.5, 8: 18.0}
    curve = Curve([points, {size: 2 * cost for size, cost in points.items()}])
    assert [curve.first(count) for count in (1, 2, 4, 8)] == [1, 1, 4, 8]
    assert [curve.round_s(count) for count in (1, 2, 4, 8)] == [3.0, 6.0, 12.5, 18.0]
    assert (curve.first(16), curve.round_s(16)) == (16, 36.0)  # not known, and not assumed to be better
    curve.learn(16, 200.0)
    assert (curve.first(16), curve.round_s(16)) == (8, 36.0)
    assert curve.first(18) == 8 and curve.round_s(18) == 36.0 + 9.0
    even = Curve(2 * [{1: 1.0, 2: 1.2, 4: 1.5}])
    assert [even.first(count) for count in range(1, 7)] == [1, 2, 3, 4, 5, 6]


def test_a_division_that_was_cheaper_only_once_is_not_made() -> None:
    assert Curve([{1: 3.0, 2: 9.0}, {1: 3.0, 2: 9.0}]).first(2) == 1
    assert Curve([{1: 3.0, 2: 9.0}, {1: 3.0, 2: 6.5}]).first(2) == 2
    assert Curve([{1: 3.0, 2: 9.0}]).first(2) == 2


@pytest.mark.parametrize("part", [1, 2, 3])
def test_divided_rounds_give_all_the_same_turns_and_tokens(
    path: Path, whole: LlamaEngine, part: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Curve, "first", lambda _, sequences: min(part, sequences))
    engine = open_quietly(path, EngineOptions(SHORT, 5))
    prompts = [prompt_of(seq, 20 + seq, max_tokens=12) for seq in range(5)]
    drawn: dict[int, list[int]] = {}
    for seq, prompt in enumerate(prompts):
        engine.open(seq, prompt, TOUCHY)
        drawn[seq] = [step.token for step in steps(engine, seq, quota=20 + seq) if step.token is not None]
    quota = dict.fromkeys(range(5), 100)
    while event := engine.step(quota):
        assert len(event.sequences) <= part
        for step in event.sequences:
            assert step.token is not None
            drawn[step.seq].append(step.token)
        lengths = {len(tokens) for tokens in drawn.values()}
        assert max(lengths) - min(lengths) <= 1
    assert list(drawn.values()) == [solo(whole, prompt, TOUCHY)[0] for prompt in prompts]
    engine.shutdown()
