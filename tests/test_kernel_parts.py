"""Small parts of the kernel, each alone: mailboxes, topics, streams, rates, the ledger."""

import threading

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kernel.bus import Bus, Mailbox
from kernel.errors import AdmissionRefused, MailboxClosed, WouldBlock
from kernel.memory import MemoryLedger, Pool
from kernel.message import Message
from kernel.monitor import Rate
from kernel.stream import Stream
from kernel.units import human_bytes


def message(text: str, kind: str = "data") -> Message:
    return Message(kind, "topic", 0.0, {"text": text})  # type: ignore[arg-type]


def texts(mailbox: Mailbox) -> list[object]:
    return [mailbox.receive_nowait().body["text"] for _ in range(len(mailbox))]


def test_commands_overtake_data_and_are_dropped_last() -> None:
    mailbox = Mailbox(3)
    for text, kind in (("a", "data"), ("b", "command"), ("c", "data"), ("d", "data")):
        mailbox.offer(message(text, kind))
    assert texts(mailbox) == ["b", "c", "d"]


def test_a_closed_mailbox_is_drained_first() -> None:
    mailbox = Mailbox(2)
    with pytest.raises(WouldBlock):
        mailbox.wait_receive(0.0)
    mailbox.offer(message("a"))
    mailbox.close()
    assert mailbox.wait_receive(0.0).body["text"] == "a"
    with pytest.raises(MailboxClosed):
        mailbox.wait_receive(None)
    mailbox.offer(message("b"))
    assert not len(mailbox)


def test_a_message_wakes_a_receiver() -> None:
    mailbox = Mailbox(2)
    got: list[Message] = []
    receiver = threading.Thread(target=lambda: got.append(mailbox.wait_receive(10.0)))
    receiver.start()
    mailbox.offer(message("a"))
    receiver.join(10.0)
    assert [m.body["text"] for m in got] == ["a"]


def test_a_slow_subscriber_loses_alone() -> None:
    bus = Bus(2)
    slow, quick = bus.subscribe("topic"), bus.subscribe("topic", "other")
    seen: list[object] = []
    for text in "abcde":
        bus.publish(message(text))
        seen += texts(quick)
    assert seen == list("abcde") and quick.dropped == 0
    assert texts(slow) == ["d", "e"] and slow.dropped == 3
    bus.unsubscribe(quick)
    bus.publish(message("f"))
    with pytest.raises(MailboxClosed):
        quick.receive_nowait()


@given(st.lists(st.text(st.characters(exclude_categories=[]), max_size=5), max_size=20), st.integers(0, 100))
def test_a_stream_reads_the_same_from_any_offset(pieces: list[str], offset: int) -> None:
    stream = Stream()
    for piece in pieces:
        stream.write(piece)
    whole = "".join(pieces)
    assert stream.read(offset, 0.0) == (whole[offset:], len(whole), False)
    stream.close()
    assert stream.read(offset, None) == (whole[offset:], len(whole), True)


def test_a_stream_wakes_its_reader() -> None:
    stream, got = Stream(), []
    reader = threading.Thread(target=lambda: got.append(stream.read(0, 10.0)))
    reader.start()
    stream.write("hello")
    reader.join(10.0)
    assert got == [("hello", 5, False)]


@pytest.mark.parametrize("seconds", [0.2, 1.0, 5.0])
def test_a_steady_flow_has_its_rate_from_the_start(seconds: float) -> None:
    rate, now_s = Rate(1.0, 100.0), 100.0
    while now_s < 100.0 + seconds:
        now_s += 0.01
        rate.count(3, now_s)
    assert rate.per_s(now_s) == pytest.approx(300.0, rel=0.02)


def test_a_flow_that_ended_fades() -> None:
    rate = Rate(1.0, 0.0)
    for step in range(300):
        rate.count(1, step * 0.01)
    assert rate.per_s(3.0) > 90
    assert rate.per_s(13.0) < 0.01


def ledger(capacity: int) -> MemoryLedger:
    made = MemoryLedger()
    made.add_pool(Pool("ram", capacity))
    return made


@given(
    st.lists(
        st.tuples(
            st.sampled_from("abc"), st.sampled_from(["claim", "release", "correct"]), st.integers(0, 60)
        )
    )
)
def test_the_ledger_never_admits_more_than_there_is(steps: list[tuple[str, str, int]]) -> None:
    """Against a dict: claims add up or are refused, corrections replace, releases return what was held."""
    books, held = ledger(100), dict.fromkeys("abc", 0)
    for owner, what, size in steps:
        if what == "release":
            assert books.release("ram", owner) == held[owner]
            held[owner] = 0
        elif what == "correct":
            books.correct("ram", owner, {"kv": size})
            held[owner] = size
        elif sum(held.values()) + size <= 100:
            books.claim("ram", owner, {"kv": size})
            held[owner] += size
        elif size:
            with pytest.raises(AdmissionRefused):
                books.claim("ram", owner, {"kv": size})
        (pool,) = books.views()
        assert pool.used_bytes == sum(held.values()) == sum(claim.size_bytes for claim in pool.claims)
        books.check_integrity()


def test_other_programs_count_as_measured() -> None:
    books = MemoryLedger()
    books.add_pool(Pool("ram", 100, reserve=10, available=lambda: 50))
    books.claim("ram", "model", {"weights": 30})
    (pool,) = books.views()
    assert {claim.owner: claim.size_bytes for claim in pool.claims} == {"model": 30, "other programs": 20}
    assert pool.free_bytes == 40
    with pytest.raises(AdmissionRefused, match="1 B more") as caught:
        books.claim("ram", "second", {"weights": 41})
    assert caught.value.hint == "held by model 30 B, other programs 20 B"


def test_bytes_for_people() -> None:
    sizes = (0, 1023, 1536, 5 << 20, 3 << 30, 2 << 40)
    assert [human_bytes(n) for n in sizes] == ["0 B", "1.0 KiB", "1.5 KiB", "5.0 MiB", "3.0 GiB", "2.0 TiB"]
