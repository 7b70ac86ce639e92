"""Prompts that begin alike are computed once: the same tokens, from fewer computed ones."""

import random
from collections.abc import Iterator
from pathlib import Path

import pytest
from ggufs import GREEDY, open_quietly, run, solo, steps, write
from hypothesis import given
from hypothesis import strategies as st

from drivers.llamacpp.calibrate import Costs
from drivers.llamacpp.curve import Curve
from drivers.llamacpp.engine import LlamaEngine
from drivers.llamacpp.writer import Recipe
from drivers.prefixes import BLOCK_TOKENS, Prefixes
from kernel.device import EngineOptions, Prompt, Sampling

TOUCHY = Sampling(temperature=1.2, top_k=0, top_p=1.0, min_p=0.0, seed=5, repeat_penalty=1.1)
SEATS = 4


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("models"), Recipe(width=128, ffn=352, vocabulary=2000))


@pytest.fixture
def engine(path: Path) -> Iterator[LlamaEngine]:
    made = open_quietly(path, EngineOptions(sequences=SEATS))
    made._sharing._costs = Costs(
        Curve([{1: 1.0}]), prefill_token_s=1.0, copy_token_s=0.001
    )  # whatever it measured
    yield made
    made.shutdown()


@pytest.fixture(scope="module")
def fresh(path: Path) -> Iterator[LlamaEngine]:
    """An engine that shares nothing."""
    made = open_quietly(path, EngineOptions(sequences=1))
    made._sharing._keeps = False
    yield made
    made.shutdown()


def words(salt: int, count: int) -> tuple[int, ...]:
    return tuple(random.Random(salt).randrange(4, 1900) for _ in range(count))


def prompt_of(*parts: tuple[int, ...], max_tokens: int = 12) -> Prompt:
    return Prompt(tokens=sum(parts, ()), max_tokens=max_tokens)


SYSTEM = words(0, 100)


@pytest.mark.parametrize("ended", [False, True], ids=["from a live one", "from one that has ended"])
@pytest.mark.parametrize("own", [1, 2, 40])
def test_shared_prompts_draw_what_computed_ones_draw(
    engine: LlamaEngine, fresh: LlamaEngine, ended: bool, own: int
) -> None:
    engine.open(0, prompt_of(SYSTEM, words(1, 50)), TOUCHY)
    first = run(engine, 0)[0]
    if ended:
        engine.close(0)
    prompt = prompt_of(SYSTEM, words(2, own))
    opened = engine.open(1, prompt, TOUCHY)
    assert (opened.tokens, opened.shared_tokens) == (prompt.tokens, len(SYSTEM) - (own == 1))
    computed = sum(step.prompt_tokens for step in steps(engine, 1, quota=own + 1))
    assert computed == own + (own == 1)
    engine.open(1, prompt, TOUCHY)
    assert run(engine, 1)[1] == solo(fresh, prompt, TOUCHY)
    engine.open(2, prompt_of(SYSTEM, words(1, 50)), TOUCHY)
    assert run(engine, 2)[2] == first


def test_the_same_prompt_again_computes_two_tokens(engine: LlamaEngine) -> None:
    prompt = prompt_of(SYSTEM)
    whole = solo(engine, prompt, TOUCHY)
    opened = engine.open(3, prompt, TOUCHY)
    assert opened.shared_tokens == len(SYSTEM) - 2
    assert run(engine, 3)[3] == whole


def test_a_history_goes_on_from_what_is_kept_of_it(engine: LlamaEngine) -> None:
    prompt = prompt_of(SYSTEM)
    tokens, text, finish = solo(engine, prompt, TOUCHY)
    history = Prompt(tokens=(*SYSTEM, *tokens[:7]), prompt_tokens=len(SYSTEM), max_tokens=12)
    opened = engine.open(2, history, TOUCHY)
    assert opened.shared_tokens == len(SYSTEM) + 6  # all but the last one, whose logits are wanted
    rest = run(engine, 2)[2]
    assert (tokens[:7] + rest[0], rest[2]) == (tokens, finish) and text.endswith(rest[1])


def test_a_prompt_within_another_is_shared_while_that_is_computed(engine: LlamaEngine) -> None:
    engine.open(0, prompt_of(SYSTEM), TOUCHY)
    engine.step({0: 50})
    assert engine.open(1, prompt_of(SYSTEM), TOUCHY).shared_tokens == 50
    assert len(set(map(str, run(engine, 0, 1).values()))) == 1


def family(engine: LlamaEngine) -> list[Prompt]:
    """One prompt on each seat, all of them opened before any is computed."""
    prompts = [prompt_of(SYSTEM, words(10 + seq, 3 + 20 * seq)) for seq in range(SEATS)]
    for seq, prompt in enumerate(prompts):
        assert engine.open(seq, prompt, TOUCHY).shared_tokens == 0
    return prompts


OWN = sum(3 + 20 * seq for seq in range(SEATS))


def test_prompts_opened_together_compute_what_they_share_once(
    engine: LlamaEngine, fresh: LlamaEngine
) -> None:
    prompts = family(engine)
    told = list(steps(engine, *range(SEATS)))
    assert sum(step.prompt_tokens for step in told) == len(SYSTEM) + OWN
    assert sum(step.shared_tokens for step in told) == (SEATS - 1) * len(SYSTEM)
    assert not engine._convoys._of
    for seq, prompt in enumerate(prompts):
        drawn = [step.token for step in told if step.seq == seq and step.token is not None]
        assert drawn == solo(fresh, prompt, TOUCHY)[0]


def test_nobody_waits_for_one_that_does_not_run(engine: LlamaEngine, fresh: LlamaEngine) -> None:
    prompts = family(engine)
    told = [step for seq, quota in ((0, 30), (0, 31), (1, 32)) for step in steps(engine, seq, quota=quota)]
    told += list(steps(engine, 3, quota=400))  # the first two, who are ahead, do not run
    assert told[-1].finish == "length" and {step.seq for step in told} == {0, 1, 3}
    told += list(steps(engine, *range(SEATS)))
    assert sum(step.prompt_tokens for step in told) == len(SYSTEM) + OWN
    for seq, prompt in enumerate(prompts):
        drawn = [step.token for step in told if step.seq == seq and step.token is not None]
        assert drawn == solo(fresh, prompt, TOUCHY)[0]


def test_who_goes_ahead_may_be_closed(engine: LlamaEngine, fresh: LlamaEngine) -> None:
    prompts = family(engine)
    for seq in range(SEATS - 1):
        assert engine.step(dict.fromkeys(range(seq, SEATS), 40))
        engine.close(seq)
    assert run(engine, SEATS - 1)[SEATS - 1] == solo(fresh, prompts[-1], TOUCHY)


def test_exact_ones_and_complete_ones_hold_up_nobody(engine: LlamaEngine, fresh: LlamaEngine) -> None:
    engine.open(0, Prompt(tokens=(*SYSTEM, 5, 6), prompt_tokens=100, max_tokens=2), TOUCHY)  # is over
    engine.open(1, prompt_of(SYSTEM), Sampling(exact=True))
    for seq in (2, 3):
        engine.open(seq, prompt_of(SYSTEM, words(3, 20)), TOUCHY)
    told = list(steps(engine, *range(SEATS)))
    assert sum(step.prompt_tokens for step in told if step.seq == 1) == len(SYSTEM)
    assert {step.seq for step in told if step.finish} == {0, 1, 2, 3}
    expected = solo(fresh, prompt_of(SYSTEM, words(3, 20)), TOUCHY)[0]
    for seq in (2, 3):
        assert [step.token for step in told if step.seq == seq and step.token is not None] == expected


def test_what_is_too_short_or_exact_or_other_is_computed(engine: LlamaEngine) -> None:
    engine.open(0, prompt_of(SYSTEM), TOUCHY)
    run(engine, 0)
    assert engine.open(1, prompt_of(SYSTEM[:15], words(3, 20)), GREEDY).shared_tokens == 0
    assert engine.open(1, prompt_of(SYSTEM[:17], words(3, 20)), GREEDY).shared_tokens == 17
    assert engine.open(2, prompt_of(words(9, 1), SYSTEM), GREEDY).shared_tokens == 0
    assert engine.open(3, prompt_of(SYSTEM), Sampling(exact=True)).shared_tokens == 0


def test_what_was_left_longest_ago_is_lost_first(engine: LlamaEngine) -> None:
    for salt in range(SEATS):
        solo(engine, prompt_of(words(salt, 60), max_tokens=2), seq=salt)
    solo(engine, prompt_of(words(0, 60), max_tokens=2))  # used again
    solo(engine, prompt_of(words(99, 60), max_tokens=2))  # needs a seat
    shared = {salt: engine.open(0, prompt_of(words(salt, 60)), GREEDY).shared_tokens for salt in (0, 2, 3)}
    assert set(shared.values()) == {58}
    assert engine.open(0, prompt_of(words(1, 60)), GREEDY).shared_tokens == 0


def test_a_long_history_is_copied_from_and_not_cut(engine: LlamaEngine) -> None:
    long = prompt_of(SYSTEM, words(1, 300), max_tokens=2)
    solo(engine, long, seq=0)
    assert engine.open(1, prompt_of(SYSTEM, words(2, 5)), GREEDY).shared_tokens == len(SYSTEM)
    assert engine.open(2, long, GREEDY).shared_tokens == len(SYSTEM) + 298


def test_a_copy_that_costs_more_than_it_saves_is_not_made(engine: LlamaEngine) -> None:
    engine._sharing._costs = Costs(Curve([{1: 1.0}]), prefill_token_s=1.0, copy_token_s=0.9)
    solo(engine, prompt_of(SYSTEM, words(1, 300), max_tokens=2), seq=0)
    assert engine.open(1, prompt_of(SYSTEM, words(2, 5)), GREEDY).shared_tokens == 0
    assert engine.open(2, prompt_of(SYSTEM, words(1, 250)), GREEDY).shared_tokens == len(SYSTEM) + 248


class Kin:
    """Sequences of prompts that begin alike, opened, forked, swapped and closed at random."""

    def __init__(self, engine: LlamaEngine, fresh: LlamaEngine, seed: int) -> None:
        self.engine, self.fresh, self.dice = engine, fresh, random.Random(seed)
        self.trunk = words(seed, 200)
        self.prompts: dict[int, Prompt] = {}
        self.drawn: dict[int, list[int]] = {}
        self.shared_tokens = self.checked = 0

    def open(self, seq: int) -> None:
        own = words(self.dice.randrange(3), self.dice.randrange(1, 30))
        self.prompts[seq] = prompt_of(self.trunk[: self.dice.randrange(2, 200)], own)
        self.shared_tokens += self.engine.open(seq, self.prompts[seq], TOUCHY).shared_tokens
        self.drawn[seq] = []

    def end(self, seq: int) -> None:
        self.run({seq: 1000})
        prompt, drawn = self.prompts.pop(seq), self.drawn.pop(seq)
        assert drawn == solo(self.fresh, prompt, TOUCHY)[0]
        self.checked += 1
        self.engine.close(seq)

    def kill(self, seq: int) -> None:
        del self.prompts[seq], self.drawn[seq]
        self.engine.close(seq)

    def fork(self, seq: int) -> None:
        target = self.dice.randrange(SEATS)
        if target != seq:
            self.engine.fork(seq, target)
            self.prompts[target], self.drawn[target] = self.prompts[seq], self.drawn[seq].copy()

    def swap(self, seq: int) -> None:
        kv = self.engine.dump(seq)
        self.engine.close(seq)
        prompt = self.prompts[seq].tokens
        history = Prompt(tokens=(*prompt, *self.drawn[seq]), prompt_tokens=len(prompt), max_tokens=12)
        self.engine.restore(seq, history, TOUCHY, kv)

    def run(self, quota_tokens: dict[int, int]) -> None:
        while event := self.engine.step(quota_tokens):
            for step in event.sequences:
                self.shared_tokens += step.shared_tokens
                if step.token is not None:
                    self.drawn[step.seq].append(step.token)

    def play(self, rounds: int) -> None:
        for _ in range(rounds):
            seq = self.dice.randrange(SEATS)
            if seq in self.prompts:
                self.dice.choice((self.end, self.end, self.fork, self.swap, self.kill))(seq)
            else:
                self.open(seq)
            if self.dice.random() < 0.7:
                chosen = self.dice.sample(range(SEATS), self.dice.randrange(1, SEATS + 1))
                self.run({each: self.dice.randrange(2, 60) for each in chosen})


def test_random_kin_draw_what_they_draw_alone(engine: LlamaEngine, fresh: LlamaEngine) -> None:
    kin = Kin(engine, fresh, 4)
    kin.play(100)
    assert kin.checked > 10 and kin.shared_tokens > 1000


@pytest.mark.soak
@pytest.mark.parametrize("seed", range(40))
def test_much_random_kin(engine: LlamaEngine, fresh: LlamaEngine, seed: int) -> None:
    Kin(engine, fresh, 100 + seed).play(400)


tokens_lists = st.lists(st.integers(0, 2), max_size=70)


@given(st.dictionaries(st.integers(0, 5), tokens_lists, max_size=5), tokens_lists)
def test_index_finds_the_most_blocks_in_common(held: dict[int, list[int]], tokens: list[int]) -> None:
    index = Prefixes[int]()
    for seat, history in held.items():
        index.learn(seat, history, len(history) // 2)
        index.learn(seat, history, len(history))

    def blocks(history: list[int]) -> int:
        count = 0
        while (end := (count + 1) * BLOCK_TOKENS) <= len(tokens) and history[:end] == tokens[:end]:
            count += 1
        return count

    most = max(map(blocks, held.values()), default=0)
    expected = sorted(seat for seat, history in held.items() if most and blocks(history) == most)
    found, common = index.find(tokens)
    assert (sorted(found), common) == (expected, most * BLOCK_TOKENS)
    for seat in held:
        index.forget(seat)
    assert index.find(tokens) == ([], 0) and not index._holders and not index._chains
