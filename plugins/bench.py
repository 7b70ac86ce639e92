"""`bench`: what LLMOS costs, as ratios and steps measured in one run on this machine.

A bundled plugin, found by its entry point as anyone's would be, and imported when it is first used.
Not here: the measurements (plugins.benchmarks), what they have shown (docs/performance.md).
"""

import argparse

from plugins.benchmarks import (
    boot,
    eviction,
    forks,
    idle,
    interactive,
    kill,
    restore,
    shares,
    simulated,
    throughput,
)
from shell.help import command_help
from shell.registry import Arguments, CommandSpec
from shell.session import Shell

_SPECS = (
    throughput.SPEC,
    interactive.SPEC,
    shares.SPEC,
    forks.SPEC,
    kill.SPEC,
    boot.SPEC,
    idle.SPEC,
    restore.SPEC,
    simulated.FAIRNESS,
    simulated.LATENCY,
    simulated.SCALE,
    eviction.SPEC,
)
BENCHMARKS = {spec.name.split()[1]: spec for spec in _SPECS}


def _arguments(parser: Arguments) -> None:
    parser.add("what", choices=sorted(BENCHMARKS), metavar="WHAT")
    parser.add("options", nargs=argparse.REMAINDER, metavar="OPTIONS")
    parser.add("--json", action="store_true", help="one object instead of a table")


def _run(shell: Shell, args: argparse.Namespace) -> int:
    spec = BENCHMARKS[args.what]
    options = spec.parse(args.options)
    if options is None:
        shell.out.lines(command_help(spec))
        return 0
    options.json |= args.json
    return spec.run(shell, options)


SPEC = CommandSpec(
    "bench",
    "measure speed and latency on this machine, against the raw engine and others",
    _run,
    _arguments,
    ("bench throughput", "bench kill --repeat 100 --json"),
    notes="\n".join(
        [*(f"{name:11}  {spec.summary}" for name, spec in BENCHMARKS.items()), "`bench WHAT -h` says more."]
    ),
)
