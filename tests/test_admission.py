"""Declared needs: who is let in, who waits, who is refused, and what `free`, `ps` and `why` say of it."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from shell_kit import session
from simkernel import SimSystem

from drivers.simmodel import SimModel
from kernel.errors import AdmissionRefused, UsageError
from kernel.memory import Resources
from kernel.process import Signal
from kernel.snapshot import ProcessView
from kernel.spec import ProcessSpec

GB = 10**9
MACHINE = Resources(cpus=2, gpus=2)
RAM_BYTES = (1 << 30) + 4 * GB  # 1 GiB of it is the machine's own


def machine() -> SimSystem:
    return SimSystem(
        {"m": SimModel(mean_tokens=0, context_tokens=100_000)}, resources=MACHINE, ram_bytes=RAM_BYTES
    )


def spawn(sim: SimSystem, tokens: int = 50, **needs: object) -> int:
    return sim.system.spawn(ProcessSpec("m", ("work",), max_tokens=tokens, **needs))  # type: ignore[arg-type]


def state(sim: SimSystem, pid: int) -> str:
    return sim.system.process(pid).state


def shares(sim: SimSystem) -> dict[str, int]:
    view = sim.system.snapshot()
    ram = next(pool for pool in view.pools if pool.name == "ram")
    return {share.name: share.used_milli for share in view.shares} | {"ram": ram.used_bytes}


def agree(sim: SimSystem) -> None:
    """`ps` and `free` tell the same, to the byte and to the thousandth."""
    view = sim.system.snapshot()
    claims = {(s.name, c.owner): c.milli for s in view.shares for c in s.claims}
    ram = next(pool for pool in view.pools if pool.name == "ram")
    claims |= {("ram", c.owner): c.size_bytes for c in ram.claims}
    rows: dict[tuple[str, str], int] = {}
    for p in view.processes:
        held = {"cpus": round(p.cpus * 1000), "gpus": round(p.gpus * 1000), "ram": p.mem_bytes}
        rows |= {(pool, f"process {p.pid}"): amount for pool, amount in held.items() if amount}
    assert claims == rows
    sim.kernel.check_integrity()


def test_the_case_of_the_design() -> None:
    """A needs 1 CPU, 1 GPU and 1 GB, B half of each and has the higher priority: both fit, B goes first."""
    sim = machine()
    a = spawn(sim, 4000, cpus=1, gpus=1, mem_bytes=GB)
    b = spawn(sim, 400, cpus=0.5, gpus=0.5, mem_bytes=GB // 2, nice=-10)
    assert shares(sim) == {"cpus": 1500, "gpus": 1500, "ram": 1_500_000_000}
    agree(sim)
    flight = sim.kernel.dispatchers["sim0"].scheduler
    queue = sim.kernel.models["m"].queue
    first = queue.first_waiting()
    assert first is not None and first.process.pid == b
    assert not flight.flights
    while state(sim, b) != "ZOMBIE":
        sim.dispatcher.advance()
    done = sim.system.process(a)
    assert done.output_tokens < 400 / 5  # nice -10 weighs 9.3 times as much
    assert shares(sim) == {"cpus": 1000, "gpus": 1000, "ram": GB}
    agree(sim)
    sim.kernel.pump()
    assert state(sim, a) == "ZOMBIE" and shares(sim) == {"cpus": 0, "gpus": 0, "ram": 0}


def test_what_is_freed_goes_to_who_waits() -> None:
    sim = machine()
    a, b = spawn(sim, 2000, cpus=1, gpus=1, mem_bytes=GB), spawn(sim, 100, cpus=0.5, gpus=0.5)
    c = spawn(sim, 50, gpus=0.75, mem_bytes=3 * GB)
    view = sim.system.process(c)
    assert (view.state, view.waits_for, view.gpus, view.mem_bytes) == (
        "NEW",
        "0.75 gpus, 2.8 GiB on ram",
        0,
        0,
    )
    why = " ".join(sim.system.why(c))
    assert "0.25 gpus more than is free" in why and f"process {a} 1 gpu" in why and "It is the next." in why
    while state(sim, b) != "ZOMBIE":
        sim.dispatcher.advance()
    sim.dispatcher.advance()
    assert state(sim, c) in ("RUNNABLE", "RUNNING") and state(sim, a) != "ZOMBIE"
    assert shares(sim) == {"cpus": 1000, "gpus": 1750, "ram": 4 * GB}
    agree(sim)
    sim.system.signal(a, Signal.KILL)
    assert shares(sim)["gpus"] == 750
    sim.kernel.pump()
    assert state(sim, c) == "ZOMBIE"


def test_a_small_one_does_not_pass_a_big_one_that_asks_for_the_same() -> None:
    sim = machine()
    first = spawn(sim, 200, gpus=1.5)
    big = spawn(sim, 20, gpus=2)
    small = spawn(sim, 20, gpus=0.5)
    other = spawn(sim, 20, cpus=1)  # asks for something else
    assert [state(sim, pid) for pid in (big, small)] == ["NEW", "NEW"]
    assert state(sim, other) != "NEW"
    assert "1 wait before it" in " ".join(sim.system.why(small))
    ends: list[int] = []
    while len(ends) < 4:
        sim.dispatcher.advance()
        ends += [p.pid for p in sim.system.snapshot().processes if p.exit_code == 0 and p.pid not in ends]
    assert [pid for pid in ends if pid != other] == [first, big, small]


def test_priority_comes_before_arrival_and_renice_moves_one_up() -> None:
    sim = machine()
    first = spawn(sim, 100, gpus=2)
    late, later, latest = (spawn(sim, 20, gpus=2, nice=nice) for nice in (5, 0, 5))
    sim.system.renice(latest, -1)
    order: list[int] = []
    while len(order) < 4:
        sim.dispatcher.advance()
        order += [p.pid for p in sim.system.snapshot().processes if p.exit_code == 0 and p.pid not in order]
    assert order == [first, latest, later, late]


def test_what_can_never_fit_is_refused_at_once() -> None:
    sim = machine()
    holder = spawn(sim, 500, gpus=1)
    with pytest.raises(AdmissionRefused, match=r"needs 3 gpus, 1 gpu more than can ever be free") as caught:
        spawn(sim, gpus=3)
    assert f"held by process {holder} 1 gpu" in caught.value.hint and caught.value.exit_code == 75
    with pytest.raises(AdmissionRefused, match=r"needs 4.7 GiB on ram, 954 MiB more than can ever be free"):
        spawn(sim, mem_bytes=5 * GB)
    with pytest.raises(AdmissionRefused, match="this machine has none"):
        SimSystem().system.spawn(ProcessSpec("m", ("x",), gpus=3))
    assert len(sim.system.snapshot().processes) == 1


def test_who_does_not_wait_is_refused_and_told_who_holds_it() -> None:
    sim = machine()
    holder = spawn(sim, 500, cpus=1.5)
    with pytest.raises(AdmissionRefused, match=r"needs 1 cpu, 0.5 cpus more than is free") as caught:
        spawn(sim, cpus=1, wait=False)
    assert f"process {holder} 1.5 cpus" in caught.value.hint and "--wait" in caught.value.hint
    waiting = spawn(sim, cpus=1)
    with pytest.raises(AdmissionRefused, match="others wait for it already"):
        spawn(sim, cpus=0.5, wait=False)
    assert spawn(sim, cpus=0.5, wait=False, nice=-1)  # before the one that waits
    sim.system.signal(waiting, Signal.KILL)
    agree(sim)


@pytest.mark.parametrize("field", ["cpus", "gpus"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -0.1])
def test_senseless_needs(field: str, value: float) -> None:
    sim = machine()
    with pytest.raises(UsageError, match="out of range"):
        spawn(sim, **{field: value})
    with pytest.raises(UsageError, match="out of range"):
        spawn(sim, mem_bytes=-1)


def test_signals_reach_one_that_waits() -> None:
    sim = machine()
    first = spawn(sim, 100, gpus=2)
    stopped, killed, last = (spawn(sim, 20, gpus=2) for _ in range(3))
    sim.system.signal(stopped, Signal.STOP)
    sim.system.signal(killed, Signal.KILL)
    assert state(sim, stopped) == "STOPPED"
    assert sim.system.why(stopped)[0] == "It was stopped."  # nothing that becomes free would help it
    sim.kernel.pump()
    assert [state(sim, pid) for pid in (first, stopped, last)] == ["ZOMBIE", "STOPPED", "ZOMBIE"]
    sim.system.signal(stopped, Signal.CONT)
    sim.kernel.pump()
    assert sim.system.process(stopped).exit_code == 0
    assert sim.system.process(killed).exit_code == 137


def test_a_stopped_process_keeps_what_it_holds() -> None:
    sim = machine()
    holder = spawn(sim, 100, gpus=2)
    waiting = spawn(sim, 20, gpus=1)
    sim.run_until(20)
    sim.system.signal(holder, Signal.STOP)
    sim.kernel.pump()
    assert state(sim, waiting) == "NEW" and sim.system.process(holder).gpus == 2
    sim.system.signal(holder, Signal.CONT)
    sim.kernel.pump()
    assert [sim.system.process(pid).exit_code for pid in (holder, waiting)] == [0, 0]


needs = st.fixed_dictionaries(
    {
        "cpus": st.integers(0, 8),
        "gpus": st.integers(0, 8),
        "mem": st.integers(0, 4),
        "nice": st.integers(-2, 2),
    }
)


@settings(max_examples=40, deadline=None)
@given(st.lists(st.one_of(needs, st.integers(0, 12), st.none()), max_size=30))
def test_admission_against_a_naive_model(steps: list[dict[str, int] | int | None]) -> None:
    """A spawn, a kill of the n-th, or of the oldest: after each, exactly those are in whom a plain loop over
    the line, in order of nice and arrival, lets in. Nobody waits for what is free, nobody is passed."""
    sim = machine()
    room = {"cpus": 8, "gpus": 8, "mem": 4}
    asks: dict[int, dict[str, int]] = {}
    inside: list[int] = []
    line: list[int] = []
    for step in steps:
        if isinstance(step, dict):
            fields = {"cpus": step["cpus"] / 4, "gpus": step["gpus"] / 4, "mem_bytes": step["mem"] * GB}
            pid = spawn(sim, 10_000, nice=step["nice"], **fields)
            asks[pid] = step
            line.append(pid)
        elif asks:
            alive = inside[:1] if step is None else sorted(inside + line)[step : step + 1]
            for pid in alive:
                sim.system.signal(pid, Signal.KILL)
                (inside if pid in inside else line).remove(pid)
            sim.dispatcher.serve_requests()
        free = {pool: most - sum(asks[p][pool] for p in inside) for pool, most in room.items()}
        taken: set[str] = set()
        for pid in sorted(line, key=lambda p: (asks[p]["nice"], p)):
            wanted = {pool: asks[pid][pool] for pool in room if asks[pid][pool]}
            if wanted.keys() & taken or any(free[pool] < n for pool, n in wanted.items()):
                taken |= wanted.keys()
                continue
            free = {pool: free[pool] - wanted.get(pool, 0) for pool in room}
            inside.append(pid)
            line.remove(pid)
        views: list[ProcessView] = [p for p in sim.system.snapshot().processes if p.exit_code is None]
        assert {
            p.pid for p in views if not p.waits_for.endswith(("gpus", "cpus", "gpu", "cpu", "ram"))
        } == set(inside)
        agree(sim)


# At the prompt


@pytest.mark.parametrize(
    ("option", "code", "said"),
    [
        ("--mem -1", 2, "`-1` is not a size"),
        ("--mem 5X", 2, "--mem"),
        ("--cpus nan", 2, "cpus nan is out of range"),
        ("--cpus -2", 2, "cpus -2.0 is out of range"),
        ("--gpus x", 2, "invalid float value"),
        ("--gpus 3", 75, "this machine has none"),
        ("--mem 512T", 75, "more than can ever be free"),
    ],
)
def test_bad_needs_are_one_clear_line(option: str, code: int, said: str) -> None:
    with session() as shell:
        status, out, err = shell.line(f"run quick {option} hello")
        assert (status, out) == (code, "") and said in err
        assert len([line for line in err.splitlines() if line.startswith("error:")]) == 1


def test_free_and_ps_show_the_fractions() -> None:
    with session(resources=Resources(cpus=2, gpus=2)) as shell:
        shell.line("run endless --cpus 0.5 --gpus 1.5 --mem 512M go on > /dev/null &")
        _, out, _ = shell.line("free --json")
        pools = {row["name"]: row for row in json.loads(out)}
        assert (pools["cpus"]["used_milli"], pools["gpus"]["free_milli"]) == (500, 500)
        assert pools["ram"]["claims"] == [{"owner": "process 2", "kind": "declared", "size_bytes": 512 << 20}]
        _, out, _ = shell.line("ps --json")
        (row,) = json.loads(out)
        assert (row["cpus"], row["gpus"], row["mem_bytes"]) == (0.5, 1.5, 512 << 20)
        _, out, _ = shell.line("free")
        assert any(line.split() == ["gpus", "2", "1.5", "0.5"] for line in out.splitlines())
        _, _, err = shell.line("run endless --gpus 1 wait for it > /dev/null &")
        assert "3 waits for 1 gpu" in err
        status, _, err = shell.line("run endless --no-wait --gpus 1 now or never")
        assert status == 75 and "0.5 gpus more than is free" in err
        _, out, _ = shell.line("why 3")
        assert "It waits to be admitted: 1 gpu." in out
