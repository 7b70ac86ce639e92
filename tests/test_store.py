"""The store: which file a name means, and what is said when it means none."""

import os
from pathlib import Path

import pytest

from kernel.errors import ModelInvalid, ModelNotFound, UsageError
from llmos.paths import find_paths
from llmos.store import Store


@pytest.fixture
def own(llmos_home: Path) -> Path:
    folder = llmos_home / "models"
    folder.mkdir(parents=True)
    return folder


def store(*extra: Path) -> Store:
    return Store(find_paths(), extra)


def names(found: Store) -> list[str]:
    return [model.name for model in found.list()]


def test_a_new_home_has_the_builtin_model_and_no_warning() -> None:
    scan = store().scan()
    assert [model.name for model in scan.models] == ["nano"]
    assert scan.warnings == ()
    assert scan.models[0].path.read_bytes()[:4] == b"GGUF"
    assert "318 of 400" in scan.models[0].description


def test_models_are_listed_by_name_from_every_folder(own: Path, tmp_path: Path) -> None:
    (own / "zebra.Q8_0.gguf").touch()
    extra = tmp_path / "extra"
    extra.mkdir()
    (extra / "apple.gguf").touch()
    assert names(store(extra)) == ["apple", "nano", "zebra.Q8_0"]


def test_the_first_folder_with_a_name_wins(own: Path, tmp_path: Path) -> None:
    for name in ("nano", "twice"):
        (own / f"{name}.gguf").touch()
    (tmp_path / "twice.gguf").touch()
    found = store(tmp_path)
    assert found.resolve("twice").path == own / "twice.gguf"
    assert found.resolve("nano").path == own / "nano.gguf"
    assert found.resolve("nano").description == ""


def test_only_regular_files_with_a_name_fit_to_show_are_models(own: Path, tmp_path: Path) -> None:
    os.mkfifo(own / "pipe.gguf")
    (own / "folder.gguf").mkdir()
    (own / "gone.gguf").symlink_to(tmp_path / "nowhere")
    (own / "device.gguf").symlink_to("/dev/zero")
    (own / "esc\x1b[31m.gguf").touch()
    (own / ".hidden.gguf").touch()
    (own / "notes.txt").touch()
    elsewhere = tmp_path / "weights"
    elsewhere.touch()
    (own / "linked.gguf").symlink_to(elsewhere)
    assert names(store()) == ["linked", "nano"]


def test_folders_that_cannot_be_read_are_told_and_passed_by(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    scan = store(tmp_path / "missing", tmp_path / "file", Path("zero\0byte")).scan()
    assert [model.name for model in scan.models] == ["nano"]
    missing, file, zero = scan.warnings
    assert missing == f"{tmp_path / 'missing'}: no such folder of models"
    assert file.endswith("Not a directory")
    assert "null" in zero


def test_the_beginning_of_a_name_is_enough_if_it_is_one_models(own: Path) -> None:
    for name in ("qwen3-8b", "qwen3-8b.Q4", "smol"):
        (own / f"{name}.gguf").touch()
    assert store().resolve("sm").name == "smol"
    assert store().resolve("qwen3-8b").name == "qwen3-8b", "a whole name is never ambiguous"
    with pytest.raises(UsageError, match=r"several models: qwen3-8b, qwen3-8b\.Q4") as raised:
        store().resolve("qwen")
    assert raised.value.exit_code == 2


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("nnao", "did you mean nano?"),
        ("Nano", "did you mean nano?"),
        ("xyzzy", "`models` lists what there is"),
    ],
)
def test_a_name_of_no_model_is_127_with_a_hint(name: str, hint: str) -> None:
    with pytest.raises(ModelNotFound) as raised:
        store().resolve(name)
    assert (raised.value.exit_code, raised.value.hint) == (127, hint)


def test_an_empty_name_is_a_usage_error_and_not_every_model() -> None:
    with pytest.raises(UsageError):
        store().resolve("")


def test_a_path_means_itself(own: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (own / "here.gguf").touch()
    (tmp_path / "here.gguf").touch()
    (tmp_path / "plain").touch()
    monkeypatch.chdir(tmp_path)
    assert store().resolve("here.gguf").path == tmp_path / "here.gguf"
    assert store().resolve("here").path == own / "here.gguf"
    plain = store().resolve("./plain")
    assert (plain.name, plain.path) == ("plain", tmp_path / "plain")


@pytest.mark.parametrize("path", ["./nano.gguf", "/nowhere/at/all", "zero\0byte.gguf", "a" * 5000 + ".gguf"])
def test_a_path_to_nothing_is_127(path: str) -> None:
    with pytest.raises(ModelNotFound):
        store().resolve(path)


def test_a_missing_file_with_a_models_name_hints_at_the_model() -> None:
    with pytest.raises(ModelNotFound) as raised:
        store().resolve("nano.gguf")
    assert raised.value.hint == "did you mean nano?"


def test_a_path_to_something_else_is_126(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for path, why in ((tmp_path, "a folder"), (tmp_path / "pipe", "not a regular file")):
        with pytest.raises(ModelInvalid, match=why) as raised:
            store().resolve(str(path))
        assert raised.value.exit_code == 126
