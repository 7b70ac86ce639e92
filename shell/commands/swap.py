"""`swapout`, `swapin`: move a process's KV state out of its engine and back, by hand."""

from argparse import Namespace

from kernel.units import human_bytes
from shell.commands.targets import add_targets, for_each
from shell.registry import CommandSpec
from shell.session import Shell


def _swapout(shell: Shell, args: Namespace) -> int:
    def act(pid: int) -> None:
        moved_bytes = shell.system.swap_out(pid)
        shell.note(f"{pid} is swapped out: {human_bytes(moved_bytes)} kept")

    return for_each(shell, args.targets, act)


def _swapin(shell: Shell, args: Namespace) -> int:
    return for_each(shell, args.targets, shell.system.swap_in)


SPECS = (
    CommandSpec(
        "swapout",
        "take processes off their engine: what they have computed goes to RAM, or to disk if that is short",
        _swapout,
        add_targets,
        ("swapout %1",),
        notes="LLMOS does this by itself when KV memory is short; by hand: until `swapin` or `fg`.",
        group="processes",
    ),
    CommandSpec(
        "swapin",
        "let processes that were swapped out run again",
        _swapin,
        add_targets,
        ("swapin %1",),
        group="processes",
    ),
)
