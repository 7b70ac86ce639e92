"""Every kind of model goes through what a process can: batches, forks, dumps, turns, interrupts.

Recurrent state, compressed keys and sliding windows have their own ways to go wrong in each of these.
"""

from collections.abc import Iterator
from pathlib import Path

import pytest
import zoo
from ggufs import GREEDY, new_flag, open_quietly, run, solo, steps

from drivers.llamacpp.engine import LlamaEngine
from kernel.device import EngineOptions, Prompt

FRIEND = Prompt("hello there, my friend", max_tokens=12)
ENEMY = Prompt("hello there, my enemy", max_tokens=12)
FLAG = new_flag()


@pytest.fixture(scope="module", params=zoo.KEEPERS)
def engine(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[LlamaEngine]:
    path: Path = zoo.write(tmp_path_factory.mktemp("zoo"), request.param)
    opened = open_quietly(path, EngineOptions(512, 4, 1), FLAG)
    yield opened
    opened.shutdown()


def some_tokens(engine: LlamaEngine, seq: int, count: int) -> list[int]:
    """Open the friend's prompt and draw so many tokens."""
    engine.open(seq, FRIEND, GREEDY)
    tokens: list[int] = []
    for step in steps(engine, seq):
        tokens += [] if step.token is None else [step.token]
        if len(tokens) == count:
            break
    return tokens


def test_a_seat_is_as_new_for_the_next(engine: LlamaEngine) -> None:
    friend = solo(engine, FRIEND)
    solo(engine, ENEMY)
    assert solo(engine, FRIEND) == friend
    assert friend[2] == "length" and len(friend[0]) == 12


def test_neighbours_do_not_mix(engine: LlamaEngine) -> None:
    alone = [solo(engine, FRIEND), solo(engine, ENEMY)]
    for seq in range(4):
        engine.open(seq, (FRIEND, ENEMY)[seq % 2], GREEDY)
    together = run(engine, 0, 1, 2, 3)
    for seq in range(4):
        engine.close(seq)
        assert together[seq] == alone[seq % 2]


def test_forks_and_dumps_go_on_as_the_original(engine: LlamaEngine) -> None:
    whole = solo(engine, FRIEND)[0]
    begun = some_tokens(engine, 0, 4)
    kv = engine.dump(0)
    engine.fork(0, 2)
    prompt_tokens = engine.open(3, FRIEND, GREEDY).tokens
    history = Prompt(
        tokens=(*prompt_tokens, *begun), prompt_tokens=len(prompt_tokens), max_tokens=FRIEND.max_tokens
    )
    engine.restore(1, history, GREEDY, kv)
    rest = run(engine, 0, 1, 2)
    for seq in range(4):
        engine.close(seq)
    assert begun == whole[:4]
    assert [tokens for tokens, _, _ in rest.values()] == [whole[4:]] * 3


def test_a_turn_follows_a_turn(engine: LlamaEngine) -> None:
    solo(engine, FRIEND)
    engine.open(0, FRIEND, GREEDY)
    run(engine, 0)
    engine.feed(0, Prompt(" and you?", max_tokens=5))
    assert [len(run(engine, 0)[0][0]), engine.feed(0, Prompt("!", max_tokens=2)).shared_tokens] == [5, 0]
    engine.close(0)


def test_a_pass_that_was_cut_short_is_made_good(engine: LlamaEngine) -> None:
    whole = solo(engine, FRIEND)
    engine.open(0, FRIEND, GREEDY)
    FLAG[0] = b"x"
    event = engine.step({0: 1000})
    assert event is not None and all(step.token is None for step in event.sequences)
    assert run(engine, 0)[0] == whole
    engine.close(0)
