"""Those who begin with the same long history hold it once, and each draws what that history says.

A family's logits differ in the last bits from those of a stream alone, so tokens are not compared with what
others draw: each drawn token must be the best, or as good as the best, by the logits of a slab of its own.
"""

import contextlib
import os
import random
import signal
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from ggufs import new_flag, open_quietly, run, steps, write
from hypothesis import given
from hypothesis import strategies as st

from drivers.commons import Commons
from drivers.llamacpp import familysize, layout, native
from drivers.llamacpp.buffers import Buffers
from drivers.llamacpp.calibrate import Costs
from drivers.llamacpp.curve import Curve
from drivers.llamacpp.driver import LlamaCppDriver
from drivers.llamacpp.engine import LlamaEngine
from drivers.llamacpp.native import lib
from drivers.llamacpp.sequence import Sequence
from drivers.llamacpp.slab import Slab
from drivers.llamacpp.writer import Recipe
from kernel.clock import RealClock
from kernel.device import EngineOptions, Prompt, Sampling, SequenceStep
from kernel.errors import AdmissionRefused
from kernel.kernel import Kernel, Parts
from kernel.process import ProcessSpec
from kernel.snapshot import ProcessView
from kernel.syscall import Signal, Syscalls
from llmos.paths import find_paths
from llmos.store import Store

WINDOW = 4096
SEATS = 24
FEW = 10
COMMON = 600
LARGE = Recipe(64, layers=6, heads=1, kv_heads=1, vocabulary=600, context_tokens=WINDOW)
GREEDY = Sampling(temperature=0, ignore_eos=True)
WARM = Sampling(1.2, 0, 1.0, 0.0, seed=5, ignore_eos=True)
AS_GOOD = 0.02  # of the spread of logits: what rounding may do, and no more


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("models"), LARGE)


@pytest.fixture
def engine(path: Path) -> Iterator[LlamaEngine]:
    made = open_quietly(path, EngineOptions(WINDOW, SEATS, kv_tokens=12 * WINDOW))
    yield made
    check(made)
    made.shutdown()


@pytest.fixture(scope="module")
def judge(path: Path) -> Iterator[Slab]:
    """One seat, which is given histories."""
    made = open_quietly(path, EngineOptions(WINDOW, 1))
    yield made._slabs.in_turn[0].slab
    made.shutdown()


def words(salt: int, count: int) -> tuple[int, ...]:
    dice = random.Random(salt)
    return tuple(dice.randrange(4, 500) for _ in range(count))


def prompt_of(salt: int, count: int = COMMON, max_tokens: int = 0) -> Prompt:
    return Prompt(tokens=words(salt, count), max_tokens=max_tokens)


def read(engine: LlamaEngine, seq: int, prompt: Prompt, sampling: Sampling = GREEDY) -> None:
    """Open it, and let it draw one token."""
    engine.open(seq, prompt, sampling)
    list(steps(engine, seq, quota=len(prompt.tokens) + 1))


def families(engine: LlamaEngine) -> list[list[int]]:
    """Who sits on each unified slab."""
    return sorted(sorted(each.id for each in seating.by_seat) for seating in engine._slabs.families())


def held_cells(slab: Slab, sequences: list[Sequence]) -> int:
    """As llama.cpp counts them: from the size of its state, which has each cell once, and who is in it."""
    memberships = sum(each.computed for each in sequences)
    if not memberships:
        return 0
    head, row = 25 + 24 * LARGE.layers, 2 * 2 * 64 * LARGE.layers  # keys and values in 16 bits
    cells, rest = divmod(lib.llama_state_get_size(slab.context) - head - 4 * memberships, 8 + row)
    assert rest == 0
    return int(cells)


def check(engine: LlamaEngine) -> None:
    """Every seat is in order, and cells are counted as llama.cpp counts them, shared ones once."""
    engine._slabs.check_integrity()
    borrowed = engine.borrowed_tokens()
    for seating in engine._slabs.families():
        everybody = [*seating.by_seat, *seating.kept.values()]
        held = held_cells(seating.slab, everybody)
        assert seating.free_cells() == seating.slab.window_tokens - held
        charged = sum(each.computed - borrowed.get(each.id, 0) for each in seating.by_seat)
        assert charged <= held and (charged == held or seating.kept)
    assert borrowed.keys() <= {seq for family in families(engine) for seq in family}


@pytest.mark.parametrize("common", [512, 3000])
def test_a_slab_takes_no_more_than_is_planned_for_it(engine: LlamaEngine, common: int) -> None:
    buffers, cells = Buffers(), familysize.cells_for(common)
    native.start(lambda _level, _line: None, buffers.hear)
    slab = engine._slabs._make(cells, familysize.SEATS, unified=True)
    taken_bytes = buffers.kv_bytes + buffers.compute_bytes
    slab.free()
    assert 0.8 < taken_bytes / engine._slabs._unified_bytes(cells, familysize.SEATS) <= 1.0


class _Forced:
    """A history that is computed as it is told. Fills `slab.Seated`."""

    def __init__(self, tokens: list[int]) -> None:
        self.seat, self.tokens, self.computed = 0, tokens, 0


def judged(judge: Slab, tokens: list[int], prompt_tokens: int) -> None:
    """Each token after the prompt is the best one, or as good, by the logits of the history before it."""
    judge.clear()
    forced = _Forced(tokens[:prompt_tokens])
    for at in range(prompt_tokens, len(tokens)):
        while forced.computed < at:
            count = min(judge.capacity_tokens, at - forced.computed)
            assert judge.compute([(forced, count)]) is not None
            forced.computed += count
        logits = judge.logits()[0]
        best, drawn = logits.max(), logits[tokens[at]]
        assert best - drawn <= AS_GOOD * logits.std(), (at, best, drawn)
        forced.tokens.append(tokens[at])
    judge.clear()


def drawn_of(told: list[SequenceStep]) -> dict[int, list[int]]:
    drawn: dict[int, list[int]] = {}
    for step in told:
        if step.token is not None:
            drawn.setdefault(step.seq, []).append(step.token)
    return drawn


def test_forks_hold_what_they_have_in_common_once(engine: LlamaEngine, judge: Slab) -> None:
    read(engine, 0, prompt_of(1))
    for seq in range(1, 9):
        engine.fork(0, seq, WARM if seq == 8 else None)
    assert families(engine) == [list(range(9))]
    assert engine.borrowed_tokens() == dict.fromkeys(range(1, 9), COMMON)
    check(engine)
    list(steps(engine, *range(9), quota=20))
    (seating,) = engine._slabs.families()
    assert held_cells(seating.slab, seating.by_seat) == COMMON + 9 * 20
    check(engine)
    histories = [engine._sequences[seq].tokens for seq in range(8)]
    judged(judge, histories[0], COMMON)
    assert all(len(each) == COMMON + 21 for each in histories)
    for each in histories[1:]:  # the same, but for what is as good
        judged(judge, each, COMMON)
    warm = engine._sequences[8].tokens
    assert warm[: COMMON + 1] == histories[0][: COMMON + 1] and warm not in histories


def test_a_fork_of_a_fork_holds_what_both_have_drawn(engine: LlamaEngine) -> None:
    read(engine, 0, prompt_of(1))
    engine.fork(0, 1)
    list(steps(engine, 0, 1, quota=30))
    engine.fork(1, 2)
    assert engine.borrowed_tokens() == {1: COMMON, 2: COMMON + 30}
    check(engine)
    engine.close(0)
    assert engine.borrowed_tokens() == {2: COMMON + 30}  # whoever is left holds it
    engine.close(1)
    assert engine.borrowed_tokens() == {}
    check(engine)
    list(steps(engine, 2, quota=5))
    assert len(engine._sequences[2].tokens) == COMMON + 36


def test_samples_of_a_prompt_compute_and_hold_it_once(engine: LlamaEngine, judge: Slab) -> None:
    prompt = prompt_of(2, max_tokens=25)
    for seq in range(8):
        assert engine.open(seq, prompt, GREEDY if seq < 4 else WARM).shared_tokens == 0
    told = list(steps(engine, *range(8), quota=COMMON + 10))
    assert sum(step.prompt_tokens for step in told) == COMMON + 7 * 2
    assert families(engine) == [list(range(8))]
    assert engine.borrowed_tokens() == dict.fromkeys(range(1, 8), COMMON - 2)
    check(engine)
    told += list(steps(engine, *range(8)))
    check(engine)
    for seq, tokens in drawn_of(told).items():
        assert len(tokens) == 25
        if seq < 4:
            judged(judge, [*prompt.tokens, *tokens], COMMON)


def test_the_next_sample_begins_where_the_last_one_sat(engine: LlamaEngine) -> None:
    prompt = prompt_of(2, max_tokens=5)
    for seq in range(4):
        engine.open(seq, prompt, WARM)
        for _ in range(3):
            engine.queue(seq, prompt, WARM)
    told = list(steps(engine, *range(4)))
    assert sum(step.finish == "length" for step in told) == 16
    assert sum(step.prompt_tokens for step in told) == COMMON + 15 * 2
    assert families(engine) == [[0, 1, 2, 3]]
    check(engine)


def test_what_a_family_leaves_is_there_for_the_same_prompt_until_memory_is_needed(
    engine: LlamaEngine,
) -> None:
    prompt = prompt_of(2, max_tokens=5)
    for again in (0, COMMON - 2):
        for seq in range(4):
            assert engine.open(seq, prompt, WARM).shared_tokens == again
        run(engine, *range(4))
        check(engine)
        for seq in range(4):
            engine.close(seq)
    assert families(engine) == [[]]
    for seq in range(12):
        engine.open(seq, prompt_of(10 + seq, 2000), WARM)
    assert families(engine) == []
    check(engine)


def test_exact_ones_are_copied_and_sit_alone(engine: LlamaEngine, path: Path) -> None:
    exact = replace(WARM, exact=True)
    alone = open_quietly(path, EngineOptions(WINDOW, 1))
    prompt = prompt_of(3, max_tokens=30)
    alone.open(0, prompt, exact)
    expected = run(alone, 0)[0]
    alone.shutdown()
    read(engine, 0, prompt, exact)
    engine.fork(0, 1)
    engine.open(2, prompt, exact)
    assert families(engine) == []
    read(engine, 3, prompt, WARM)
    engine.fork(3, 4, exact)
    assert families(engine) == []
    engine.fork(3, 5)
    assert families(engine) == [[3, 5]]
    done = run(engine, *range(6))
    assert done[2] == expected and done[0][0] == done[1][0] == expected[0][1:]


def test_short_histories_are_copied(engine: LlamaEngine) -> None:
    read(engine, 0, prompt_of(1, familysize.LEAST_TOKENS - 1))
    engine.fork(0, 1)
    engine.open(2, prompt_of(4, 100, 10), WARM)
    engine.open(3, prompt_of(4, 100, 10), WARM)
    assert families(engine) == [] and engine.borrowed_tokens() == {}


def test_who_has_most_of_its_own_moves_out_when_cells_are_used_up(engine: LlamaEngine, judge: Slab) -> None:
    read(engine, 0, prompt_of(1))
    for seq in range(1, 6):
        engine.fork(0, seq)
    cells = familysize.cells_for(COMMON)
    list(steps(engine, 3, quota=100))  # is ahead
    told: list[SequenceStep] = []
    while families(engine) == [list(range(6))]:
        told += list(steps(engine, *range(6), quota=20))
        check(engine)
    assert families(engine) == [[0, 1, 2, 4, 5]]
    told += list(steps(engine, *range(6), quota=400))
    check(engine)
    assert not any(step.stuck or step.error for step in told)
    assert all(len(family) < 5 for family in families(engine))
    lengths = [len(engine._sequences[seq].tokens) for seq in range(6)]
    assert max(lengths) > cells / 2
    judged(judge, engine._sequences[0].tokens[:800], COMMON)
    judged(judge, engine._sequences[3].tokens[: COMMON + 150], COMMON)


def test_who_finds_no_room_outside_is_stuck_and_the_others_go_on(path: Path) -> None:
    engine = open_quietly(path, EngineOptions(WINDOW, 10, kv_tokens=2 * WINDOW))
    read(engine, 0, prompt_of(1, max_tokens=400))
    for seq in range(1, 8):
        engine.fork(0, seq)
    assert families(engine) == [list(range(8))]
    for seq in (8, 9):
        with contextlib.suppress(AdmissionRefused):
            engine.open(seq, prompt_of(7, 1500), WARM)
    told: list[SequenceStep] = []
    swapped: dict[int, tuple[bytes, Prompt]] = {}
    while len(swapped) < 2:
        told += list(steps(engine, *range(8)))
        check(engine)
        (seq,) = {step.seq for step in told if step.stuck} - swapped.keys()  # one at a time
        tokens = tuple(engine._sequences[seq].tokens)
        swapped[seq] = engine.dump(seq), Prompt(tokens=tokens, prompt_tokens=COMMON, max_tokens=400)
        engine.close(seq)
    with pytest.raises(AdmissionRefused):
        engine.restore(seq, swapped[seq][1], GREEDY, swapped[seq][0])
    for each in {*range(10)} - swapped.keys():
        engine.close(each)
    for each, (kv, prompt) in swapped.items():
        engine.restore(each, prompt, GREEDY, kv)
    assert [finish for _, _, finish in run(engine, *swapped).values()] == ["length", "length"]
    check(engine)
    engine.shutdown()


def test_without_memory_for_a_family_forks_are_copies(path: Path) -> None:
    engine = open_quietly(path, EngineOptions(WINDOW, 4))  # each has a whole window: nothing is left
    read(engine, 0, prompt_of(1))
    engine.fork(0, 1)
    assert families(engine) == []
    assert engine._sequences[1].tokens == engine._sequences[0].tokens
    check(engine)
    engine.shutdown()


def test_a_family_takes_no_memory_that_other_programs_have(
    engine: LlamaEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    read(engine, 0, prompt_of(1))
    engine.open(1, prompt_of(2, 2000), WARM)
    engine.close(1)  # there is a seat for a copy
    monkeypatch.setattr(engine._slabs, "_free_bytes", lambda: 1000)
    engine.fork(0, 1)
    assert families(engine) == [] and len(engine._sequences[1].tokens) == COMMON + 1


def test_memory_that_idle_families_give_back_is_there_for_others(
    engine: LlamaEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    slabs = engine._slabs

    def free_bytes() -> int:
        """A device that has what the engine was promised, and no more."""
        used_bytes = slabs._budget.used_bytes(slabs._uses(None)) + slabs._bytes(slabs.families())
        return slabs._budget.limit_bytes - used_bytes

    for seq in range(4):
        engine.open(seq, prompt_of(2), WARM)
    for seq in range(4):
        engine.close(seq)
    assert families(engine) == [[]]
    monkeypatch.setattr(slabs, "_free_bytes", free_bytes)
    for seq in range(12):
        engine.open(seq, prompt_of(10 + seq, 2000), WARM)
    assert families(engine) == []


def test_who_has_outgrown_a_seat_stays_with_the_family_that_it_founds(engine: LlamaEngine) -> None:
    read(engine, 0, prompt_of(1, 512))
    room_tokens = engine._sequences[0].slab.window_tokens
    list(steps(engine, 0, quota=room_tokens - 512))
    assert engine._passes.outgrown == [engine._sequences[0]]
    engine.fork(0, 1)
    told = list(steps(engine, 0, 1, quota=5))
    assert families(engine) == [[0, 1]] and not engine._passes.outgrown
    assert {seq: len(tokens) for seq, tokens in drawn_of(told).items()} == {0: 5, 1: 5}


@given(st.integers(1, 100_000), st.integers(0, 50_000))
def test_the_first_two_of_a_family_find_cells(common: int, own: int) -> None:
    if familysize.pays(common, own):
        assert common + 2 * own < familysize.cells_for(common)


def computed_tokens(engine: LlamaEngine, prompts: list[tuple[int, ...]]) -> int:
    """Of prompts that are opened together, where a copy is cheap."""
    engine._sharing._costs = Costs(Curve([{1: 1.0}]), prefill_token_s=1.0, copy_token_s=0.001)
    for seq, tokens in enumerate(prompts):
        engine.open(seq, Prompt(tokens=tokens, max_tokens=3), WARM)
    told = list(steps(engine, *range(len(prompts))))
    check(engine)
    assert sum(step.finish == "length" for step in told) == len(prompts)
    return sum(step.prompt_tokens for step in told)


def test_a_family_takes_over_what_one_elsewhere_has_computed(engine: LlamaEngine) -> None:
    system, one, two = words(1, COMMON), words(2, 60), words(3, 60)
    assert computed_tokens(engine, [system + one, system + two, system + two]) == COMMON + 3 * 60
    assert families(engine) == [[1, 2]]


def test_two_families_of_one_prompt_compute_it_once(engine: LlamaEngine) -> None:
    assert computed_tokens(engine, [words(1, COMMON)] * 20) == COMMON + 19 * 2
    assert len(families(engine)) == 2


def test_a_full_family_is_followed_by_another(engine: LlamaEngine) -> None:
    read(engine, 0, prompt_of(1))
    for seq in range(1, 20):
        engine.fork(0, seq)
    assert families(engine) == [[0, *range(familysize.SEATS, 20)], list(range(1, familysize.SEATS))]
    check(engine)
    assert len({tuple(each.tokens) for each in engine._slabs}) == 1
    list(steps(engine, *range(20), quota=3))
    check(engine)


def test_a_member_is_dumped_whole_and_goes_on_elsewhere(engine: LlamaEngine, judge: Slab) -> None:
    read(engine, 0, prompt_of(1))
    engine.fork(0, 1)
    engine.fork(0, 2)
    list(steps(engine, 0, 1, 2, quota=10))
    kv, tokens = engine.dump(1), tuple(engine._sequences[1].tokens)
    engine.close(1)
    engine.restore(1, Prompt(tokens=tokens, prompt_tokens=COMMON), GREEDY, kv)
    assert families(engine) == [[0, 2]]
    list(steps(engine, 0, 1, 2, quota=10))
    check(engine)
    for seq in range(3):
        judged(judge, engine._sequences[seq].tokens, COMMON)


def test_a_chat_is_forked_while_it_sleeps(engine: LlamaEngine, judge: Slab) -> None:
    engine.open(0, prompt_of(1, max_tokens=4), GREEDY)
    run(engine, 0)
    engine.fork(0, 1)
    assert families(engine) == [[0, 1]]
    for seq in (0, 1):
        engine.feed(seq, prompt_of(20 + seq, 150, max_tokens=6))
    told = list(steps(engine, 0, 1))
    assert sum(step.prompt_tokens for step in told) == 2 * 151
    check(engine)
    for seq in (0, 1):
        history = engine._sequences[seq].tokens
        assert history[604:754] == list(words(20 + seq, 150))
        judged(judge, history, 754)


def test_a_pass_that_is_cut_short_is_taken_again(path: Path, judge: Slab) -> None:
    flag = new_flag()
    engine = open_quietly(path, EngineOptions(WINDOW, SEATS, kv_tokens=12 * WINDOW), flag)
    read(engine, 0, prompt_of(1))
    for seq in range(1, 4):
        engine.fork(0, seq)
    told: list[SequenceStep] = []
    for turn in range(30):
        flag[0] = b"x" if turn % 3 == 0 else b"\0"
        event = engine.step(dict.fromkeys(range(4), 1))
        told += event.sequences if event else ()
        check(engine)
    drawn = drawn_of(told)
    assert sum(step.token is None for step in told) == 0 and len(drawn[0]) == 20
    judged(judge, engine._sequences[2].tokens, COMMON)
    engine.shutdown()


class Kindred:
    """Histories of a few prompts that are opened, forked, run, swapped and closed at random."""

    def __init__(self, engine: LlamaEngine, seed: int) -> None:
        self.engine, self.dice = engine, random.Random(seed)
        self.histories: dict[int, list[int]] = {}
        self.prompts: dict[int, int] = {}
        self.joined = self.refused = self.stuck = 0

    def open(self, seq: int) -> None:
        prompt = prompt_of(self.dice.randrange(3), self.dice.choice((300, 600, 600, 900)), max_tokens=150)
        try:
            self.engine.open(seq, prompt, GREEDY)
        except AdmissionRefused:
            self.refused += 1
        else:
            self.histories[seq], self.prompts[seq] = list(prompt.tokens), len(prompt.tokens)

    def fork(self, seq: int) -> None:
        target = self.dice.choice([each for each in range(FEW) if each != seq])
        try:
            self.engine.fork(seq, target)
        except AdmissionRefused:
            self.refused += 1
        else:
            self.histories[target] = self.histories[seq].copy()
            self.prompts[target] = self.prompts[seq]

    def swap(self, seq: int) -> None:
        kv, tokens = self.engine.dump(seq), tuple(self.histories[seq])
        self.engine.close(seq)
        try:
            self.engine.restore(
                seq, Prompt(tokens=tokens, prompt_tokens=self.prompts[seq], max_tokens=150), GREEDY, kv
            )
        except AdmissionRefused:
            del self.histories[seq]

    def close(self, seq: int) -> None:
        del self.histories[seq]
        self.engine.close(seq)

    def run(self, quota_tokens: dict[int, int]) -> None:
        for step in steps_of(self.engine, quota_tokens):
            self.stuck += step.stuck
            assert step.error is None
            if step.token is not None:
                self.histories[step.seq].append(step.token)

    def play(self, rounds: int) -> None:
        for _ in range(rounds):
            seq = self.dice.randrange(FEW)
            act = self.open
            if seq in self.histories:
                act = self.dice.choice((self.fork, self.fork, self.fork, self.swap, self.close))
            act(seq)
            chosen = self.dice.sample(range(FEW), self.dice.randrange(FEW))
            self.run({each: self.dice.choice((1, 10, 650)) for each in chosen})
            check(self.engine)
            self.joined = max(self.joined, len(self.engine.borrowed_tokens()))
            assert {each.id: each.tokens for each in self.engine._slabs} == self.histories


def steps_of(engine: LlamaEngine, quota_tokens: dict[int, int]) -> Iterator[SequenceStep]:
    while event := engine.step(quota_tokens):
        yield from event.sequences


def test_a_random_family_keeps_its_histories_and_counts_its_cells(engine: LlamaEngine, judge: Slab) -> None:
    kindred = Kindred(engine, 1)
    kindred.play(50)
    assert kindred.joined > 5
    for seq in list(kindred.histories)[:3]:
        judged(judge, kindred.histories[seq][: kindred.prompts[seq] + 50], kindred.prompts[seq])


@pytest.mark.soak
@pytest.mark.parametrize("seed", range(20))
def test_many_random_families(path: Path, seed: int) -> None:
    engine = open_quietly(path, EngineOptions(WINDOW, SEATS, kv_tokens=(4 + 2 * (seed % 5)) * WINDOW))
    Kindred(engine, 100 + seed).play(300)
    engine.shutdown()


seat = st.integers(0, 5)
acts = st.lists(st.tuples(st.sampled_from(("grow", "share", "cut")), seat, seat, st.integers(0, 30)))


@given(acts)
def test_each_cell_is_counted_once(acts: list[tuple[str, int, int, int]]) -> None:
    """Against cells that have names."""
    commons, held, fresh = Commons(), {each: list[int]() for each in range(6)}, iter(range(10_000))
    for act, one, other, tokens in acts:
        if act == "grow":
            held[one] += [next(fresh) for _ in range(tokens)]
        elif act == "share" and one != other:
            tokens = min(tokens, len(held[one]))
            commons.cut(other, 0)
            commons.share(one, other, tokens)
            held[other] = held[one][:tokens]
        elif act == "cut":
            commons.cut(one, tokens)
            del held[one][tokens:]
    borrowed = commons.borrowed(held)
    assert sum(map(len, held.values())) - sum(borrowed.values()) == len(
        {cell for cells in held.values() for cell in cells}
    )
    for each in held:
        others = {cell for other, cells in held.items() if other != each for cell in cells}
        assert commons.most(each) == len(others.intersection(held[each]))


@pytest.fixture
def system(path: Path) -> Iterator[Syscalls]:
    parts = Parts(
        clock=RealClock(),
        drivers={".gguf": LlamaCppDriver()},
        catalog=Store(find_paths()),
        options=EngineOptions(WINDOW, SEATS, kv_tokens=12 * WINDOW),
        ram_available=layout.free_ram_bytes,
    )
    kernel = Kernel(parts)
    try:
        yield Syscalls(kernel)
    finally:
        kernel.check_integrity()
        kernel.shutdown()


def process_of(path: Path, **changes: Any) -> ProcessSpec:
    text = "".join(random.Random(9).choices("abcdefgh ", k=COMMON))
    return ProcessSpec(str(path), (text,), raw=True, sampling=WARM, **changes)


def stopped(system: Syscalls, pid: int, tokens: int = 1) -> ProcessView:
    """Once it has drawn so many."""
    while system.process(pid).output_tokens < tokens:
        time.sleep(0.002)
    system.signal(pid, Signal.STOP)
    return settled(system, pid)


def settled(system: Syscalls, pid: int) -> ProcessView:
    """Once nothing is under way, and the engine has closed whom it has to close."""
    kernel = system._kernel
    model = next(iter(kernel.models.values()))
    while model.to_close:
        time.sleep(0.002)
    kernel.on_dispatcher(model, kernel.dispatcher_of(model).drain)
    return system.process(pid)


def test_ps_charges_what_forks_share_to_one_of_them(path: Path, system: Syscalls, tmp_path: Path) -> None:
    parent = system.spawn(process_of(path))
    alone = stopped(system, parent)
    token_bytes = 2 * 2 * 64 * LARGE.layers
    assert alone.kv_bytes == (alone.context_tokens - 1) * token_bytes >= COMMON * token_bytes
    children = [system.fork(parent, seed=seed) for seed in range(8)]
    views = [stopped(system, pid, alone.output_tokens + 1) for pid in children]
    drawn = sum(view.output_tokens - alone.output_tokens for view in views)
    assert sum(view.kv_bytes for view in views) == drawn * token_bytes  # what is their own
    assert system.process(parent).kv_bytes == alone.kv_bytes
    assert system.save(children[0], tmp_path / "child") > alone.kv_bytes  # a file has it all
    system.signal(parent, Signal.KILL)
    held = [settled(system, pid).kv_bytes for pid in children]
    assert sum(held) == alone.kv_bytes + drawn * token_bytes
    os.kill(system.snapshot().models[0].worker_pid or 0, signal.SIGKILL)
    for pid in children:
        system.signal(pid, Signal.CONT)
    for pid, view in zip(children, views, strict=True):
        assert stopped(system, pid, view.output_tokens + 2).output_tokens >= view.output_tokens + 2
        assert system.read(pid, 0).text.startswith(system.read(parent, 0).text)
    again = system.restore(tmp_path / "child")
    assert stopped(system, again, views[0].output_tokens + 1).kv_bytes >= alone.kv_bytes
    for pid in (*children, again):
        system.signal(pid, Signal.KILL)


def test_ps_charges_the_prompt_of_many_samples_once(path: Path, system: Syscalls) -> None:
    pid = system.spawn(process_of(path, samples=8, threads=8, max_tokens=2000))
    while system.process(pid).shared_tokens < 7 * (COMMON - 2):
        time.sleep(0.002)
    view = stopped(system, pid)
    token_bytes = 2 * 2 * 64 * LARGE.layers
    own = view.context_tokens - 8 * (COMMON - 2)
    assert view.prompt_tokens == 8 * COMMON and view.shared_tokens == 7 * (COMMON - 2)
    assert 0 <= (COMMON - 2 + own) * token_bytes - view.kv_bytes <= 8 * 2 * token_bytes  # yet to be computed
    system.signal(pid, Signal.KILL)
