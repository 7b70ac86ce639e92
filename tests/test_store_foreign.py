"""Other programs' models, read in place: found as they lay them out, skipped with a word where damaged."""

import json
import os
from pathlib import Path

import pytest

from kernel.errors import ModelInvalid, NotPermitted
from llmos import folders
from llmos.folders import Look
from llmos.foreign import foreign_sources
from llmos.paths import find_paths
from llmos.store import Scan, Store

DIGEST = "a" * 64
MODEL_LAYER = "application/vnd.ollama.image.model"


@pytest.fixture
def environ(tmp_path: Path) -> dict[str, str]:
    return {"HF_HOME": str(tmp_path / "hf"), "OLLAMA_MODELS": str(tmp_path / "ollama")}


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    return tmp_path / "home"


def store(environ: dict[str, str]) -> Store:
    return Store(find_paths(), (), foreign_sources(environ))


def scan(environ: dict[str, str]) -> Scan:
    return store(environ).scan()


def names(found: Scan) -> list[str]:
    return [model.name for model in found.models if model.name != "nano"]


def cached(hf: Path, repo: str, name: str, revision: str = "1" * 40) -> Path:
    """A file as the cache keeps it: a link in a snapshot to a blob."""
    folder = hf / "hub" / ("models--" + repo.replace("/", "--"))
    blob = folder / "blobs" / (revision[:4] + name.replace("/", "-"))
    link = folder / "snapshots" / revision / name
    for path in (blob, link):
        path.parent.mkdir(parents=True, exist_ok=True)
    blob.write_bytes(b"x" * 10)
    link.symlink_to(os.path.relpath(blob, link.parent))
    return link


def manifest(root: Path, where: str, content: object = None) -> Path:
    """An Ollama manifest, and the blob it names."""
    path = root / "manifests" / where
    path.parent.mkdir(parents=True, exist_ok=True)
    layers = [
        {"mediaType": "application/x", "digest": "?"},
        {"mediaType": MODEL_LAYER, "digest": f"sha256:{DIGEST}"},
    ]
    path.write_text(json.dumps({"layers": layers} if content is None else content))
    blob = root / "blobs" / f"sha256-{DIGEST}"
    blob.parent.mkdir(exist_ok=True)
    blob.write_bytes(b"x" * 20)
    return blob


def test_nothing_is_found_and_nothing_said_where_no_other_program_is(home: Path) -> None:
    found = scan({})
    assert (names(found), found.warnings) == ([], ())


def test_the_hugging_face_cache_is_read_through_its_snapshots(
    tmp_path: Path, environ: dict[str, str]
) -> None:
    link = cached(tmp_path / "hf", "Qwen/Qwen3-8B-GGUF", "Qwen3-8B-Q8_0.gguf")
    cached(tmp_path / "hf", "Qwen/Qwen3-8B-GGUF", "mmproj-F16.gguf")
    cached(tmp_path / "hf", "Qwen/Qwen3-8B-GGUF", "README.md")
    (model,) = [m for m in scan(environ).models if m.name != "nano"]
    assert (model.name, model.path, model.size_bytes) == ("Qwen3-8B-Q8_0", link, 10)
    assert model.description == "Hugging Face cache: Qwen/Qwen3-8B-GGUF"


@pytest.mark.parametrize(
    ("variable", "below"),
    [("HF_HUB_CACHE", ""), ("HF_HOME", "hub"), ("XDG_CACHE_HOME", "huggingface/hub")],
)
def test_the_cache_is_where_its_variables_say(home: Path, tmp_path: Path, variable: str, below: str) -> None:
    link = cached(tmp_path / "elsewhere", "a/b", "m.gguf")
    wanted = tmp_path / "moved" / below
    wanted.parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / "elsewhere" / "hub").rename(wanted)
    assert names(scan({variable: str(tmp_path / "moved")})) == ["m"]
    assert not link.exists()


def test_the_newest_snapshot_has_the_name(tmp_path: Path, environ: dict[str, str]) -> None:
    old = cached(tmp_path / "hf", "a/b", "m.gguf", "f" * 40)
    new = cached(tmp_path / "hf", "a/b", "m.gguf", "0" * 40)
    os.utime(old.parent, (1, 1))
    assert store(environ).resolve("m").path == new


def test_two_files_of_one_name_can_both_be_named(tmp_path: Path, environ: dict[str, str]) -> None:
    first = cached(tmp_path / "hf", "a/one", "ggml-model.gguf")
    second = cached(tmp_path / "hf", "a/two", "ggml-model.gguf")
    assert names(scan(environ)) == ["a/two/ggml-model", "ggml-model"]
    assert store(environ).resolve("ggml-model").path == first
    assert store(environ).resolve("a/two/ggml-model").path == second
    assert store(environ).resolve("a/two").path == second


def test_dangling_links_and_loops_are_skipped_with_a_word(tmp_path: Path, environ: dict[str, str]) -> None:
    good = cached(tmp_path / "hf", "a/b", "good.gguf")
    gone = cached(tmp_path / "hf", "a/b", "gone.gguf")
    gone.resolve().unlink()
    (good.parent / "loop.gguf").symlink_to("loop.gguf")
    (good.parent / "round").symlink_to(good.parent)
    found = scan(environ)
    assert "good" in names(found)
    assert not {"gone", "loop"} & set(names(found))
    assert any("gone.gguf: skipped" in line for line in found.warnings)
    assert any("loop.gguf: skipped" in line for line in found.warnings)


def test_safetensors_are_listed_and_say_that_nothing_runs_them(
    tmp_path: Path, environ: dict[str, str]
) -> None:
    for name in ("config.json", "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"):
        cached(tmp_path / "hf", "Qwen/Qwen3-8B", name)
    cached(tmp_path / "hf", "org/dataset", "part.safetensors")
    found = scan(environ)
    assert names(found) == ["Qwen/Qwen3-8B"]
    assert "no engine" in store(environ).find("Qwen/Qwen3-8B").description
    with pytest.raises(ModelInvalid, match="no engine") as raised:
        store(environ).resolve("Qwen/Qwen3-8B")
    assert raised.value.exit_code == 126
    assert "Qwen3-8B-GGUF" in raised.value.hint


def test_safetensors_in_the_own_folder_are_listed_too(llmos_home: Path) -> None:
    folder = llmos_home / "models" / "mine"
    folder.mkdir(parents=True)
    (folder / "config.json").touch()
    (folder / "model.safetensors").touch()
    assert names(scan({}))[-1:] == ["mine"]


@pytest.mark.parametrize(
    ("where", "name"),
    [
        ("registry.ollama.ai/library/llama3.2/3b", "llama3.2:3b"),
        ("registry.ollama.ai/someone/mine/latest", "someone/mine:latest"),
        ("hf.co/org/repo/Q4_K_M", "hf.co/org/repo:Q4_K_M"),
    ],
)
def test_ollamas_models_have_the_names_it_shows(
    tmp_path: Path, environ: dict[str, str], where: str, name: str
) -> None:
    blob = manifest(tmp_path / "ollama", where)
    model = store(environ).resolve(name)
    assert (model.name, model.path, model.size_bytes) == (name, blob, 20)


def test_latest_is_meant_where_no_tag_is_typed(tmp_path: Path, environ: dict[str, str]) -> None:
    for tag in ("latest", "1b"):
        manifest(tmp_path / "ollama", f"registry.ollama.ai/library/llama3.2/{tag}")
    assert store(environ).resolve("llama3.2").name == "llama3.2:latest"


@pytest.mark.parametrize(
    "content",
    [
        [],
        {},
        {"layers": None},
        {"layers": [None]},
        {"layers": []},
        {"layers": [{"mediaType": MODEL_LAYER, "digest": "sha256:../../../../etc/passwd"}]},
        {"layers": [{"mediaType": MODEL_LAYER, "digest": "sha256:" + "b" * 64}]},
        {"layers": [{"mediaType": 5, "digest": 5}]},
    ],
)
def test_a_manifest_that_makes_no_sense_is_skipped_with_a_word(
    tmp_path: Path, environ: dict[str, str], content: object
) -> None:
    manifest(tmp_path / "ollama", "registry.ollama.ai/library/good/1")
    manifest(tmp_path / "ollama", "registry.ollama.ai/library/bad/1", content)
    found = scan(environ)
    assert names(found) == ["good:1"]
    assert any("bad/1: skipped" in line for line in found.warnings)


@pytest.mark.parametrize("raw", [b"", b"{", b"\xff\xfe", b"[" * 60_000, b'{"layers": "' + b"x" * 100_000])
def test_a_manifest_that_is_no_json_is_skipped_with_a_word(
    tmp_path: Path, environ: dict[str, str], raw: bytes
) -> None:
    manifest(tmp_path / "ollama", "registry.ollama.ai/library/bad/1")
    (tmp_path / "ollama/manifests/registry.ollama.ai/library/bad/1").write_bytes(raw)
    found = scan(environ)
    assert names(found) == []
    assert len(found.warnings) == 1


def test_a_pipe_in_place_of_a_manifest_does_not_block(tmp_path: Path, environ: dict[str, str]) -> None:
    manifest(tmp_path / "ollama", "registry.ollama.ai/library/good/1")
    os.mkfifo(tmp_path / "ollama/manifests/registry.ollama.ai/library/good/pipe")
    assert names(scan(environ)) == ["good:1"]


@pytest.mark.parametrize("root", [".lmstudio/models", ".cache/lm-studio/models"])
def test_lm_studios_folders_are_read(home: Path, root: str) -> None:
    folder = home / root / "publisher" / "repo"
    folder.mkdir(parents=True)
    (folder / "model-Q4_0.gguf").write_bytes(b"x")
    (folder / "mmproj-model.gguf").write_bytes(b"x")
    (home / root / "publisher" / "round").symlink_to(home / root)
    found = scan({})
    assert names(found) == ["model-Q4_0"]
    assert found.models[0].description == "LM Studio: publisher/repo"


def test_a_split_model_is_one_and_an_incomplete_one_is_none(llmos_home: Path) -> None:
    own = llmos_home / "models"
    own.mkdir(parents=True)
    for part in (1, 2, 3):
        (own / f"whole-0000{part}-of-00003.gguf").write_bytes(b"x" * part)
    for part in (1, 3):
        (own / f"holes-0000{part}-of-00003.gguf").touch()
    found = scan({})
    assert names(found) == ["whole"]
    (whole,) = [model for model in found.models if model.name == "whole"]
    assert (whole.path.name, len(whole.parts), whole.size_bytes) == ("whole-00001-of-00003.gguf", 3, 6)
    assert found.warnings == (f"{own}/holes-00001-of-00003.gguf: skipped: 2 of 3 parts are here",)


def test_a_look_is_bounded(tmp_path: Path, environ: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    for number in range(30):
        cached(tmp_path / "hf", f"a/{number:02}", "m.gguf")
    monkeypatch.setattr(folders, "MAX_ENTRIES", 20)
    found = scan(environ)
    assert any("stopped looking after 20 names" in line for line in found.warnings)
    assert len(names(found)) < 20


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_locked_folder_is_skipped_with_a_word(tmp_path: Path, environ: dict[str, str]) -> None:
    cached(tmp_path / "hf", "a/b", "m.gguf")
    (tmp_path / "hf" / "hub").chmod(0)
    found = scan(environ)
    (tmp_path / "hf" / "hub").chmod(0o700)
    assert "Permission denied" in found.warnings[0]


def test_warnings_are_passed_on_once(llmos_home: Path) -> None:
    own = llmos_home / "models"
    own.mkdir(parents=True)
    (own / "gone.gguf").symlink_to("nowhere")
    said: list[str] = []
    found = Store(find_paths(), warn=said.append)
    found.list()
    found.list()
    assert len(said) == 1


def test_others_models_are_not_removed(tmp_path: Path, environ: dict[str, str]) -> None:
    blob = manifest(tmp_path / "ollama", "registry.ollama.ai/library/theirs/1")
    with pytest.raises(NotPermitted) as raised:
        store(environ).remove("theirs:1")
    assert raised.value.hint == "`ollama rm theirs:1` removes it"
    assert blob.exists()


def test_a_folder_is_listed_once_per_look(tmp_path: Path) -> None:
    look = Look()
    (tmp_path / "m.gguf").touch()
    before = look.entries_left
    assert [model.name for model in look.models(tmp_path, "x")] == ["m"]
    assert look.folders(tmp_path) == []
    assert before - look.entries_left == 1
