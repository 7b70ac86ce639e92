"""Configuration: which source wins, and what a mistake in one is told."""

import dataclasses
from pathlib import Path

import pytest

from kernel.errors import UsageError
from llmos.config import _READERS, Config, load_config
from llmos.paths import expand, find_paths, writable


@pytest.fixture
def user_file(tmp_path: Path) -> Path:
    return tmp_path / "user" / "config.toml"


@pytest.fixture
def project(tmp_path: Path) -> Path:
    folder = tmp_path / "project"
    folder.mkdir()
    return folder


def write(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


def test_without_any_source_the_defaults_hold(user_file: Path, project: Path) -> None:
    assert load_config(user_file, environ={}, folder=project) == Config()
    assert Config().model == "nano"


def test_each_source_overrides_the_ones_before(user_file: Path, project: Path) -> None:
    write(user_file, 'model = "user"\npolicy = "user"\nthreads = 1\nsequences = 1\ncontext_tokens = 1')
    write(project / ".llmos.toml", 'policy = "project"\nthreads = 2\nsequences = 2\ncontext_tokens = 2')
    environ = {"LLMOS_THREADS": "3", "LLMOS_SEQUENCES": "3", "LLMOS_ISOLATION": ""}
    config = load_config(user_file, {"sequences": 4, "model": None}, environ, project)
    assert config == Config(model="user", policy="project", context_tokens=2, threads=3, sequences=4)


def test_every_key_can_be_read_and_every_reader_is_a_key() -> None:
    assert list(_READERS) == [field.name for field in dataclasses.fields(Config)]


def test_model_folders_count_from_where_they_are_written(user_file: Path, project: Path) -> None:
    write(user_file, 'models = ["mine", "/abs"]')
    assert load_config(user_file, environ={}, folder=project).models == (
        user_file.parent / "mine",
        Path("/abs"),
    )
    listed = load_config(user_file, environ={"LLMOS_MODELS": "one::/two"}, folder=project).models
    assert listed == (project / "one", Path("/two"))


def test_a_file_named_by_flag_or_variable_replaces_the_users_and_must_exist(
    user_file: Path, project: Path
) -> None:
    write(user_file, 'model = "user"')
    other = write(project / "other.toml", "threads = 2")
    named = {"LLMOS_CONFIG": str(other)}
    assert load_config(user_file, environ=named, folder=project) == Config(threads=2)
    assert load_config(user_file, {"config": "/dev/null"}, named, project) == Config()
    with pytest.raises(UsageError, match=r"gone\.toml: No such file"):
        load_config(user_file, {"config": "gone.toml"}, {}, project)


@pytest.mark.parametrize(
    ("text", "message", "hint"),
    [
        ('modle = "x"', "unknown key 'modle'", "did you mean model?"),
        ("colour = 1", "unknown key 'colour'", "known keys: model, policy"),
        ("model = 3", "model must be a string, not 3", ""),
        ('model = " "', "model must not be empty", ""),
        ('isolation = "thread"', 'isolation must be "worker" or "none", not \'thread\'', ""),
        ('threads = "two"', "threads must be a whole number, not 'two'", ""),
        ("threads = true", "threads must be a whole number, not True", ""),
        ("threads = -1", "threads must be from 0 to 512, not -1", ""),
        ("sequences = 257", "sequences must be from 0 to 256, not 257", ""),
        ("context_tokens = 1e9", "context_tokens must be a whole number, not 1000000000.0", ""),
        ('models = "here"', "models must be an array of folders, not 'here'", ""),
        ("models = [1]", "models must be an array of folders, not [1]", ""),
        ("model = ", "not valid TOML", ""),
    ],
)
def test_a_mistake_in_a_file_names_file_key_and_cure(
    user_file: Path, project: Path, text: str, message: str, hint: str
) -> None:
    write(user_file, text)
    with pytest.raises(UsageError) as raised:
        load_config(user_file, environ={}, folder=project)
    assert raised.value.message.startswith(f"{user_file}: {message}")
    assert raised.value.hint.startswith(hint)


def test_a_mistake_in_a_variable_or_a_flag_is_named_as_it_was_typed(user_file: Path, project: Path) -> None:
    with pytest.raises(UsageError, match="LLMOS_THREADS: threads must be a whole number, not 'two'"):
        load_config(user_file, environ={"LLMOS_THREADS": "two"}, folder=project)
    with pytest.raises(UsageError, match="--context-tokens: context_tokens must be from 0"):
        load_config(user_file, {"context_tokens": -5}, {}, project)


def test_bytes_that_are_not_utf8_are_told_with_their_place(user_file: Path, project: Path) -> None:
    write(user_file, "").write_bytes(b'model = "\xff"')
    with pytest.raises(UsageError, match="not UTF-8 at byte 9"):
        load_config(user_file, environ={}, folder=project)


def test_llmos_home_moves_every_file(tmp_path: Path) -> None:
    paths = find_paths({"LLMOS_HOME": str(tmp_path)})
    files = (paths.config_file, paths.plugins, paths.models, paths.checkpoints, paths.history_file)
    assert {file.parent for file in files} == {tmp_path}
    assert len(set(files)) == len(files)


def test_without_llmos_home_the_platforms_folders_are_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("XDG_CONFIG_HOME", "XDG_DATA_HOME", "XDG_STATE_HOME", "XDG_RUNTIME_DIR"):
        monkeypatch.delenv(name, raising=False)
    paths = find_paths({})
    for file in (paths.config_file, paths.models, paths.history_file):
        assert file.is_relative_to(tmp_path) and "llmos" in file.parts
    assert not list(tmp_path.iterdir()), "finding paths made a folder"


def test_writable_makes_a_private_folder_or_says_no(tmp_path: Path) -> None:
    folder = tmp_path / "a" / "b"
    assert writable(folder) == folder
    assert folder.stat().st_mode & 0o777 == 0o700
    (tmp_path / "file").touch()
    assert writable(tmp_path / "file" / "below") is None
    assert writable(tmp_path / "file") is None
    assert writable(Path("/proc/llmos")) is None
    assert writable(Path("~/nobody")) is None


def test_a_home_that_cannot_be_named_still_gives_a_path(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    assert expand("~no-such-user-here/x") == tmp_path / "~no-such-user-here/x"
