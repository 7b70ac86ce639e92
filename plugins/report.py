"""`report`: what each job did, how much of it was right, and whether it got its share.

Lines that are right are counted against a file of right answers: two columns, prompt and reply, parted by
a tab, with a header line. Share due is what the process's weight entitled it to while it could run, share
received is what it got, both in service units: 1 per prompt token, 2 per output token.
"""

from argparse import Namespace
from dataclasses import asdict, dataclass
from pathlib import Path

from kernel.errors import LlmosError, UsageError
from kernel.snapshot import ProcessView
from shell.commands.targets import pid_of
from shell.registry import Arguments, CommandSpec
from shell.render import Column, short_count, to_json, write_table
from shell.session import Shell


@dataclass(frozen=True, slots=True)
class Row:
    """One process of the report."""

    view: ProcessView
    right: int | None  # replies as expected; None where nothing is expected

    @property
    def share(self) -> float:
        """Received over due; 1.0 is exactly fair."""
        return self.view.share_received / self.view.share_due if self.view.share_due else 0.0

    @property
    def seconds(self) -> float:
        return self.view.elapsed_s


COLUMNS: list[Column[Row]] = [
    Column("PID", lambda row: str(row.view.pid), right=True, keep=9),
    Column("NI", lambda row: str(row.view.nice), right=True, keep=8),
    Column("LINES", lambda row: f"{row.view.items_done}/{row.view.items_total}", right=True, keep=7),
    Column("RIGHT", lambda row: "-" if row.right is None else str(row.right), right=True, keep=6),
    Column("TOKENS", lambda row: str(row.view.output_tokens), right=True, keep=5),
    Column("SECONDS", lambda row: f"{row.seconds:.1f}", right=True, keep=4),
    Column("TOK/S", lambda row: short_count(row.view.tokens_per_s), right=True, keep=2),
    Column("DUE", lambda row: short_count(row.view.share_due), right=True, keep=3),
    Column("RECEIVED", lambda row: short_count(row.view.share_received), right=True, keep=3),
    Column("SHARE", lambda row: f"{row.share:.0%}", right=True, keep=6),
    Column("END", lambda row: _end(row.view), keep=5),
    Column("JOB", lambda row: row.view.command, keep=1, flexible=True),
]


def _end(view: ProcessView) -> str:
    return view.state.lower() if view.exit_code is None else f"exit {view.exit_code}"


def _arguments(parser: Arguments) -> None:
    parser.add("targets", nargs="*", metavar="PID|%JOB", completes=("pid", "job"), help="default: all")
    parser.add("--expected", metavar="FILE", completes=("file",), help="right answers: prompt<TAB>reply")
    parser.add("--json", action="store_true", help="one array, all fields, raw numbers")


def _run(shell: Shell, args: Namespace) -> int:
    expected = _read_expected(Path(args.expected)) if args.expected else None
    views = [shell.system.process(pid_of(shell, target)) for target in args.targets]
    if not args.targets:
        views = sorted((*shell.system.finished(), *shell.system.snapshot().processes), key=lambda v: v.pid)
    rows = [Row(view, _right(shell, view, expected)) for view in views]
    if args.json or shell.json:
        shell.out.line(to_json([asdict(row.view) | {"right": row.right, "share": row.share} for row in rows]))
    else:
        write_table(shell.out, COLUMNS, rows)
    return 0


def _right(shell: Shell, view: ProcessView, expected: dict[str, str] | None) -> int | None:
    if expected is None:
        return None
    items = shell.system.items(view.pid)
    return sum(expected.get(prompt.strip()) == reply.strip() for prompt, reply in items)


def _read_expected(file: Path) -> dict[str, str]:
    """Raises UsageError (not two columns), LlmosError (not readable)."""
    try:
        lines = file.read_text("utf-8").splitlines()[1:]
    except OSError as error:
        raise LlmosError(f"cannot read {file}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise UsageError(f"{file} is not UTF-8 text") from error
    pairs = [line.split("\t") for line in lines if line]
    if not all(len(pair) == 2 for pair in pairs):
        raise UsageError(f"{file} does not have two columns", "prompt<TAB>reply, after a header line")
    return {prompt.strip(): reply for prompt, reply in pairs}


SPEC = CommandSpec(
    name="report",
    summary="what each job did, how much was right, and its share",
    run=_run,
    arguments=_arguments,
    examples=("report", "report %1 %2 --json", "report --expected examples/requests.tsv"),
    notes="SHARE is the service received over the service due by weight while the job could run.",
)
