"""Plugins: where they are found, and that none of them can hurt the shell."""

import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from shell_kit import Session, interrupted, session

import llmos.hooks
from llmos.hooks import add_plugins
from shell.completer import candidates, read_line
from shell.repl import interact

HEAD = "from shell.registry import CommandSpec\n"
GREETER = HEAD + (
    "def run(shell, args):\n    shell.out.line('hello')\n    return 0\n"
    "SPEC = CommandSpec('{name}', 'says hello', run)\n"
)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "plugins"
    folder.mkdir()
    return folder


@pytest.fixture
def shell() -> Iterator[Session]:
    with session() as opened:
        yield opened


def add(shell: Session, folder: Path, environment: dict[str, str] | None = None, **files: str) -> None:
    """Write files into the plugin folder, and find them."""
    for name, text in files.items():
        (folder / f"{name}.py").write_text(text)
    add_plugins(shell.shell.registry, folder, environment or {})


def package(folder: Path, **modules: str) -> None:
    """An installed package with a command per module."""
    info = folder / "greeters-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: greeters\nVersion: 1.0\n")
    points = [f"{name} = greeters_{name}:SPEC" for name in modules]
    (info / "entry_points.txt").write_text("[llmos.commands]\n" + "\n".join(points) + "\n")
    for name, text in modules.items():
        (folder / f"greeters_{name}.py").write_text(text)


# Found


def test_a_file_in_the_users_folder_is_a_command_once_it_is_used(shell: Session, folder: Path) -> None:
    add(shell, folder, hi=GREETER.format(name="hi"), _not="raise SystemExit")
    assert "hi  " in shell.script("help")[1]
    assert shell.shell.registry.entry("hi").spec is None
    assert "_not" not in shell.shell.registry
    assert shell.script("hi") == (0, "hello\n", "")
    assert "says hello" in shell.script("hi -h")[1]


def test_an_entry_point_is_a_command_and_the_users_file_wins(
    shell: Session, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package(tmp_path, there=GREETER.format(name="there"), both="raise RuntimeError('the package')")
    monkeypatch.syspath_prepend(tmp_path)
    add(shell, folder, both=GREETER.format(name="both"))
    assert shell.script("there; both") == (0, "hello\nhello\n", "")


def test_a_variable_says_which_plugins_are_wanted(shell: Session, folder: Path) -> None:
    texts = {name: GREETER.format(name=name) for name in ("one", "two")}
    add(shell, folder, {"LLMOS_PLUGINS": ""}, **texts)
    assert "one" not in shell.shell.registry
    add(shell, folder, {"LLMOS_PLUGINS": "two, report"})
    assert "one" not in shell.shell.registry
    assert {"two", "report"} <= set(shell.shell.registry.names())


def test_the_bundled_plugins_are_found_like_a_strangers(shell: Session, folder: Path) -> None:
    add(shell, folder)
    assert shell.shell.registry.entry("report").plugin
    assert shell.script("report")[0] == 0


@pytest.mark.parametrize("where", ["docstring", "README"])
def test_the_example_works_as_it_is_printed(shell: Session, folder: Path, where: str) -> None:
    if where == "docstring":
        assert llmos.hooks.__doc__ is not None
        lines = [line[4:] for line in llmos.hooks.__doc__.splitlines() if line.startswith("    ") or not line]
        text = "\n".join(lines)
    else:
        readme = (Path(__file__).parent.parent / "README.md").read_text("utf-8")
        found = re.search(r"```python\n(.*?)```", readme, re.DOTALL)
        assert found
        text = found.group(1)
    add(shell, folder, words=text)
    shell.line("run quick --max-tokens 3 hi &")
    shell.shell.system.wait(2)
    said = shell.shell.system.read(2, 0).text.split()
    assert said
    assert shell.line("words")[:2] == (0, f"2 {len(said)}\n")


# Wrong


@pytest.mark.parametrize(
    ("text", "status", "about"),
    [
        (HEAD + "SPEC = CommandSpec('other', 'x', print)", 126, "defines the command `other`"),
        (HEAD + "SPEC = CommandSpec('other', 'x', print)", 126, "hint: its name must be `bad`, too"),
        ("x = 1", 126, "defines no SPEC"),
        ("x = 1", 126, "hint: SPEC = CommandSpec("),
        ("\nimport nothing_of_that_name", 126, "bad.py:2: ModuleNotFoundError: No module named"),
        ("x = 1\ny = (", 126, "bad.py:2: SyntaxError: '(' was never closed"),
        ("import json\nSPEC = json.loads('{')", 126, "bad.py:2: JSONDecodeError"),
        ("raise SystemExit(0)", 126, "SystemExit: 0"),
        (HEAD + "SPEC = CommandSpec('bad', 'x', lambda shell, args: 1 // 0)", 1, "bad.py:2: ZeroDivision"),
        (
            HEAD + "SPEC = CommandSpec('bad', 'x', lambda shell, args: 'x')",
            126,
            "returned a str, not an exit",
        ),
        (HEAD + "SPEC = CommandSpec('bad', 'x', lambda shell, args: None)", 126, "returned a NoneType"),
    ],
)
def test_what_is_wrong_is_one_line_that_says_where(
    shell: Session, folder: Path, text: str, status: int, about: str
) -> None:
    add(shell, folder, bad=text)
    found, out, err = shell.script("bad")
    assert (found, out) == (status, "")
    assert about in err
    assert err.count("error:") == 1
    assert "Traceback" not in err
    assert shell.script("echo alive") == (0, "alive\n", "")


def test_a_debug_variable_shows_the_traceback_of_a_failed_import(folder: Path) -> None:
    with session(environment={"LLMOS_DEBUG": "1"}) as shell:
        add(shell, folder, bad="def broken():\n    return 1 // 0\nbroken()")
        status, _, err = shell.script("bad")
        assert status == 126
        assert "Traceback" in err
        assert "in broken" in err


def test_a_file_named_like_a_builtin_command_is_one_warning(shell: Session, folder: Path) -> None:
    add(shell, folder, ps="raise RuntimeError")
    (warning,) = shell.shell.registry.warnings
    assert "ps.py is not used: `ps` is a built-in command" in warning
    assert shell.script("ps")[0] == 0
    assert warning in shell.script("help")[1]
    shell.shell.stdin = None
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("shell.repl._session", lambda *_: None)
        patch.setattr("shell.repl._loop", lambda *_: 0)
        interact(shell.shell, None)
    assert shell.taken()[1] == f"warning: {warning}\n"


# Slow

SLOW = "import threading, time\nthreading.Event().wait(30)\n" + GREETER


def test_completion_and_colours_never_import(shell: Session, folder: Path) -> None:
    add(shell, folder, slow="raise RuntimeError('imported')", hi=GREETER.format(name="hi"))
    line = read_line("slow ")
    assert line is not None
    assert candidates(shell.shell, line) == []
    assert shell.shell.registry.entry("slow").spec is None


def test_interrupt_ends_an_import(shell: Session, folder: Path) -> None:
    add(shell, folder, slow=SLOW.format(name="slow"))
    with interrupted():
        assert shell.line("slow --json; echo not this")[:2] == (130, "")
    assert shell.line("echo alive")[:2] == (0, "alive\n")


def test_told_to_go_while_a_plugin_runs_it_goes_quietly(llmos_home: Path) -> None:
    body = (
        "import time\nfrom shell.registry import CommandSpec\n"
        "def run(shell, args):\n    shell.out.line('ready')\n    time.sleep(60)\n    return 0\n"
        "SPEC = CommandSpec('nap', 'sleeps', run)\n"
    )
    (llmos_home / "plugins").mkdir(parents=True)
    (llmos_home / "plugins" / "nap.py").write_text(body)
    words = [sys.executable, "-m", "llmos", "-c", "nap; echo no"]
    with subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as child:
        assert child.stdout is not None and child.stdout.readline() == b"ready\n"
        child.terminate()
        out, err = child.communicate(timeout=20)
    assert (child.returncode, out, err) == (143, b"", b"")
