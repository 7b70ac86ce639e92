"""`sched`: which policy decides who runs next."""

from argparse import Namespace

from shell.registry import Arguments, CommandSpec
from shell.session import Shell


def _arguments(parser: Arguments) -> None:
    parser.add(
        "policy", nargs="?", metavar="POLICY", help="fair, fifo, rr or priority; without it, say which"
    )


def _run(shell: Shell, args: Namespace) -> int:
    if args.policy is None:
        shell.out.line(shell.system.snapshot().policy)
    else:
        before = shell.system.set_policy(args.policy)
        shell.note(f"policy {before} → {args.policy}")
    return 0


SPECS = (
    CommandSpec(
        "sched",
        "show or change the scheduling policy",
        _run,
        _arguments,
        ("sched", "sched priority"),
        notes="fair: shares by weight. fifo: in order of arrival. rr: turns of equal length.\n"
        "priority: the lowest nice value first, whatever the others wait.",
        group="system",
    ),
)
