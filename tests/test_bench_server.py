"""The benchmarks that have clients: their arithmetic, and the server they compare with, by a stand-in."""

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from test_bench import SMALL, model, quiet, session  # noqa: F401 (fixtures)

from kernel.device import EngineOptions
from kernel.errors import KernelFault, LlmosError, UsageError, WorkerDied
from plugins.benchmarks import forks, interactive, server, shares, throughput
from plugins.benchmarks.clients import Reply, ServerBatch
from plugins.benchmarks.interactive import Load, Side
from plugins.benchmarks.server import Request, Server, server_path
from plugins.benchmarks.spread import Spread
from tests.shell_kit import Session

SEATS = EngineOptions(context_tokens=256, sequences=2, threads=1)
FAKE = Path(__file__).with_name("fake_server.py")


def program(folder: Path, name: str = "llama-server") -> Path:
    """The stand-in, as a program of this name."""
    path = folder / name
    path.write_text(f"#!{sys.executable}\n{FAKE.read_text()}")
    path.chmod(0o755)
    return path


@pytest.fixture(scope="module")
def binary(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return program(tmp_path_factory.mktemp("server"))


@pytest.fixture
def running(binary: Path) -> Iterator[Server]:
    with Server(binary, Path("x.gguf"), SEATS, on_gpu=False) as started:
        yield started


def gone(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    return False


def test_an_answer_has_its_counts_and_the_arrival_of_each_piece(running: Server) -> None:
    answer = running.ask([Request((1, 2, 3), 5, slot=0)])[0]
    assert (answer.prompt_tokens, answer.output_tokens, len(answer.arrivals_s)) == (3, 5, 5)
    times = [answer.begin_s, *answer.arrivals_s, answer.end_s]
    assert times == sorted(times)


def test_requests_are_under_way_together(running: Server) -> None:
    answers = running.ask([Request("together", 2), Request("together", 3)])
    assert [answer.output_tokens for answer in answers] == [2, 3]


@pytest.mark.parametrize(
    ("prompt", "message"), [("refuse", "refuses: .*refused"), ("hang up", "broke off"), ("die", "broke off")]
)
def test_an_answer_that_is_none_is_told(running: Server, prompt: str, message: str) -> None:
    with pytest.raises(KernelFault, match=message):
        running.ask([Request(prompt, 5)])


def test_a_dead_server_is_told_by_its_status(running: Server) -> None:
    with pytest.raises(KernelFault):
        running.ask([Request("die", 5)])
    with pytest.raises(WorkerDied, match="ended with status 9"):
        running.ask([Request("hello", 5)])


def test_batch_jobs_tell_that_the_server_died(running: Server) -> None:
    batch = ServerBatch(running, 2, 8, 4, "x")
    try:
        with pytest.raises(KernelFault):
            running.ask([Request("die", 5)])
        with pytest.raises(KernelFault):
            for _ in range(100):
                batch.tokens()
                batch._thread.join(0.05)
    finally:
        batch.end()


def test_the_server_is_ended_whatever_happens(binary: Path) -> None:
    with pytest.raises(KeyboardInterrupt), Server(binary, Path("x.gguf"), SEATS, on_gpu=False) as started:
        pid = started.pid
        assert not gone(pid)
        raise KeyboardInterrupt
    assert gone(pid)


@pytest.mark.skipif(shutil.which("setpriv") is None, reason="needs setpriv")
def test_the_server_is_ended_when_its_parent_is_killed(binary: Path) -> None:
    program = f"""
import os, signal
from pathlib import Path
from kernel.device import EngineOptions
from plugins.benchmarks.server import Server
with Server(Path({str(binary)!r}), Path("x.gguf"), EngineOptions(256, 2, 1), on_gpu=False) as server:
    print(server.pid, flush=True)
    os.kill(os.getpid(), signal.SIGKILL)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == -9
    deadline_s = time.monotonic() + 10
    while running_now(int(done.stdout)) and time.monotonic() < deadline_s:
        time.sleep(0.02)
    assert not running_now(int(done.stdout))


def running_now(pid: int) -> bool:
    """Whether it runs; a dead one may wait for its new parent to take note of it."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_a_server_that_does_not_start_says_why(tmp_path: Path) -> None:
    broken = Server(program(tmp_path, "broken"), Path("x.gguf"), SEATS, on_gpu=False)
    with pytest.raises(WorkerDied, match="status 1: no such quantisation"):
        broken.__enter__()
    assert gone(broken.pid)
    empty = tmp_path / "empty"
    empty.write_text("")
    empty.chmod(0o755)
    with pytest.raises(LlmosError, match=r"does not start|ended with status"):
        Server(empty, Path("x.gguf"), SEATS, on_gpu=False).__enter__()


def test_a_port_that_another_server_has_is_no_server_of_ours(
    running: Server, binary: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(server, "_free_port", lambda: running.port)
    second = Server(binary, Path("y.gguf"), SEATS, on_gpu=False)
    with pytest.raises(KernelFault, match=r"another server|ended with status"):
        second.__enter__()
    assert gone(second.pid) and not gone(running.pid)


def test_a_server_is_found_by_path_folder_or_not_at_all(
    binary: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert server_path(str(binary)) == server_path(str(binary.parent)) == binary
    monkeypatch.setenv("PATH", str(tmp_path))
    assert server_path(None) is None
    with pytest.raises(UsageError, match="no server") as raised:
        server_path(str(tmp_path))
    assert "cmake" in raised.value.hint


def test_throughput_compares_with_the_server(binary: Path, model: Path) -> None:  # noqa: F811
    job = throughput.Job(model, 20, 6, 2, 1, True, binary, ("default", "unified"))
    row = throughput.measure(job, 2, quiet)
    assert (row.prompt_tokens, row.same_outputs) == (40, True)
    assert [each.settings for each in row.servers] == ["default", "unified"]
    best = row.best_server
    assert best is not None and best.tokens_per_s == max(each.tokens_per_s for each in row.servers)
    assert row.decode_ratio is not None and best.decode_ratio is not None
    json.dumps(throughput.report(job, [row]))


def test_throughput_notices_a_server_that_does_less(tmp_path: Path, model: Path) -> None:  # noqa: F811
    job = throughput.Job(model, 20, 6, 1, 1, False, program(tmp_path, "less"), ("default",))
    with pytest.raises(KernelFault, match=r"other work: \d+ \+ \d tokens, not"):
        throughput.measure(job, 2, quiet)


def test_a_reply_is_times_between_what_came() -> None:
    reply = Reply.of(1.0, [1.5, 1.75, 2.75])
    assert (reply.first_token_s, reply.gaps_s) == (0.5, (0.25, 1.0))
    with pytest.raises(KernelFault, match="without text"):
        Reply.of(1.0, [])


def test_what_a_batch_keeps_and_loses() -> None:
    replies = [Reply(0.1, ())] * 5
    side = Side(alone=Load([], 4.0, 400), loaded=Load(replies, 10.0, 800))
    kept, all_kept, lost_s = interactive._kept(side)
    assert (kept, all_kept) == (0.8, (800 + 5 * interactive.OUTPUT_TOKENS) / 1000)
    assert lost_s == pytest.approx(0.4)  # a fifth of ten seconds, for five requests


def test_interactive_measures_both_sides(
    binary: Path,
    model: Path,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name in ("ALONE_S", "SETTLE_S"):
        monkeypatch.setattr(interactive, name, 0.1)
    job = interactive.Job(model, 3, 2, 2, 2, 0.0, 1, binary)
    rows = interactive.measure(job, quiet)
    assert [(row.side, row.loaded) for row in rows] == [
        (side, loaded) for side in ("LLMOS", "server") for loaded in (False, True)
    ]
    for row in rows:
        assert row.requests == 4 and 0 < row.first_token_s.p50 <= row.first_token_s.most
        assert (row.batch_kept is not None) is (row.all_kept is not None) is row.loaded
    answer = interactive.report(job, rows)
    assert answer["slowdown"] == rows[1].first_token_s.p99 / rows[0].first_token_s.p99
    assert rows[1].lost_s is not None
    assert answer["person_kept"] == 1 - rows[1].lost_s / interactive.PERSON_S
    assert answer["advantage"] == rows[3].first_token_s.p99 / rows[1].first_token_s.p99
    json.dumps(answer)


def test_shares_are_of_what_was_drawn_and_errors_of_what_was_due() -> None:
    rows = shares.rows_of([[400, 200, 100], [396, 200, 104]])
    assert rows[0].share.most == pytest.approx(4 / 7) and rows[0].error.most == pytest.approx(0.0)
    assert rows[2].error == Spread(pytest.approx(0.0), pytest.approx(0.02), pytest.approx(0.04))
    assert shares.worst(rows) == pytest.approx(0.04)


def test_shares_follow_the_weights(model: Path) -> None:  # noqa: F811
    rows = shares.measure(model, 3000, 1, quiet)  # a quantum of this model is some hundreds
    assert sum(row.share.median for row in rows) == pytest.approx(1.0)
    assert rows[0].share.median > rows[1].share.median > rows[2].share.median
    json.dumps(shares.report(model, 3000, rows))


def test_forks_read_the_prompt_once(model: Path) -> None:  # noqa: F811
    result = forks.measure(model, 3, 200, 1, quiet)
    assert (result.children, result.prompt_tokens) == (3, 200)
    assert 0 < result.fork_s.median < result.forked_s.median
    assert result.speedup.median == result.independent_s.median / result.forked_s.median
    assert min(result.copies.median, result.later_copies.median) >= 1.0
    json.dumps(forks.report(model, result))


@pytest.mark.parametrize(
    "words",
    [
        ("throughput", "--context", "medium"),
        ("throughput", "--server", "/nowhere"),
        ("throughput", "--settings", "fastest"),
        ("interactive", "--server", "/nowhere"),
        ("interactive", "--think", "nan"),
        ("interactive", "--requests", "0"),
        ("shares", "--tokens", "0"),
        ("fork", "--children", "256"),
    ],
)
def test_bad_words_are_refused(session: Session, words: tuple[str, ...]) -> None:  # noqa: F811
    code, out, err = session.argv("bench", *words)
    assert (code, out) == (2, "") and err.startswith("error: ")
