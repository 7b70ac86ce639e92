"""The ledger: claims in several pools at once, processors in thousandths, what is shown adds up."""

import subprocess
import sys
import threading
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kernel.admission import needs_of
from kernel.errors import AdmissionRefused
from kernel.memory import MemoryLedger, Pool
from kernel.spec import ProcessSpec
from llmos.boot import _ram_resident

CAPACITY = {"ram": 1000, "gpu0": 500, "cpus": 2000}


def books() -> MemoryLedger:
    made = MemoryLedger()
    for name, capacity in CAPACITY.items():
        made.add_pool(Pool(name, capacity, counted=name == "cpus"))
    return made


def used(ledger: MemoryLedger) -> dict[str, int]:
    shares = {share.name: share.used_milli for share in ledger.shares()}
    return {view.name: view.used_bytes for view in ledger.views()} | shares


amounts = st.dictionaries(st.sampled_from(sorted(CAPACITY)), st.integers(0, 1200), min_size=1)


@given(st.lists(st.tuples(st.sampled_from("abcd"), st.booleans(), amounts)))
def test_claims_in_several_pools_are_all_or_none(steps: list[tuple[str, bool, dict[str, int]]]) -> None:
    """Against a dict of dicts: what fits everywhere is held everywhere, what does not changes nothing."""
    ledger = books()
    held: dict[tuple[str, str], int] = {}
    for owner, gives_back, asks in steps:
        if gives_back:
            assert ledger.release_kind(owner, "declared") == sum(
                n for (o, _), n in held.items() if o == owner
            )
            held = {key: amount for key, amount in held.items() if key[0] != owner}
        else:
            sums = {pool: sum(n for (_, p), n in held.items() if p == pool) for pool in CAPACITY}
            fits = all(sums[pool] + amount <= CAPACITY[pool] for pool, amount in asks.items())
            assert (ledger.short(asks) == {}) == fits == (ledger.refusal(asks, owner) is None)
            claims = [(pool, owner, {"declared": amount}) for pool, amount in asks.items()]
            if fits:
                ledger.claim_all(claims)
                for pool, amount in asks.items():
                    held[owner, pool] = held.get((owner, pool), 0) + amount
            else:
                with pytest.raises(AdmissionRefused):
                    ledger.claim_all(claims)
        assert used(ledger) == {p: sum(n for (_, q), n in held.items() if p == q) for p in CAPACITY}
        ledger.check_integrity()


def test_two_claims_on_one_pool_count_together() -> None:
    ledger = books()
    with pytest.raises(AdmissionRefused, match=r"b needs .* on ram, 200 B more"):
        ledger.claim_all([("ram", "a", {"kv": 600}), ("ram", "b", {"kv": 600})])
    assert used(ledger)["ram"] == 0


def test_fractions_are_exact() -> None:
    """Ten tenths are one, and thirds are rounded up: never is more promised than there is."""
    tenth = needs_of(ProcessSpec("m", ("x",), cpus=0.1))
    third = needs_of(ProcessSpec("m", ("x",), cpus=1 / 3, gpus=0.5, mem_bytes=7))
    assert tenth == {"cpus": 100}
    assert third == {"cpus": 334, "gpus": 500, "ram": 7}
    ledger = books()
    for n in range(20):
        ledger.claim("cpus", f"process {n}", {"declared": tenth["cpus"]})
    assert ledger.shares()[0].free_milli == 0
    with pytest.raises(AdmissionRefused, match=r"it needs 0.1 cpus, 0.1 cpus more than is free") as caught:
        ledger.claim("cpus", "it", {"declared": 100})
    assert "held by process 0 0.1 cpus" in caught.value.hint


def test_what_can_never_be_is_told_from_what_is_taken() -> None:
    ledger = books()
    ledger.claim("ram", "m", {"weights": 900})
    ledger.check_possible({"ram": 1000}, "it")
    with pytest.raises(AdmissionRefused, match="1 B more than can ever be free"):
        ledger.check_possible({"ram": 1001}, "it")
    with pytest.raises(AdmissionRefused, match="needs gpus, and this machine has none"):
        ledger.check_possible({"gpus": 1}, "it")


def test_others_are_what_is_in_use_and_not_ours() -> None:
    """Mapped weights are claimed, and the machine counts them as available: they hide nobody else's use."""
    resident = [0]
    ledger = MemoryLedger()
    ledger.add_pool(Pool("ram", 100, reserve=5, available=lambda: 60, resident=lambda: resident[0]))
    ledger.claim("ram", "m", {"weights": 20, "kv": 10})
    assert ledger.views()[0].free_bytes == 100 - 5 - 30 - 40
    resident[0] = 10  # the KV: it is among what is in use
    (view,) = ledger.views()
    assert {claim.owner: claim.size_bytes for claim in view.claims if claim.kind == "other"} == {
        "other programs": 30
    }
    assert (view.used_bytes, view.free_bytes, view.reserve_bytes) == (60, 35, 5)
    resident[0] = 1000  # more than we have claimed: the rest is no program's of ours that the ledger knows
    assert ledger.views()[0].used_bytes == 40
    ledger.check_integrity()


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="Linux tells it")
def test_what_is_resident_is_measured_with_the_workers() -> None:
    """Anonymous memory of this process and of a child of any of its threads; a mapped file does not count."""
    resident = _ram_resident()
    assert resident is not None
    before = resident()
    ours = bytearray(256 << 20)  # much more than what the system takes back from the tests before, meanwhile
    assert resident() - before > 150 << 20
    code = "block = bytearray(256 << 20); print(flush=True); input()"
    children: list[subprocess.Popen[bytes]] = []

    def start() -> None:
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
        children.append(subprocess.Popen([sys.executable, "-c", code], **pipes))  # type: ignore[call-overload]

    starter = threading.Thread(target=start)
    starter.start()
    starter.join()
    (child,) = children
    assert child.stdout is not None
    child.stdout.readline()
    assert resident() - before > 350 << 20
    child.communicate(b"\n")
    assert resident() - before < 350 << 20
    assert len(ours)


def test_a_measure_replaces_an_estimate_even_beyond_the_pool() -> None:
    ledger = books()
    ledger.claim("gpu0", "m", {"weights": 400, "kv": 100})
    ledger.correct("gpu0", "m", {"weights": 450, "kv": 100})
    gpu = next(view for view in ledger.views() if view.name == "gpu0")
    assert (gpu.used_bytes, gpu.free_bytes) == (550, 0)
    ledger.check_integrity()
    assert ledger.held("m") == {"gpu0": {"weights": 450, "kv": 100}}
    assert ledger.release("gpu0", "m") == 550
