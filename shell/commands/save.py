"""`save`: a process as a checkpoint, every process at once, or a model as a file of its own."""

from __future__ import annotations

from argparse import Namespace
from functools import partial
from pathlib import Path

from kernel.errors import LlmosError, UsageError
from kernel.units import human_bytes
from shell.commands.store import ModelStore, ProgressBar, interruptible, on_shelf
from shell.commands.targets import pid_of
from shell.files import path_of
from shell.registry import Arguments, CommandSpec
from shell.session import Shell


def _arguments(parser: Arguments) -> None:
    parser.add("target", nargs="?", metavar="PID|%JOB|MODEL", completes=("pid", "job", "model"))
    parser.add("file", nargs="?", metavar="FILE", completes=("file",))
    parser.add("--all", action="store_true", help="every process, as PID.ckpt in a folder: here, or DIR")


def _save(store: ModelStore | None, shell: Shell, args: Namespace) -> int:
    if args.all:
        if args.file is not None:
            raise UsageError("save --all: one folder", "`save --all DIR`")
        return _save_all(shell, Path() if args.target is None else path_of(args.target))
    if args.target is None or args.file is None:
        raise UsageError(
            "save: what, and to which file?", "`save PID FILE`, `save MODEL FILE`, `save --all DIR`"
        )
    if args.target.startswith("%") or args.target.lstrip("-").isdecimal():
        _save_process(shell, pid_of(shell, args.target), path_of(args.file))
    else:
        _save_model(store, shell, args.target, path_of(args.file))
    return 0


def _save_process(shell: Shell, pid: int, file: Path) -> None:
    size = shell.system.save(pid, file)
    shell.note(f"{file}  {human_bytes(size)}")


def _save_all(shell: Shell, folder: Path) -> int:
    """One that cannot be saved does not stop the others; the exit code is the last failure's."""
    try:
        folder.mkdir(exist_ok=True)  # there is no command that would
    except OSError as error:
        reason = "not a folder" if isinstance(error, FileExistsError) else error.strerror
        raise LlmosError(f"{folder}: {reason}") from error
    status = 0
    for view in shell.system.snapshot().processes:
        if view.exit_code is not None:
            continue
        if shell.interrupts.take_interrupt():
            return 130
        try:
            _save_process(shell, view.pid, folder / f"{view.pid}.ckpt")
        except LlmosError as error:
            shell.report(error)
            status = error.exit_code
    return status


def _save_model(store: ModelStore | None, shell: Shell, model: str, file: Path) -> None:
    if store is None:
        raise UsageError("there is no store of models here")
    drawn = ProgressBar(shell)

    def export(source: str) -> None:
        store.export(source, file, drawn.draw)

    try:
        interruptible(shell, "save", lambda: on_shelf(shell, model, export))
    finally:
        drawn.clear()
    shell.note(f"{file}  {human_bytes(file.stat().st_size)}")


def save_command(store: ModelStore | None) -> CommandSpec:
    return CommandSpec(
        "save",
        "write a process to a checkpoint (it goes on), or a model to a file",
        partial(_save, store),
        _arguments,
        ("save %1 work.ckpt", "load work.ckpt &", "save --all backup/", "save nano /media/stick/nano.gguf"),
        notes="Replaces old checkpoints and old models, nothing else. `kill -USR1 PID` needs no file name.",
        group="processes",
    )
