"""The bundled `bench` plugin: its report's fields, and that it would notice what it is there to notice."""

import io
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import MappingProxyType
from typing import Any

import pytest

from drivers.llamacpp.writer import Recipe
from kernel.device import EngineInfo, EngineOptions, StepEvent
from kernel.errors import KernelFault
from plugins.bench import BENCHMARKS, SPEC
from plugins.benchmarks import boot, idle, kill, throughput
from plugins.benchmarks.machine import booted, options
from plugins.benchmarks.probe import _Probed
from plugins.benchmarks.rawside import RawAnswer, RawSide
from plugins.benchmarks.spread import Spread, Tail
from plugins.benchmarks.throughput import Job, Row, compare
from tests import ggufs
from tests.shell_kit import Session
from tests.shell_kit import booted as simulated

SMALL = Recipe(context_tokens=2048)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return ggufs.write(tmp_path_factory.mktemp("models"), SMALL)


@pytest.fixture
def session() -> Iterator[Session]:
    with simulated() as system:
        made = Session(system, terminal=False, environment={})
        made.shell.registry.add(SPEC)
        yield made


def quiet(_text: str) -> None:
    """Progress that nobody sees."""


def test_importing_the_plugin_loads_nothing_native() -> None:
    code = (
        "import sys, plugins.bench, plugins.benchmarks.forks; print({'llama_cpp', 'numpy'} & {*sys.modules})"
    )
    environment = {**os.environ, "PYTHONPATH": ":".join(sys.path)}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment
    )
    assert done.stdout == "set()\n"


def test_spread_and_tail_give_values_that_were_measured() -> None:
    assert Spread.of([3.0, 1.0, 2.0]) == Spread(1.0, 2.0, 3.0)
    assert Tail.of([float(n) for n in range(1, 101)]) == Tail(50.0, 99.0, 100.0)
    assert Tail.of([7.0]) == Tail(7.0, 7.0, 7.0)


def test_compare_sees_a_single_other_token_and_a_missing_one() -> None:
    ours = [[1, 2, 3], [4, 5, 6]]
    assert compare(ours, [[1, 2, 3], [4, 5, 6]]) == (2, 3)
    assert compare(ours, [[1, 2, 3], [4, 9, 6]]) == (1, 1)
    assert compare(ours, [[1, 2], [4, 5, 6]]) == (1, 2)


def test_throughput_of_both_sides_agrees_token_by_token(model: Path) -> None:
    row = throughput.measure(Job(model, 20, 6, 2), 3, quiet)
    assert (row.sequences, row.same_outputs, row.identical_sequences, row.identical_tokens) == (3, True, 3, 6)
    assert 0 < row.ratio.least <= row.ratio.median <= row.ratio.most
    assert row.llmos_tokens_per_s > 0 and row.raw_tokens_per_s > 0
    assert row.shared_tokens < 3 * 20 / 2  # no repetition lives on the prompts of the one before


def test_throughput_notices_a_raw_side_that_says_something_else(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = RawSide.generate

    def other(self: RawSide, prompts: Any, output_tokens: int) -> RawAnswer:
        answer = real(self, prompts, output_tokens)
        changed = (*answer.tokens[1][:-1], answer.tokens[1][-1] ^ 1)
        return RawAnswer((answer.tokens[0], changed), answer.prefill_s, answer.decode_s)

    monkeypatch.setattr(RawSide, "generate", other)
    row = throughput.measure(Job(model, 20, 6, 1), 2, quiet)
    assert (row.same_outputs, row.identical_sequences, row.identical_tokens) == (False, 1, 5)
    assert throughput.report(Job(model, 20, 6, 1), [row])["same_outputs"] is False


def test_both_sides_get_the_same_seats_window_and_threads(model: Path) -> None:
    shared = options(model, 3, 300, 1)
    assert shared == EngineOptions(context_tokens=512, sequences=3, threads=1)
    with booted(model, shared) as machine:
        assert machine.model.engine is not None
        assert (machine.model.engine.sequences, machine.model.engine.context_tokens) == (3, 512)


def test_kill_counts_steps_of_every_action(model: Path) -> None:
    rows = kill.measure(model, 3, quiet)
    kinds = {(row.action, row.during) for row in rows}
    assert {("kill", "decode"), ("stop", "decode"), ("renice", "decode")} <= kinds
    for row in rows:
        assert 1 <= row.samples <= 3
        assert row.begun_after.most <= row.steps.most  # a step that began after it ended after it
        assert 0 <= row.latency_s.p50 <= row.latency_s.most
    json.dumps(kill.report(model, rows))


def test_the_probe_tells_steps_before_the_close_that_they_precede() -> None:
    lines: list[dict[str, Any]] = []
    probed = _Probed(Counting(), lambda _level, text: lines.append(json.loads(text)))
    for _ in range(250):
        probed.step({})
    assert not lines  # nothing is sent while it runs
    probed.close(2)
    assert [len(line.get("steps", ())) for line in lines] == [100, 100, 50, 0]
    last_end_s = lines[2]["steps"][-1][1]
    assert lines[3]["freed"][0] == 2 and lines[3]["freed"][1] >= last_end_s


class Counting:
    """An engine of which the probe uses two calls."""

    info = EngineInfo(8, 1, 0, 0, 0, 0, MappingProxyType({1: 1.0}), 1.0)

    def step(self, _quota: object) -> StepEvent:
        return StepEvent(0, 0.0, ())

    def close(self, _seq: int) -> None:
        """Nothing is open."""

    def __getattr__(self, name: str) -> Any:
        raise AssertionError(name)


def test_boot_times_all_three_in_each_round() -> None:
    rows = boot.measure(1, quiet)
    assert [row.what for row in rows] == ["python -c pass", "llmos -c true", "llmos, to its prompt"]
    assert rows[0].ratio == Spread(1.0, 1.0, 1.0)
    assert all(row.ratio.median > 1 for row in rows[1:])


def test_boot_fails_where_the_command_does() -> None:
    with pytest.raises(KernelFault, match="exit status 3"):
        boot.to_exit([sys.executable, "-c", "raise SystemExit(3)"])
    with pytest.raises(KernelFault, match="before its prompt"):
        boot.to_prompt([sys.executable, "-c", "pass"])


@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="needs /proc")
def test_idle_sees_no_thread_that_polls(model: Path) -> None:
    rows = idle.measure(model, 0.5, quiet)
    assert {row.process for row in rows} == {"llmos", "worker"}
    assert "cpu" in {row.thread for row in rows}  # the dispatcher
    assert sum(row.wake_ups for row in rows) <= 2


@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="needs /proc")
def test_idle_would_see_a_thread_that_polls() -> None:
    import os
    import threading
    import time

    over = threading.Event()

    def poll() -> None:
        while not over.wait(0.005):
            pass

    thread = threading.Thread(target=poll)
    thread.start()
    assert thread.native_id is not None
    before = idle.counts(os.getpid())[thread.native_id]
    time.sleep(0.2)
    after = idle.counts(os.getpid())[thread.native_id]
    over.set()
    thread.join()
    assert after.wake_ups - before.wake_ups >= 5


def test_the_command_prints_one_object_with_the_promised_fields(session: Session, model: Path) -> None:
    words = ["--sequences", "1,2", "--tokens", "4", "--prompt", "8", "--repeat", "1", "--threads", "1"]
    measure, asked = throughput.measure, []

    def fast(job: Job, sequences: int, tell: Any) -> Row:
        asked.append(sequences)
        return measure(job, sequences, tell)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(throughput, "measure", fast)
        patch.setattr(throughput, "model_path", lambda *_: model)
        code, out, err = session.argv("bench", "throughput", "--json", *words)
    assert (code, err, asked) == (0, "", [1, 2])
    answer = json.loads(out)
    assert answer["same_outputs"] is True
    assert [row["sequences"] for row in answer["rows"]] == [1, 2]
    fields = {"sequences", "llmos_tokens_per_s", "raw_tokens_per_s", "ratio", "same_outputs"}
    assert all(fields <= row.keys() for row in answer["rows"])


@pytest.mark.parametrize("what", sorted(BENCHMARKS))
def test_every_benchmark_has_a_page_of_help(session: Session, what: str) -> None:
    code, out, _ = session.argv("bench", what, "--help")
    assert code == 0 and out.startswith(f"usage: bench {what}") and "--json" in out


@pytest.mark.parametrize(
    "words",
    [
        ("bench",),
        ("bench", "nothing"),
        ("bench", "throughput", "--sequences", "0"),
        ("bench", "throughput", "--sequences", "a"),
        ("bench", "kill", "--repeat", "0"),
        ("bench", "idle", "--seconds", "nan"),
        ("bench", "boot", "--model", "x"),
    ],
)
def test_bad_words_are_refused(session: Session, words: tuple[str, ...]) -> None:
    code, out, err = session.argv(*words)
    assert (code, out) == (2, "") and err.startswith("error: ")


def test_nothing_is_measured_beside_a_users_processes(
    session: Session, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(throughput, "measure", lambda *_: pytest.fail("it measured"))
    session.shell.interactive = True
    session.line("run endless hello &")
    code, out, err = session.argv("bench", "throughput")
    assert (code, out) == (1, "") and "processes run: 2" in err


def test_progress_is_drawn_on_a_terminal_and_wiped() -> None:
    from plugins.benchmarks.progress import progress
    from shell.terminal import Output
    from tests.shell_kit import Terminal

    screen, file = Terminal(), io.StringIO()
    for stream in (screen, file):
        with progress(Output(stream, {"COLUMNS": "20"})) as tell:
            tell("a long line that does not fit in it")
    assert screen.getvalue().startswith("\ra long line") and screen.getvalue().endswith("\r\x1b[K")
    assert file.getvalue() == ""


def test_the_page_of_help_names_every_benchmark(session: Session) -> None:
    code, out, _ = session.argv("bench", "-h")
    assert code == 0 and all(f"\n  {name} " in out for name in BENCHMARKS)
