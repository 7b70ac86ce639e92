"""Make a virtual environment ready: `python3 .ci/install.py FOLDER`. Called by the Makefile.

llama.cpp is compiled here, once per machine (pip keeps the result in its cache), and that takes minutes:
so pip runs quietly into a log, and this program says how far it is. Stopped by ^C, it leaves no process
behind. Parses on any Python 3.7, to be able to say that it is too old.

Not here: what is installed (pyproject.toml).
"""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
CONSTRAINTS = ROOT / ".ci" / "constraints.txt"
LLAMA_FLAGS = f"-DLLAVA_BUILD=OFF -DCMAKE_PROJECT_llama.cpp_INCLUDE={ROOT / '.ci' / 'llama.cmake'}"
REPORT_EVERY_S = 15.0
NINJA_STEP = re.compile(rb"^ *\[(\d+)/(\d+)\] ", re.MULTILINE)
LOG_TAIL_BYTES = 64_000


def main(arguments: list[str]) -> int:
    """Create or repair the environment, then install the pinned binding, then this project."""
    if sys.version_info < (3, 11):  # noqa: UP036
        sys.exit(
            "LLMOS needs Python 3.11 or newer; this is {}.{}. Try: make PYTHON=python3.12 ...".format(
                *sys.version_info
            )
        )
    venv = Path(arguments[0]).absolute()
    for stop in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(stop, lambda number, _frame: sys.exit(128 + number))
    create(venv)
    pip = [str(venv / "bin" / "python"), "-m", "pip", "-v", "install", "--no-input", "-c", str(CONSTRAINTS)]
    say("installing llama.cpp's Python binding; the first time on a machine it is compiled,")
    say("about 3 minutes on 2 idle cores (later it comes from pip's cache)")
    quietly(venv / "llama.log", [*pip, llama_requirement()])
    say("installing LLMOS and its tools")
    quietly(venv / "llmos.log", [*pip, "-e", f"{ROOT}[dev]"])
    say(f"ready in {venv.name}")
    return 0


def say(text: str) -> None:
    print(f"llmos setup: {text}", flush=True)


def create(venv: Path) -> None:
    """Make the environment, anew if the Python it was made from is gone."""
    if runs(venv / "bin" / "python"):
        return
    if importlib.util.find_spec("ensurepip") is None or importlib.util.find_spec("venv") is None:
        sys.exit(
            f"{sys.executable} cannot make virtual environments: it has no ensurepip.\n"
            "Debian and Ubuntu keep it in a package of its own: apt install python3-venv"
        )
    say(f"making {venv.name} with Python {sys.version.split()[0]}")
    made = subprocess.run([sys.executable, "-m", "venv", "--clear", str(venv)], check=False)
    if made.returncode or not runs(venv / "bin" / "python"):
        sys.exit(f"could not make {venv}: see above; is the folder writable, and python3-venv installed?")


def runs(python: Path) -> bool:
    """Whether this interpreter starts and has pip."""
    try:
        return subprocess.run([python, "-m", "pip", "-V"], capture_output=True, check=False).returncode == 0
    except OSError:
        return False


def llama_requirement() -> str:
    """The one line of the constraints that pins the binding."""
    lines = CONSTRAINTS.read_text().splitlines()
    return next(line for line in lines if line.startswith("llama-cpp-python=="))


def environment() -> dict[str, str]:
    """The user's own CMake flags come last, so that they win. Build tools are pinned as well."""
    flags = f"{LLAMA_FLAGS} {os.environ.get('CMAKE_ARGS', '')}".strip()
    pins = str(CONSTRAINTS)
    return {**os.environ, "CMAKE_ARGS": flags, "PIP_CONSTRAINT": pins, "PIP_BUILD_CONSTRAINT": pins}


def quietly(log: Path, command: list[str]) -> None:
    """Run a command into a log, reporting now and then. On failure show the log's end and leave."""
    started_s = time.monotonic()
    with log.open("wb") as output:
        child = subprocess.Popen(
            command,
            env=environment(),
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # one group to end, compilers included
        )
    try:
        while not ended(child):
            say(f"  {elapsed(time.monotonic() - started_s)}{compiled(log)}")
    finally:
        end_group(child)
    if child.returncode:
        fail(log, child.returncode)


def ended(child: subprocess.Popen[bytes]) -> bool:
    """Wait for the end until the next report is due."""
    try:
        child.wait(REPORT_EVERY_S)
    except subprocess.TimeoutExpired:
        return False
    return True


def end_group(child: subprocess.Popen[bytes]) -> None:
    """End the child and all it started, if it still runs."""
    if child.poll() is not None:
        return
    for number in (signal.SIGTERM, signal.SIGKILL):
        os.killpg(child.pid, number)
        try:
            child.wait(5)
        except subprocess.TimeoutExpired:
            continue


def elapsed(seconds: float) -> str:
    return f"{int(seconds) // 60} min {int(seconds) % 60:02} s"


def tail(log: Path) -> bytes:
    with log.open("rb") as stream:
        stream.seek(max(0, log.stat().st_size - LOG_TAIL_BYTES))
        return stream.read()


def compiled(log: Path) -> str:
    """How far the compiler is, by its last numbered line."""
    steps = NINJA_STEP.findall(tail(log))
    return f", compiling: {int(steps[-1][0])} of {int(steps[-1][1])} steps" if steps else ""


def fail(log: Path, status: int) -> None:
    """Show what went wrong, and say what is probably missing."""
    lines = tail(log).decode(errors="replace").splitlines()
    print("\n".join(line[:300] for line in lines[-30:]), file=sys.stderr)
    hints = [f"{name} is not installed" for name in ("cc", "c++") if shutil.which(name) is None]
    because = f" ({', '.join(hints)}; Debian and Ubuntu: apt install build-essential)" if hints else ""
    sys.exit(f"llmos setup: pip failed with status {status}{because}; the whole log is {log}")


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except KeyboardInterrupt:
        sys.exit(130)
