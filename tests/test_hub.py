"""Pulling from a hub: what arrives, what goes on after a cut, and what is said of a hub that misbehaves."""

import fcntl
import hashlib
import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pexpect
import pytest
from pty_kit import started

from kernel.errors import (
    AdmissionRefused,
    LlmosError,
    ModelInvalid,
    ModelNotFound,
    NotPermitted,
    TimedOut,
    UsageError,
)
from llmos import shelf
from llmos.hub import Hub as Client
from llmos.hub import PullFailed
from llmos.paths import find_paths
from llmos.repository import parse_source
from llmos.store import Store
from tests.ggufs import NANO
from tests.hub_server import Hub, serving

NANO_BYTES = NANO.read_bytes()
SHA256 = hashlib.sha256(NANO_BYTES).hexdigest()
FILE = "tiny-Q8_0.gguf"


@pytest.fixture
def hub() -> Iterator[Hub]:
    with serving(Hub({FILE: NANO_BYTES, "README.md": b"# tiny"})) as server:
        yield server


@pytest.fixture
def models(llmos_home: Path) -> Path:
    return llmos_home / "models"


def quiet(name: str, done: int, total: int) -> None:
    pass


def store(hub: Hub, *, stall_s: float = 5.0) -> Store:
    client = Client(hub.endpoint, stall_s=stall_s, attempts=3, backoff_s=0.01)
    return Store(find_paths(), hub=client)


def partials(models: Path) -> list[Path]:
    return sorted((models / ".incoming").glob("*"))


def named(models: Path) -> list[str]:
    return sorted(path.name for path in models.glob("*") if not path.name.startswith("."))


def test_a_model_arrives_whole_and_can_be_named(hub: Hub, models: Path) -> None:
    seen: list[tuple[int, int]] = []
    found = store(hub)
    name = found.pull("hf:org/repo", lambda _name, done, total: seen.append((done, total)))
    assert name == "tiny-Q8_0"
    assert (models / FILE).read_bytes() == NANO_BYTES
    assert found.resolve("tiny").path == models / FILE
    assert partials(models) == []
    assert seen == sorted(seen)
    assert seen[-1] == (len(NANO_BYTES), len(NANO_BYTES))
    assert "llmos" in hub.agents[0]
    assert any("/resolve/c0ffee" in path for path, _ in hub.asked), "pinned to the commit of the list"


def test_pulling_what_is_here_fetches_nothing(hub: Hub) -> None:
    store(hub).pull("hf:org/repo", quiet)
    hub.asked.clear()
    assert store(hub).pull("hf:org/repo", quiet) == "tiny-Q8_0"
    assert hub.served() == []


def test_another_model_of_that_name_is_not_overwritten(hub: Hub, models: Path) -> None:
    models.mkdir(parents=True)
    (models / FILE).write_bytes(b"mine")
    with pytest.raises(NotPermitted, match="already"):
        store(hub).pull("hf:org/repo", quiet)
    assert (models / FILE).read_bytes() == b"mine"
    assert hub.served() == []


def test_a_link_of_that_name_is_not_written_through(hub: Hub, models: Path, tmp_path: Path) -> None:
    models.mkdir(parents=True)
    (models / FILE).symlink_to(tmp_path / "outside")
    with pytest.raises(NotPermitted):
        store(hub).pull("hf:org/repo", quiet)
    assert not (tmp_path / "outside").exists()


def test_a_linked_incoming_folder_is_not_written_through(hub: Hub, models: Path, tmp_path: Path) -> None:
    models.mkdir(parents=True)
    (tmp_path / "outside").mkdir()
    (models / ".incoming").symlink_to(tmp_path / "outside")
    with pytest.raises(NotPermitted, match="link"):
        store(hub).pull("hf:org/repo", quiet)
    (models / ".incoming").unlink()
    (models / ".incoming").mkdir()
    (models / ".incoming" / f"{SHA256}.part").symlink_to(tmp_path / "outside" / "file")
    with pytest.raises(LlmosError):
        store(hub).pull("hf:org/repo", quiet)
    assert list((tmp_path / "outside").iterdir()) == []


def test_a_small_file_is_checked_by_gits_checksum(models: Path) -> None:
    with serving(Hub({FILE: NANO_BYTES}, large=False)) as hub:
        store(hub).pull("hf:org/repo", quiet)
        assert (models / FILE).read_bytes() == NANO_BYTES
        (models / FILE).unlink()
        hub.damaged = True
        with pytest.raises(PullFailed, match="checksum"):
            store(hub).pull("hf:org/repo", quiet)


def test_a_cut_body_goes_on_where_it_ended(hub: Hub, models: Path) -> None:
    hub.cuts = [300_000, 200_000]
    store(hub).pull("hf:org/repo", quiet)
    assert hub.served() == ["", "bytes=300000-", "bytes=500000-"]
    assert (models / FILE).read_bytes() == NANO_BYTES


def test_a_pull_that_failed_is_taken_up_by_the_next(hub: Hub, models: Path) -> None:
    hub.cuts = [100_000, 0, 0]
    with pytest.raises(PullFailed) as raised:
        store(hub).pull("hf:org/repo", quiet)
    assert "goes on" in raised.value.hint
    assert named(models) == []
    assert [path.read_bytes() for path in partials(models)] == [NANO_BYTES[:100_000]]
    hub.asked.clear()
    store(hub).pull("hf:org/repo", quiet)
    assert hub.served() == ["bytes=100000-"]
    assert (models / FILE).read_bytes() == NANO_BYTES


def test_a_server_without_ranges_sends_it_all_again(hub: Hub, models: Path) -> None:
    hub.cuts, hub.ranges = [100_000], False
    store(hub).pull("hf:org/repo", quiet)
    assert (models / FILE).read_bytes() == NANO_BYTES


@pytest.mark.parametrize("left", [b"x" * 50_000, NANO_BYTES + b"x", NANO_BYTES[:-1] + b"?"])
def test_a_partial_file_that_was_damaged_does_not_become_a_model(hub: Hub, models: Path, left: bytes) -> None:
    (models / ".incoming").mkdir(parents=True)
    (models / ".incoming" / f"{SHA256}.part").write_bytes(left)
    try:
        store(hub).pull("hf:org/repo", quiet)
    except PullFailed:
        assert named(models) == []
        store(hub).pull("hf:org/repo", quiet)
    assert (models / FILE).read_bytes() == NANO_BYTES


def test_wrong_bytes_are_refused_and_dropped(hub: Hub, models: Path) -> None:
    hub.damaged = True
    with pytest.raises(PullFailed, match="arrived damaged") as raised:
        store(hub).pull("hf:org/repo", quiet)
    assert raised.value.exit_code == 1
    assert (named(models), partials(models)) == ([], [])
    hub.damaged = False
    store(hub).pull("hf:org/repo", quiet)
    assert (models / FILE).read_bytes() == NANO_BYTES


def test_more_bytes_than_the_list_says_are_refused(hub: Hub, models: Path) -> None:
    hub.surplus = b"more" * 100_000
    with pytest.raises(PullFailed, match="sent more"):
        store(hub).pull("hf:org/repo", quiet)
    assert (named(models), partials(models)) == ([], [])


def test_a_stall_ends_after_its_time_and_keeps_what_came(hub: Hub, models: Path) -> None:
    hub.stalls = [200_000, 0, 0]
    with pytest.raises(TimedOut, match=r"sent nothing for 0\.2 s") as raised:
        store(hub, stall_s=0.2).pull("hf:org/repo", quiet)
    assert raised.value.exit_code == 124
    assert [path.stat().st_size for path in partials(models)] == [200_000]
    assert named(models) == []


def test_a_short_stall_is_got_over(hub: Hub, models: Path) -> None:
    hub.stalls = [200_000]
    store(hub, stall_s=0.3).pull("hf:org/repo", quiet)
    assert (models / FILE).read_bytes() == NANO_BYTES


@pytest.mark.parametrize("statuses", [[503], [500, 429]])
def test_passing_errors_are_tried_again(hub: Hub, models: Path, statuses: list[int]) -> None:
    hub.statuses = statuses
    store(hub).pull("hf:org/repo", quiet)
    assert (models / FILE).read_bytes() == NANO_BYTES


@pytest.mark.parametrize(
    ("statuses", "error_code", "expected", "says"),
    [
        ([503] * 3, "", PullFailed, "503"),
        ([404], "RepoNotFound", ModelNotFound, "org/repo"),
        ([401], "", ModelNotFound, "private"),
        ([401], "GatedRepo", NotPermitted, "let in"),
        ([403], "GatedRepo", NotPermitted, "let in"),
        ([400], "", PullFailed, "400"),
    ],
)
def test_what_the_hub_refuses_is_said_in_one_line(
    hub: Hub, models: Path, statuses: list[int], error_code: str, expected: type[LlmosError], says: str
) -> None:
    hub.statuses, hub.error_code = statuses, error_code
    with pytest.raises(expected, match=says) as raised:
        store(hub).pull("hf:org/repo", quiet)
    assert "\n" not in raised.value.message
    assert type(raised.value) is expected
    assert not models.exists() or named(models) == []


def test_no_network_is_said_in_one_line(hub: Hub) -> None:
    hub.endpoint = "http://127.0.0.1:1"
    with pytest.raises(PullFailed, match=r"the connection to 127\.0\.0\.1:1 failed"):
        store(hub).pull("hf:org/repo", quiet)


@pytest.mark.parametrize(
    "listing",
    [
        [],
        {"sha": "main", "siblings": []},
        {"sha": "../../x", "siblings": [{"rfilename": FILE, "size": 5, "blobId": "a" * 40}]},
        {"sha": "c" * 40, "siblings": [{"rfilename": FILE}]},
        {"sha": "c" * 40, "siblings": [{"rfilename": FILE, "size": -1, "blobId": "a" * 40}]},
        {"sha": "c" * 40, "siblings": [{"rfilename": FILE, "size": 5}]},
        {"sha": "c" * 40, "siblings": [{"rfilename": FILE, "size": 5, "blobId": "../../../etc/passwd"}]},
        {
            "sha": "c" * 40,
            "siblings": [{"rfilename": FILE, "lfs": {"size": 5, "sha256": "../x", "pointerSize": 1}}],
        },
    ],
)
def test_a_list_that_makes_no_sense_is_refused(hub: Hub, models: Path, listing: object) -> None:
    hub.listing = listing
    with pytest.raises(PullFailed):
        store(hub).pull("hf:org/repo", quiet)
    assert hub.served() == []
    assert not models.exists() or named(models) == []


@pytest.mark.parametrize(
    "path", ["../escape.gguf", "/tmp/escape.gguf", "a/../../escape.gguf", "..gguf", "-x.gguf"]
)
def test_names_from_the_hub_stay_in_the_folder(models: Path, tmp_path: Path, path: str) -> None:
    before = set(tmp_path.rglob("*"))
    with serving(Hub({path: NANO_BYTES})) as hub:
        try:
            store(hub).pull("hf:org/repo", quiet)
        except LlmosError:
            assert not models.exists() or named(models) == []
        else:
            assert named(models) == ["escape.gguf"]
    outside = {p for p in set(tmp_path.rglob("*")) - before if models not in (p, *p.parents)}
    assert outside <= {models.parent}
    assert not Path("/tmp/escape.gguf").exists()


def test_a_full_disk_is_said_before_a_byte_is_fetched(
    hub: Hub, models: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = type("Usage", (), {"free": shelf.SPARE_BYTES + 1000})
    monkeypatch.setattr(shelf.shutil, "disk_usage", lambda _path: usage)
    with pytest.raises(AdmissionRefused, match="more than is free") as raised:
        store(hub).pull("hf:org/repo", quiet)
    assert raised.value.exit_code == 75
    assert (hub.served(), partials(models)) == ([], [])


def test_a_disk_that_fills_up_keeps_what_came(
    hub: Hub, models: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fsync(_descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", fsync)
        with pytest.raises(LlmosError, match=r"cannot write tiny-Q8_0\.gguf: No space left"):
            store(hub).pull("hf:org/repo", quiet)
    assert named(models) == []
    assert len(partials(models)) == 1
    store(hub).pull("hf:org/repo", quiet)
    assert (models / FILE).read_bytes() == NANO_BYTES


def test_a_file_that_someone_else_fills_is_left_to_them(hub: Hub, models: Path) -> None:
    (models / ".incoming").mkdir(parents=True)
    with (models / ".incoming" / f"{SHA256}.part").open("wb") as theirs:
        fcntl.flock(theirs, fcntl.LOCK_EX)
        with pytest.raises(NotPermitted, match="another LLMOS"):
            store(hub).pull("hf:org/repo", quiet)
    assert hub.served() == []


def test_a_crash_after_naming_leaves_a_link_that_is_never_written_to(hub: Hub, models: Path) -> None:
    store(hub).pull("hf:org/repo", quiet)
    (models / ".incoming" / f"{SHA256}.part").hardlink_to(models / FILE)
    (models / FILE).rename(models / "renamed.gguf")
    hub.damaged = True
    with pytest.raises(PullFailed):
        store(hub).pull("hf:org/repo", quiet)
    assert (models / "renamed.gguf").read_bytes() == NANO_BYTES


def test_a_model_in_parts_comes_as_one(models: Path) -> None:
    parts = {f"Q8_0/big-0000{n}-of-00003.gguf": NANO_BYTES + bytes([n]) for n in (1, 2, 3)}
    with serving(Hub({**parts, "small-Q4_0.gguf": b"x"})) as hub:
        found = store(hub)
        assert found.pull("hf:org/repo:q8_0", quiet) == "big"
        assert len(found.find("big").parts) == 3
        assert "big-00001" in hub.asked[-1][0], "the first part, which names the model, comes last"


NAMES = ("m-Q4_K.gguf", "m-Q4_K_M.gguf", "m-UD-Q4_K_XL.gguf", "IQ4_XS/m-IQ4_XS.gguf", "mmproj-F16.gguf")
CHOICES = dict.fromkeys(NAMES, NANO_BYTES)


@pytest.mark.parametrize(
    ("choice", "expected"),
    [
        (":Q4_K", "m-Q4_K"),
        (":q4_k_m", "m-Q4_K_M"),
        (":Q4_K_XL", "m-UD-Q4_K_XL"),
        (":IQ4_XS", "m-IQ4_XS"),
        (":m-Q4_K_M.gguf", "m-Q4_K_M"),
        (":IQ4_XS/m-IQ4_XS.gguf", "m-IQ4_XS"),
        (":mmproj-F16.gguf", "mmproj-F16"),
    ],
)
def test_a_quantisation_or_a_file_picks_one_of_several(choice: str, expected: str) -> None:
    with serving(Hub(CHOICES)) as hub:
        assert store(hub).pull("hf:org/repo" + choice, quiet) == expected


def test_several_models_are_named_and_none_is_guessed() -> None:
    with serving(Hub(CHOICES)) as hub:
        with pytest.raises(UsageError, match="has 4 models") as raised:
            store(hub).pull("hf:org/repo", quiet)
        assert "m-Q4_K_M.gguf (0.0 GB)" in raised.value.hint
        assert "mmproj" not in raised.value.hint
        with pytest.raises(ModelNotFound, match="Q5_1"):
            store(hub).pull("hf:org/repo:Q5_1", quiet)


def test_a_repository_without_gguf_is_126() -> None:
    with serving(Hub({"model.safetensors": b"x", "config.json": b"{}"})) as hub:
        with pytest.raises(ModelInvalid, match="no GGUF") as raised:
            store(hub).pull("hf:org/repo", quiet)
        assert "safetensors" in raised.value.hint


@pytest.mark.parametrize(
    "text",
    [
        "",
        "org/repo",
        "hf:",
        "hf:org",
        "hf:a/b/c",
        "hf:../x",
        "hf:a/..",
        "hf:a/b:",
        "hf:.a/b",
        "hf:a/b.git",
        "hf:a/b\n",
        "hf:a--b/c",
        "http://x/y",
        "hf:a/" + "b" * 100,
    ],
)
def test_what_names_no_repository_is_a_usage_error(text: str) -> None:
    with pytest.raises(UsageError):
        parse_source(text)


# Through the program


def environment(hub: Hub) -> dict[str, str]:
    return {
        **os.environ,
        "HF_ENDPOINT": hub.endpoint,
        "PROMPT_TOOLKIT_NO_CPR": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
    }


def spawn(hub: Hub, *words: str) -> "pexpect.spawn[str]":
    return started(["-m", "llmos", *words], environment(hub), 100, 30)


def test_ctrl_c_ends_a_pull_with_130_and_the_next_goes_on(hub: Hub, models: Path) -> None:
    hub.chunk_s = 0.05
    child = spawn(hub, "pull", "hf:org/repo")
    child.expect(r"tiny-Q8_0\.gguf.*MB/s")
    child.sendintr()
    child.expect("interrupted")
    child.expect(pexpect.EOF)
    child.close()
    assert child.exitstatus == 130
    assert named(models) == []
    (partial,) = partials(models)
    kept = partial.stat().st_size
    assert 0 < kept < len(NANO_BYTES)
    assert partial.read_bytes() == NANO_BYTES[:kept]
    hub.chunk_s = 0
    hub.asked.clear()
    child = spawn(hub, "pull", "hf:org/repo")
    child.expect("pulled tiny-Q8_0")
    child.expect(pexpect.EOF)
    child.close()
    assert child.exitstatus == 0
    assert hub.served() == [f"bytes={kept}-"]
    assert (models / FILE).read_bytes() == NANO_BYTES


def test_ctrl_c_ends_a_stall_at_once(hub: Hub, models: Path) -> None:
    hub.stalls = [200_000]
    child = spawn(hub, "pull", "hf:org/repo")
    child.expect("MB/s")
    child.sendintr()
    child.expect("interrupted", timeout=10)  # the hub's own time is 20 s
    child.expect(pexpect.EOF)
    child.close()
    assert child.exitstatus == 130


def test_a_killed_pull_leaves_nothing_under_a_name(hub: Hub, models: Path) -> None:
    hub.chunk_s = 0.05
    child = spawn(hub, "pull", "hf:org/repo")
    child.expect("MB/s")
    child.kill(signal.SIGKILL)
    child.wait()
    assert named(models) == []
    hub.chunk_s = 0
    assert store(hub).pull("hf:org/repo", quiet) == "tiny-Q8_0"
    assert (models / FILE).read_bytes() == NANO_BYTES
