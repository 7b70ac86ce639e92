"""A child process on a leash: started by exec, named in every message, and always reaped.

Owner: the WorkerHost that started it. Not here: what is said on the socket (worker, wire).
"""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import IO

from drivers.brake import Brake

POLITE_S = 2.0  # to end by itself after the parent has hung up
TERM_S = 0.5  # to end after SIGTERM
TAIL_BYTES = 4096

_ENVIRONMENT = {
    "OMP_WAIT_POLICY": "PASSIVE",  # a spinning OpenMP beside a busy neighbour costs a factor of 200
    "GGML_NO_BACKTRACE": "1",  # else abort() starts a debugger first
}


class Child:
    """A running `drivers.worker_main`, with the parent's ends of what connects the two."""

    def __init__(self, name: str, environment: Mapping[str, str]) -> None:
        self.sock, theirs = socket.socketpair()
        self.brake = Brake.create()
        lifeline, self._leash = os.pipe()
        self._output: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115 (closed in _close)
        fds = (theirs.fileno(), self.brake.fd, lifeline)
        try:
            self._process = _start(name, fds, self._output, environment)
        except BaseException:
            self._close()
            raise
        finally:
            theirs.close()
            os.close(lifeline)
        self.sock.setblocking(False)

    @property
    def pid(self) -> int:
        return self._process.pid

    def end(self) -> None:
        """Hang up, wait a little, then insist. Reaped on return."""
        self.sock.close()
        for grace_s, insist in ((POLITE_S, signal.SIGTERM), (TERM_S, signal.SIGKILL)):
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(grace_s)
                break
            self._signal(insist)
        self._process.wait()
        self._close()

    def kill(self, grace_s: float = 0.0) -> tuple[str, list[str]]:
        """End it at once, or after `grace_s` if it is about to end. Returns its status and its last lines."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(grace_s)
        self._signal(signal.SIGKILL)
        self._process.wait()
        last_lines = self._tail()
        self._close()
        return _describe(self._process.returncode), last_lines

    def _signal(self, number: int) -> None:
        """To its whole session: an engine may have started processes of its own."""
        if self._process.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, number)

    def _tail(self) -> list[str]:
        """The last lines that the process wrote to stdout and stderr."""
        end = self._output.seek(0, os.SEEK_END)
        self._output.seek(max(0, end - TAIL_BYTES))
        return self._output.read().decode("utf-8", "replace").splitlines()

    def _close(self) -> None:
        self.sock.close()
        self._output.close()
        os.close(self.brake.fd)
        os.close(self._leash)


def _start(
    name: str, fds: tuple[int, ...], output: IO[bytes], environment: Mapping[str, str]
) -> subprocess.Popen[bytes]:
    # -P: the working directory is no place to import from. The name is for who reads `ps`.
    command = [sys.executable, "-P", "-m", "drivers.worker_main", *map(str, fds), name]
    import_path = os.pathsep.join(entry or str(Path.cwd()) for entry in sys.path)
    return subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=output,
        stderr=output,
        pass_fds=fds,
        env={**os.environ, **_ENVIRONMENT, **environment, "PYTHONPATH": import_path},
        start_new_session=True,
    )


def _describe(returncode: int) -> str:
    if returncode >= 0:
        return f"exit status {returncode}"
    with contextlib.suppress(ValueError):
        return f"signal {-returncode} ({signal.Signals(-returncode).name.removeprefix('SIG')})"
    return f"signal {-returncode}"
