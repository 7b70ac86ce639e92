"""Exact sequences: the same logits, bit for bit, whatever runs beside them and happens to them."""

import random
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from ggufs import PLENTY, new_flag, open_quietly, run, solo, write

from drivers.llamacpp import header, native
from drivers.llamacpp.engine import LlamaEngine
from drivers.llamacpp.invariance import is_invariant
from drivers.llamacpp.slab import Slab
from drivers.llamacpp.writer import DType, Recipe
from kernel.device import EngineOptions, Prompt, Sampling, SequenceStep

SEATS = 6
OUTPUT_TOKENS = 20
WRITTEN: tuple[DType, ...] = ("Q8_0", "F16", "F32")
QUANTIZED = {"Q4_0": 2, "Q4_K_M": 15}  # llama.cpp's file types
FORMS = (*WRITTEN, *QUANTIZED)
INVARIANT = {"Q8_0": True, "F16": False, "F32": False, "Q4_0": False, "Q4_K_M": False}
# Q4_0: llama.cpp gives its output layer another type


def model_of(folder: Path, form: str) -> Path:
    """A random model with weights of this type; those that we cannot write, llama.cpp makes."""
    for dtype in WRITTEN:
        if form == dtype:
            return write(
                folder, Recipe(width=256, heads=4, kv_heads=2, ffn=512, vocabulary=1500, dtype=dtype)
            )
    path = folder / f"{form}.gguf"
    if not path.exists():
        params = native.lib.llama_model_quantize_default_params()
        params.ftype, params.nthread = QUANTIZED[form], 1
        whole = model_of(folder, "F32")
        assert native.lib.llama_model_quantize(str(whole).encode(), str(path).encode(), params) == 0
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("models")


class Watch:
    """The logits of every draw of the exact sequences of an engine, by (seed, position)."""

    def __init__(self, engine: LlamaEngine) -> None:
        self.bits: dict[tuple[int, int], bytes] = {}
        self._draw = engine._passes.draw
        engine._passes.draw = self._look  # type: ignore[method-assign]

    def _look(self, slab: Slab, ready: list[Any], rows: list[int]) -> list[int]:
        for sequence, row in zip(ready, slab.logits(), strict=False):
            if sequence.sampling.exact:
                self.bits[sequence.sampling.seed, len(sequence.tokens)] = row.tobytes()
        return self._draw(slab, ready, rows)


class Engines:
    """A busy engine and an idle one, to compare."""

    def __init__(self, path: Path) -> None:
        self.flag = new_flag()
        self.busy = open_quietly(path, EngineOptions(sequences=SEATS), self.flag)
        self.idle = open_quietly(path, EngineOptions(sequences=1))
        self.seen, self.expected = Watch(self.busy).bits, Watch(self.idle).bits


@pytest.fixture(scope="module", params=FORMS)
def engines(request: pytest.FixtureRequest, folder: Path) -> Iterator[Engines]:
    made = Engines(model_of(folder, request.param))
    yield made
    made.busy.shutdown()
    made.idle.shutdown()


def touchy(seed: int, *, exact: bool = True) -> Sampling:
    return Sampling(1.2, 0, 1.0, 0.0, repeat_penalty=1.1, seed=seed, ignore_eos=True, exact=exact)


def prompt_of(seed: int) -> Prompt:
    dice = random.Random(seed)
    tokens = tuple(dice.randrange(4, 1400) for _ in range(dice.choice((1, 2, 31, 32, 33, 34, 65, 100, 140))))
    return Prompt(tokens=tokens, max_tokens=OUTPUT_TOKENS)


class Job:
    """An exact sequence on a seat of the busy engine, as the kernel would keep it."""

    def __init__(self, engine: LlamaEngine, seq: int, seed: int) -> None:
        self.engine, self.seq, self.seed = engine, seq, seed
        self.prompt = prompt_of(seed)
        self.drawn: list[int] = []
        engine.open(seq, self.prompt, touchy(seed))

    @property
    def history(self) -> Prompt:
        tokens = self.prompt.tokens
        return Prompt(tokens=(*tokens, *self.drawn), prompt_tokens=len(tokens), max_tokens=OUTPUT_TOKENS)

    def swap(self, seq: int) -> None:
        """Out of its seat and into another, as it was."""
        kv = self.engine.dump(self.seq)
        self.engine.close(self.seq)
        self.seq = seq
        self.engine.restore(seq, self.history, touchy(self.seed), kv)

    def replay(self, seq: int) -> None:
        """As after a crash: from nothing but the tokens."""
        self.engine.close(self.seq)
        self.seq = seq
        self.engine.open(seq, self.history, touchy(self.seed))


def run_jobs(engine: LlamaEngine, jobs: list[Job], dice: random.Random, *, swaps: bool) -> None:
    """To their ends, beside others that come and go; exact ones move about in between, if they are to."""
    spare = set(range(SEATS)) - {job.seq for job in jobs}
    for turn in range(1000):
        if all(len(job.drawn) == OUTPUT_TOKENS for job in jobs):
            return
        others = sorted(spare)
        if others and dice.random() < 0.3:
            engine.open(dice.choice(others), prompt_of(1000 + turn), touchy(turn, exact=False))
        quota = {seq: dice.randrange(1, 70) for seq in range(SEATS) if dice.random() < 0.8}
        for _ in range(dice.randrange(1, 6)):
            event = engine.step(quota)
            for step in event.sequences if event else ():
                take(jobs, step)
        unfinished = [job for job in jobs if len(job.drawn) < OUTPUT_TOKENS]
        if swaps and unfinished and others and dice.random() < 0.3:
            job, seq = dice.choice(unfinished), dice.choice(others)
            spare ^= {seq, job.seq}
            engine.close(seq)
            dice.choice((job.swap, job.swap, job.replay))(seq)
    raise AssertionError("the jobs do not end")


def take(jobs: list[Job], step: SequenceStep) -> None:
    for job in jobs:
        if job.seq == step.seq and step.token is not None:
            job.drawn.append(step.token)


def close_all(engine: LlamaEngine) -> None:
    for seq in range(SEATS):
        engine.close(seq)


@pytest.mark.parametrize("swaps", [False, True], ids=["staying", "swapped and replayed"])
@pytest.mark.parametrize("seed", range(3))
def test_exact_logits_have_the_bits_they_have_alone(engines: Engines, seed: int, swaps: bool) -> None:
    engine, dice = engines.busy, random.Random(seed)
    engines.seen.clear()
    engines.expected.clear()
    jobs = [Job(engine, seq, 10 * seed + seq) for seq in range(3)]
    run_jobs(engine, jobs, dice, swaps=swaps)
    close_all(engine)
    for job in jobs:
        assert job.drawn == solo(engines.idle, job.prompt, touchy(job.seed))[0]
    assert len(engines.expected) == 3 * OUTPUT_TOKENS
    assert engines.seen == engines.expected


def talk(engine: LlamaEngine, seed: int, dice: random.Random | None) -> None:
    """Three turns; with dice, the history is opened again from its tokens now and then."""
    tokens: list[int] = []
    bounds: list[int] = []
    for turn in range(3):
        prompt = prompt_of(10 * seed + turn)
        if turn:
            engine.feed(0, prompt)
        else:
            engine.open(0, prompt, touchy(seed))
        bounds += [len(tokens)] * bool(turn)
        tokens += prompt.tokens
        bounds.append(len(tokens))
        while len(tokens) < bounds[-1] + OUTPUT_TOKENS:
            event = engine.step({0: dice.randrange(1, 70) if dice else PLENTY})
            drawn = [step.token for step in event.sequences if step.token is not None] if event else []
            tokens += drawn
            if drawn and dice and dice.random() < 0.1:
                *earlier, begin = bounds
                history = Prompt(
                    tokens=tuple(tokens),
                    prompt_tokens=begin,
                    max_tokens=OUTPUT_TOKENS,
                    reply_bounds=tuple(earlier),
                )
                engine.open(0, history, touchy(seed))


@pytest.mark.parametrize("seed", range(3))
def test_a_chat_that_is_replayed_has_the_bits_it_has_undisturbed(engines: Engines, seed: int) -> None:
    engines.seen.clear()
    engines.expected.clear()
    talk(engines.busy, seed, random.Random(seed))
    talk(engines.idle, seed, None)
    close_all(engines.busy)
    engines.idle.close(0)
    assert len(engines.expected) == 3 * OUTPUT_TOKENS
    assert engines.seen == engines.expected


def test_aborts_leave_exact_logits_as_they_are(engines: Engines) -> None:
    engine, over = engines.busy, threading.Event()
    engines.seen.clear()
    engines.expected.clear()

    def annoy() -> None:
        for wait_s in [0.0003, 0.002, 0.0011, 0.004] * 8:
            if over.wait(wait_s):
                return
            engines.flag[0] = b"x"

    annoyer = threading.Thread(target=annoy)
    jobs = [Job(engine, seq, 77 + seq) for seq in range(4)]
    engine.open(5, prompt_of(99), touchy(99, exact=False))
    annoyer.start()
    told = run(engine, 0, 1, 2, 3, 5)
    over.set()
    annoyer.join()
    engines.flag[0] = b"\0"
    close_all(engine)
    for job in jobs:
        assert told[job.seq][0] == solo(engines.idle, job.prompt, touchy(job.seed))[0]
    assert engines.seen == engines.expected


def test_exact_prompts_may_pass_their_quota_by_a_chunk_and_no_more(engines: Engines) -> None:
    engine = engines.busy
    engine.open(0, Prompt(tokens=tuple(range(4, 104))), touchy(1))
    for quota in (1, 32, 5):
        left = {0: quota}
        told = []
        while event := engine.step(left):
            told += event.sequences
        assert left == {0: 0}
        assert [step.prompt_tokens for step in told] == [32]
    close_all(engine)


def test_exact_and_other_sequences_both_get_on(engines: Engines) -> None:
    """Passes of their own are taken in turn: nobody waits for the others to finish."""
    engine = engines.busy
    for seq in range(4):
        engine.open(seq, Prompt(tokens=(9, 10 + seq), max_tokens=0), touchy(seq, exact=seq < 2))
    quota = dict.fromkeys(range(4), 1000)
    drawn = dict.fromkeys(range(4), 0)
    for _ in range(60):
        event = engine.step(quota)
        assert event is not None
        for step in event.sequences:
            drawn[step.seq] += step.token is not None
    assert max(drawn.values()) - min(drawn.values()) <= 3
    close_all(engine)


@pytest.mark.parametrize("form", FORMS)
def test_which_models_are_invariant(folder: Path, form: str) -> None:
    assert is_invariant(header.read(model_of(folder, form))) is INVARIANT[form]
