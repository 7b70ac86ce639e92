"""show, cp, rm and the list, as people type them, on a booted LLMOS with the built-in model."""

import io
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from kernel.units import human_bytes
from llmos import shelf
from llmos.boot import boot
from shell.commands.store import fit_of
from shell.interpreter import run_line
from shell.session import Shell
from shell.terminal import Output
from tests import zoo
from tests.ggufs import NANO
from tests.shell_kit import Terminal


class Keyboard(io.BytesIO):
    """Standard input that is a terminal."""

    def isatty(self) -> bool:
        return True


@pytest.fixture
def own(llmos_home: Path) -> Path:
    folder = llmos_home / "models"
    folder.mkdir(parents=True)
    return folder


@pytest.fixture
def shell(tmp_path: Path, own: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Shell]:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    monkeypatch.setenv("OLLAMA_MODELS", str(tmp_path / "ollama"))
    machine = boot({"isolation": "none"}, plugins=False)
    try:
        yield machine.shell
    finally:
        machine.system.shutdown()


def typed(shell: Shell, line: str, *, terminal: bool = False) -> tuple[int, str, str]:
    """Run a line; what it printed on both streams."""
    out, err = (Terminal(), Terminal()) if terminal else (io.StringIO(), io.StringIO())
    shell.out, shell.err = Output(out, {}), Output(err, {})
    return run_line(shell, line), out.getvalue(), err.getvalue()


def files(own: Path) -> list[str]:
    return sorted(path.name for path in own.iterdir() if not path.name.startswith("."))


def test_show_tells_what_the_header_says_and_where_it_fits(shell: Shell) -> None:
    status, out, _ = typed(shell, "show nano")
    assert status == 0
    for line in (
        "quantization  Q8_0",
        "context       512 tokens",
        "KV            2.0 KiB per token",
        "chat template yes",
        "license       MIT",
        "author        LLMOS",
        "fits in       RAM",
    ):
        assert line in out.splitlines()
    status, out, _ = typed(shell, "show nano --json")
    told = json.loads(out)
    needs = told["estimate"]
    assert needs["total_bytes"] == needs["weights_bytes"] + needs["kv_bytes"] + needs["compute_bytes"]
    assert (told["fit"], told["info"]["kv_bytes_per_token"]) == ("RAM", 2048)


def test_show_knows_a_loaded_model_by_its_name_in_the_list(shell: Shell, tmp_path: Path) -> None:
    copy = tmp_path / "elsewhere.gguf"
    copy.write_bytes(NANO.read_bytes())
    assert typed(shell, "show elsewhere")[0] == 127
    assert typed(shell, f"load {copy}")[0] == 0
    status, out, _ = typed(shell, "show elsewhere")
    assert status == 0 and str(copy) in out


def test_what_a_file_says_of_itself_cannot_steer_the_terminal(shell: Shell, own: Path) -> None:
    evil = NANO.read_bytes().replace(b"llmos-tiny", b"\x1b[31m\n\rx\x07y")
    (own / "evil.gguf").write_bytes(evil)
    status, out, _ = typed(shell, "show evil", terminal=True)
    assert status == 0
    assert not {"\x1b", "\r", "\x07"} & set(out)
    assert sum(line.startswith("title") for line in out.splitlines()) == 1
    assert len(out.splitlines()) == len(typed(shell, "show nano")[1].splitlines())


def test_show_of_what_is_no_model_is_126_and_of_nothing_127(shell: Shell, own: Path) -> None:
    (own / "bad.gguf").write_bytes(b"GGUF" + b"\xff" * 100)
    assert typed(shell, "show bad")[0] == 126
    assert typed(shell, "show nowhere")[0] == 127


def test_the_list_shows_size_quantisation_and_fit_of_models_on_disk(shell: Shell, own: Path) -> None:
    (own / "bad.gguf").write_bytes(b"junk" * 10)
    _, out, _ = typed(shell, "models")
    nano = next(line for line in out.splitlines() if line.startswith("nano"))
    assert nano.split()[:7] == ["nano", "disk", "-", "RAM", "1.2M", "1.1M", "Q8_0"]
    assert "not a GGUF file" in next(line for line in out.splitlines() if line.startswith("bad"))
    listed = {row["name"]: row for row in json.loads(typed(shell, "models --json")[1])}
    assert listed["nano"]["fit"] == "RAM"
    assert listed["nano"]["info"]["file_bytes"] == NANO.stat().st_size
    assert listed["bad"]["info"] is None


def test_fit_follows_what_is_free(shell: Shell) -> None:
    from dataclasses import replace

    info, estimate = shell.system.inspect("nano")
    view = shell.system.snapshot()
    pool = next(pool for pool in view.pools if pool.name == "ram")
    (device,) = view.devices
    need = estimate.total_bytes

    def fit(free_bytes: int, kind: str = "cpu", capacity_bytes: int = need) -> str:
        described = replace(device.info, kind=kind, memory_bytes=capacity_bytes)
        pools = (replace(pool, name=described.pool, free_bytes=free_bytes),)
        return fit_of(info, estimate, replace(view, pools=pools, devices=(replace(device, info=described),)))

    assert fit(need) == "RAM"
    assert fit(need, "metal") == "VRAM"
    assert fit(need - 1) == "later"
    assert fit(need - 1, capacity_bytes=need - 1) == "no"
    assert fit(need, "cuda") == "VRAM", "if the local build of llama.cpp has CUDA, the device is there"


def test_an_ollama_model_runs_in_place(shell: Shell, tmp_path: Path) -> None:
    root, digest = tmp_path / "ollama", "d" * 64
    tag = root / "manifests/registry.ollama.ai/library/tiny/latest"
    tag.parent.mkdir(parents=True)
    layer = {"mediaType": "application/vnd.ollama.image.model", "digest": f"sha256:{digest}"}
    tag.write_text(json.dumps({"layers": [layer]}))
    (root / "blobs").mkdir()
    shutil.copyfile(NANO, root / "blobs" / f"sha256-{digest}")
    status, out, err = typed(shell, "run tiny list processes")
    assert (status, err) == (0, "")
    assert out.strip()
    assert "from          Ollama" in typed(shell, "show tiny")[1]


def test_cp_keeps_a_model_under_another_name(shell: Shell, own: Path) -> None:
    assert typed(shell, "cp nano mine")[0] == 0
    assert (own / "mine.gguf").read_bytes() == NANO.read_bytes()
    assert typed(shell, "show mine")[0] == 0
    status, _, err = typed(shell, "cp nano mine")
    assert (status, "already" in err) == (1, True)


def test_cp_copies_bytes_where_no_link_can_be(
    shell: Shell, own: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shelf.Shelf, "link", lambda *_: False)
    assert typed(shell, "cp nano mine.gguf")[0] == 0
    assert (own / "mine.gguf").read_bytes() == NANO.read_bytes()
    assert not (own / "mine.gguf").samefile(NANO)
    assert list((own / ".incoming").iterdir()) == []


def test_cp_of_what_a_link_means_keeps_the_file_and_not_the_link(
    shell: Shell, own: Path, tmp_path: Path
) -> None:
    shutil.copyfile(NANO, tmp_path / "blob")
    (tmp_path / "linked.gguf").symlink_to("blob")
    assert typed(shell, f"cp {tmp_path}/linked.gguf mine")[0] == 0
    assert not (own / "mine.gguf").is_symlink()
    (tmp_path / "blob").unlink()
    assert (own / "mine.gguf").read_bytes() == NANO.read_bytes()


@pytest.mark.parametrize(
    "name",
    [
        "../out",
        "a/b",
        "/tmp/llmos-out",
        "..",
        ".hidden",
        "'a\x1bb'",
        "'a\nb'",
        "''",
        "~x",
        "x\\\\y",
        "-- -x",
        "a" * 250,
    ],
)
def test_cp_takes_no_name_that_leads_elsewhere(shell: Shell, own: Path, tmp_path: Path, name: str) -> None:
    before = set(tmp_path.rglob("*"))
    status, _, err = typed(shell, f"cp nano {name}")
    assert status == 2
    assert len(err.splitlines()) <= 2
    assert {path for path in set(tmp_path.rglob("*")) - before if path.suffix == ".gguf"} == set()


def test_cp_of_junk_is_refused(shell: Shell, own: Path, tmp_path: Path) -> None:
    (tmp_path / "junk.bin").write_bytes(b"junk" * 100)
    assert typed(shell, f"cp {tmp_path}/junk.bin mine")[0] == 126
    assert files(own) == []


def test_rm_deletes_from_the_own_folder(shell: Shell, own: Path) -> None:
    shutil.copyfile(NANO, own / "mine.gguf")
    status, _, err = typed(shell, "rm mine")
    assert (status, files(own)) == (0, [])
    assert "freed 1.2 MiB" in err


def test_rm_deletes_every_part(shell: Shell, own: Path) -> None:
    for part in (1, 2):
        (own / f"big-0000{part}-of-00002.gguf").touch()
    (own / "alone-00001-of-00002.gguf").touch()
    assert typed(shell, "rm big")[0] == 0
    assert typed(shell, "rm alone")[0] == 0
    assert files(own) == []


def test_rm_removes_a_link_and_not_what_it_leads_to(shell: Shell, own: Path, tmp_path: Path) -> None:
    shutil.copyfile(NANO, tmp_path / "precious.gguf")
    (own / "linked.gguf").symlink_to(tmp_path / "precious.gguf")
    (own / "gone.gguf").symlink_to(tmp_path / "nowhere")
    folder = tmp_path / "weights"
    folder.mkdir()
    (folder / "config.json").touch()
    (folder / "model.safetensors").touch()
    (own / "folder").symlink_to(folder)
    for name in ("linked", "gone", "folder"):
        assert typed(shell, f"rm {name}")[0] == 0
    assert files(own) == []
    assert (tmp_path / "precious.gguf").read_bytes() == NANO.read_bytes()
    assert (folder / "model.safetensors").exists()


@pytest.mark.parametrize(
    ("name", "code"), [("nano", 1), ("min", 127), ("../mine", 127), ("/etc/passwd", 127), ("*", 127)]
)
def test_rm_wants_the_whole_name_of_an_own_model(shell: Shell, own: Path, name: str, code: int) -> None:
    (own / "mine.gguf").touch()
    (own.parent / "mine.gguf").touch()
    status, _, err = typed(shell, f"rm {name}")
    assert status == code
    assert "hint" in err
    assert files(own) == ["mine.gguf"]
    assert NANO.exists()
    assert (own.parent / "mine.gguf").exists()


def test_rm_refuses_a_model_that_is_loaded(shell: Shell, own: Path) -> None:
    shutil.copyfile(NANO, own / "mine.gguf")
    assert typed(shell, "load mine")[0] == 0
    status, _, err = typed(shell, "rm mine -y")
    assert (status, files(own)) == (1, ["mine.gguf"])
    assert "unload mine" in err
    assert typed(shell, "unload mine")[0] == 0
    assert typed(shell, "rm mine -y")[0] == 0


@pytest.mark.parametrize(
    ("answer", "gone"), [(b"y\n", True), (b"YES\n", True), (b"n\n", False), (b"\n", False), (b"", False)]
)
def test_rm_asks_at_the_prompt(shell: Shell, own: Path, answer: bytes, gone: bool) -> None:
    shutil.copyfile(NANO, own / "mine.gguf")
    shell.interactive, shell.stdin = True, Keyboard(answer)
    status, _, err = typed(shell, "rm mine")
    assert "remove mine, 1.2 MiB? [y/N]" in err
    assert (status, files(own)) == ((0, []) if gone else (1, ["mine.gguf"]))


@pytest.mark.parametrize(("line", "interactive"), [("rm mine -y", True), ("rm mine", False)])
def test_rm_asks_neither_when_told_so_nor_in_a_script(
    shell: Shell, own: Path, line: str, interactive: bool
) -> None:
    shutil.copyfile(NANO, own / "mine.gguf")
    shell.interactive, shell.stdin = interactive, Keyboard(b"")
    status, _, err = typed(shell, line)
    assert (status, "?" in err, files(own)) == (0, False, [])


def test_a_folder_that_vanishes_is_no_crash(shell: Shell, own: Path) -> None:
    shutil.copyfile(NANO, own / "mine.gguf")
    shutil.rmtree(own)
    assert typed(shell, "rm mine")[0] == 127
    assert typed(shell, "models")[0] == 0
    assert typed(shell, "cp nano mine")[0] == 0, "it is made again"
    assert files(own) == ["mine.gguf"]


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_read_only_folder_is_said(shell: Shell, own: Path) -> None:
    own.chmod(0o500)
    status, _, err = typed(shell, "cp nano mine")
    own.chmod(0o700)
    assert (status, "cannot be written" in err) == (1, True)


def test_a_dry_run_says_what_a_load_would_take_and_loads_nothing(shell: Shell) -> None:
    status, out, _ = typed(shell, "load nano --dry-run --ctx 1k --seats 3 --json")
    told = json.loads(out)
    assert (status, told["fit"], told["estimate"]["kv_bytes"]) == (0, "RAM", 3 * 1024 * 2048)
    assert told["dry_run"]["total_bytes"] == pytest.approx(told["estimate"]["total_bytes"], rel=0.05)
    _, out, _ = typed(shell, "load nano --dry-run --ctx 1k --seats 3")
    assert [line.split()[0] for line in out.splitlines()[1:]] == ["weights", "kv", "compute", "total", "fits"]
    assert "kv          6.0 MiB    6.0 MiB" in out.splitlines()
    assert all(model.state == "disk" for model in shell.system.models())
    assert typed(shell, "load nano --json")[0] == 2


def test_a_dry_run_of_what_llama_cpp_refuses_is_126(shell: Shell, own: Path) -> None:
    (own / "odd.gguf").write_bytes(NANO.read_bytes().replace(b"token_embd.weight", b"tokex_embd.weight"))
    assert typed(shell, "show odd")[0] == 0
    status, _, err = typed(shell, "load odd --dry-run")
    assert status == 126 and "llama.cpp refuses it" in err


def test_a_model_in_parts_is_one_model(shell: Shell, own: Path) -> None:
    parts = zoo.write_split(own, "qwen3", 3)
    size_bytes = sum(part.stat().st_size for part in parts)
    told = json.loads(typed(shell, "show qwen3 --json")[1])
    assert (told["files"], told["info"]["file_bytes"]) == (3, size_bytes)
    assert f"size          {human_bytes(size_bytes)} in 3 files" in typed(shell, f"show {parts[0]}")[1]
    assert typed(shell, "load qwen3 --ctx 256 --seats 1")[0] == 0
    status, out, _ = typed(shell, "run qwen3 hello --max-tokens 4 --ignore-eos")
    assert status == 0 and out
    status, _, err = typed(shell, f"show {parts[1]}")
    assert status == 126 and "part 2 of a model in 3 files" in err and "qwen3-00001-of-00003" in err


def test_a_model_that_was_loaded_by_its_path_goes_by_the_name_that_is_listed(
    shell: Shell, tmp_path: Path, own: Path
) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    shutil.copy(NANO, elsewhere / "other.gguf")
    assert typed(shell, f"load {elsewhere}/other.gguf")[0] == 0
    assert typed(shell, f"show other; cp other mine; save other {tmp_path}/copy.gguf")[0] == 0
    assert (own / "mine.gguf").read_bytes() == (tmp_path / "copy.gguf").read_bytes() == NANO.read_bytes()
    assert typed(shell, "cp nosuch x")[0] == 127
