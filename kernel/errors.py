"""One tree of errors. Each knows its exit code, and may carry a hint.

The shell prints `error: MESSAGE (rc N)` and, if there is one, `hint: HINT`; `--json` prints
`{"error": {"code", "message", "hint"}}`. Exit codes follow the Unix shell's conventions.
"""

from typing import ClassVar


class LlmosError(Exception):
    """Any failure that a user can be told in one line: what, why, and (hint) what to do."""

    exit_code: ClassVar[int] = 1

    def __init__(self, message: str = "", hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    @property
    def code(self) -> str:
        """Stable name for programs: the class name in snake_case."""
        name = type(self).__name__
        return "".join("_" + c.lower() if c.isupper() else c for c in name).lstrip("_")


class UsageError(LlmosError):
    """The command line or an argument makes no sense."""

    exit_code = 2


class AdmissionRefused(LlmosError):
    """It does not fit now; it may later."""

    exit_code = 75


class TimedOut(LlmosError):
    """A deadline passed."""

    exit_code = 124


class KernelFault(LlmosError):
    """LLMOS itself, or a worker of it, broke."""

    exit_code = 125


class WorkerDied(KernelFault):
    """The child process that hosts an engine is gone, hangs, or talks nonsense."""


class ModelInvalid(LlmosError):
    """The file exists and is not a model that can run."""

    exit_code = 126


class ModelNotFound(LlmosError):
    """No model of that name, and no such file."""

    exit_code = 127


class CommandNotFound(LlmosError):
    """No command of that name."""

    exit_code = 127


class Interrupted(LlmosError):
    """The user pressed ^C."""

    exit_code = 130


class ProcessNotFound(LlmosError):
    """No process with that PID (as kill(1): exit code 1)."""


class ContextFull(LlmosError):
    """More tokens than the context window holds."""


class CheckpointInvalid(LlmosError):
    """The file is not a checkpoint, or it was damaged."""


class NotPermitted(LlmosError):
    """The process or model is in a state that does not allow this."""


class WouldBlock(LlmosError):
    """A `_nowait` call would have had to wait."""


class MailboxClosed(LlmosError):
    """Nobody will read this mailbox any more."""
