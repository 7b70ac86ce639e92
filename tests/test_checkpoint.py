"""Checkpoint files: what is written is read back, and nothing that differs is accepted."""

import hashlib
import json
import random
import struct
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kernel.checkpoint import Checkpoint, SavedThread, decode, encode, read, write
from kernel.device import Sampling
from kernel.errors import CheckpointInvalid, LlmosError, NotPermitted, UsageError
from kernel.spec import ProcessSpec

KEY = b"k" * 32
SPEC = ProcessSpec(
    "nano",
    ("one", "two", "three"),
    lines=True,
    sampling=Sampling(0.5, seed=7),
    nice=3,
    command="run …",
    threads=3,
    samples=2,
)
THREADS = (
    SavedThread(1, True, 3, (5, 6, 7, 8), "half a", b"\x00\x01" * 500, (1, 2, 2, 3)),
    SavedThread(3, True, 2, (5, 6), "", None),
    SavedThread(4, False, 0, (), "", b"\x02" * 70),
)
STATE = Checkpoint(SPEC, "digest", {0: "reply", 2: "early"}, THREADS, 10, 20)


def without_kv(state: Checkpoint) -> Checkpoint:
    return replace(state, threads=tuple(replace(thread, kv=None) for thread in state.threads))


def test_round_trip(tmp_path: Path) -> None:
    file = tmp_path / "p.ckpt"
    size = write(STATE, file, KEY)
    assert file.stat().st_size == size
    assert read(file, KEY) == STATE
    assert list(tmp_path.iterdir()) == [file]


@settings(max_examples=60)
@given(
    prompts=st.lists(st.text(), min_size=1, max_size=4),
    tokens=st.lists(st.integers(0, 2**31 - 1), max_size=20),
    kv=st.none() | st.binary(min_size=1, max_size=50),
    reply=st.text(st.characters(exclude_categories=[])),  # lone surrogates too
)
def test_any_state_round_trips(prompts: list[str], tokens: list[int], kv: bytes | None, reply: str) -> None:
    spec = replace(SPEC, prompts=tuple(prompts))
    thread = SavedThread(0, True, len(tokens), tuple(tokens), reply, kv)
    state = replace(STATE, spec=spec, replies={1: reply}, threads=(thread,))
    assert decode(encode(state, KEY), KEY) == state


def test_a_foreign_key_costs_the_kv_and_nothing_else() -> None:
    assert decode(encode(STATE, KEY), b"x" * 32) == without_kv(STATE)


def test_of_two_thousand_damaged_files_none_is_accepted_that_differs() -> None:
    """A mutation of the MAC alone makes the file a stranger's: its KV must not be used."""
    source, blob = random.Random(11), encode(STATE, KEY)
    for _ in range(2000):
        data = bytearray(blob)
        match source.randrange(3):
            case 0:
                data[source.randrange(len(data))] ^= 1 << source.randrange(8)
            case 1:
                del data[source.randrange(len(data)) :]
            case 2:
                at = source.randrange(len(data))
                data[at:at] = source.randbytes(source.randrange(1, 9))
        try:
            got = decode(bytes(data), KEY)
        except CheckpointInvalid:
            continue
        assert got == without_kv(STATE) and data[:-32] == blob[:-32]


@pytest.mark.parametrize(
    "change",
    [
        {"threads": [[1, True, 0, ["x"], "", 0]]},
        {"threads": [[1, True, 9, [5], "", 0]]},
        {"threads": [[1, True, 0, [5], None, 0]]},
        {"threads": [[1, True, 0, [5], "", 1]]},
        {"threads": [[0, True, 0, [5], "", 0]]},
        {"threads": [[n, True, 0, [], "", 0] for n in (1, 3, 4, 5)]},
        {"threads": [[1, 1, 0, [5], "", 0]]},
        {"threads": 3},
        {"turns": ["a job has none"]},
        {"replies": [[6, "there are but six"]]},
        {"replies": [["0", "text"]]},
        {"spec": {"model": 3}},
        {"counts": [1]},
    ],
)
def test_a_header_that_lies_is_refused(change: dict[str, object]) -> None:
    blob = encode(without_kv(STATE), KEY)
    _, version, size, _ = struct.unpack_from("<8sIQQ", blob)
    header = json.loads(blob[28 : 28 + size]) | change
    text = json.dumps(header).encode()
    body = struct.pack("<8sIQQ", b"LLMOSCKP", version, len(text), 0) + text
    forged = body + hashlib.sha256(body).digest() + bytes(32)
    with pytest.raises(CheckpointInvalid, match="makes no sense"):
        decode(forged, KEY)


def test_only_checkpoints_are_replaced(tmp_path: Path) -> None:
    notes, link, folder = tmp_path / "notes.txt", tmp_path / "link", tmp_path / "folder"
    notes.write_text("precious")
    link.symlink_to(notes)
    folder.mkdir()
    for target in (notes, link, folder, Path("/dev/null")):
        with pytest.raises(NotPermitted, match="exists and is not"):
            write(STATE, target, KEY)
    with pytest.raises(UsageError):
        write(STATE, Path(), KEY)
    assert notes.read_text() == "precious" and link.is_symlink()


def test_a_full_disk_leaves_nothing_behind() -> None:
    with pytest.raises(LlmosError, match="cannot write"):
        write(STATE, Path("/proc/self/p.ckpt"), KEY)


def test_a_failed_save_keeps_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "p.ckpt"
    write(STATE, file, KEY)
    before = file.read_bytes()

    def full(handle: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(LlmosError, match="No space left"):
        write(replace(STATE, model_digest="other"), file, KEY)
    assert file.read_bytes() == before and list(tmp_path.iterdir()) == [file]


@pytest.mark.parametrize("content", [b"", b"LLMOSCKP", b"\x7fELF" * 100, b"LLMOSCKP" + bytes(100)])
def test_other_files_are_not_checkpoints(tmp_path: Path, content: bytes) -> None:
    file = tmp_path / "x"
    file.write_bytes(content)
    with pytest.raises(CheckpointInvalid, match=str(file)):
        read(file, KEY)
    with pytest.raises(LlmosError, match="cannot read"):
        read(tmp_path, KEY)
