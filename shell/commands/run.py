"""`run`: start a generation."""

import argparse
from dataclasses import replace
from typing import BinaryIO

from kernel.errors import LlmosError, UsageError
from kernel.syscall import ProcessSpec, Sampling
from kernel.units import human_bytes
from shell.commands.targets import pid_of
from shell.files import open_file
from shell.jobs import start
from shell.registry import Arguments, CommandSpec
from shell.session import Shell
from shell.sink import sink_of

_INPUT_MAX_BYTES = 256 << 20
_THREADS_MAX = 16  # at once, where nobody says how many
_SIZES = {"k": 1024, "m": 1024 * 1024}


def tokens(text: str) -> int:
    """`4096` or `8k`, for argparse."""
    unit = _SIZES.get(text[-1:].lower(), 0)
    count = int(text[:-1] if unit else text) * (unit or 1)
    if count < 0:
        raise argparse.ArgumentTypeError(f"`{text}` is less than nothing")
    return count


def count(text: str) -> int:
    """A whole number of at least 1, for argparse."""
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"`{text}` is less than 1")
    return number


def size(text: str) -> int:
    """`512M`, `1.5G` or `4096` bytes, for argparse."""
    power = "kmgt".find(text[-1:].lower()) + 1 if text else 0
    amount = float(text[:-1] if power else text)
    if not 0 <= amount * 1024**power < 2**63:
        raise argparse.ArgumentTypeError(f"`{text}` is not a size")
    return int(amount * 1024**power)


def add_wait(parser: Arguments) -> None:
    """`--wait` and `--no-wait`: what does not fit now."""
    parser.add(
        "--wait",
        action=argparse.BooleanOptionalAction,
        help="wait for memory that is not free, or be refused (75); scripts wait",
    )


def waits(shell: Shell, args: argparse.Namespace) -> bool:
    """As was asked; else a script waits, and a person is told."""
    return not shell.interactive if args.wait is None else bool(args.wait)


def _arguments(parser: Arguments) -> None:
    parser.add("model", metavar="MODEL", completes=("model",))
    parser.add("words", nargs="*", default=[], metavar="WORDS")
    parser.add(
        "-f", dest="file", metavar="FILE", completes=("file",), help="append a file to the prompt; - is stdin"
    )
    parser.add("--lines", action="store_true", help="each non-empty line is one prompt, each reply one line")
    parser.add(
        "-n", dest="samples", type=count, default=1, metavar="K", help="answer each prompt K times, at once"
    )
    parser.add(
        "-j",
        dest="threads",
        type=count,
        default=0,
        metavar="J",
        help="answer J prompts at a time (default: 1, or K)",
    )
    parser.add("--raw", action="store_true", help="the prompt as it is, without the chat template")
    parser.add("--ignore-eos", action="store_true", default=None, help="go on after the model's end mark")
    reply_arguments(parser)


def reply_arguments(parser: Arguments) -> None:
    """How replies are made: the same for `run` and `chat`."""
    parser.add("--system", default="", metavar="TEXT", help="said to the model before the prompt")
    parser.add("--temp", type=float, dest="temperature", metavar="T", help="temperature; 0 is greedy")
    parser.add("--top-k", type=int, metavar="K", help="of the K likeliest tokens")
    parser.add("--top-p", type=float, metavar="P", help="of the likeliest that make up P")
    parser.add("--min-p", type=float, metavar="P", help="of those at least P times as likely as the best")
    parser.add("--seed", type=int, metavar="N", help="the same seed draws the same tokens")
    parser.add(
        "--max-tokens", type=tokens, default=0, metavar="N", help="end a reply after N tokens; 0: no limit"
    )
    parser.add("--nice", type=int, metavar="N", help="-20 (most) to 19 (least)")
    parser.add(
        "--exact",
        action="store_true",
        default=None,
        help="the same tokens whatever else runs, and after a swap",
    )
    parser.add(
        "--ctx", type=tokens, default=0, metavar="N", help="context window, if the model must be loaded"
    )
    parser.add("--cpus", type=float, default=0.0, metavar="X", help="processors it needs, in fractions: 0.5")
    parser.add("--gpus", type=float, default=0.0, metavar="X", help="GPUs it needs, in fractions")
    parser.add("--mem", type=size, default=0, metavar="SIZE", help="RAM it needs, beside model and KV: 512M")
    add_wait(parser)


def _run(shell: Shell, args: argparse.Namespace) -> int:
    if args.raw and args.system:
        raise UsageError("run: --system is part of the chat template, which --raw leaves out")
    threads = args.threads or min(args.samples, _THREADS_MAX)
    spec = replace(
        spec_of(shell, args, _prompts(shell, args)),
        lines=args.lines,
        raw=args.raw,
        threads=threads,
        samples=args.samples,
    )
    pid = shell.system.spawn(spec)
    say_waiting(shell, pid)
    return start(shell, pid)


def say_waiting(shell: Shell, pid: int) -> None:
    """What waits for its turn may wait long: not in silence. A load is told by the model's progress."""
    view = shell.system.process(pid)
    if view.state == "NEW" and view.waits_for and not view.waits_for.endswith(" to load"):
        shell.note(f"{pid} waits for {view.waits_for}")


def spec_of(shell: Shell, args: argparse.Namespace, prompts: tuple[str, ...]) -> ProcessSpec:
    """A process as `reply_arguments` were given."""
    return ProcessSpec(
        model=args.model,
        prompts=prompts,
        system=args.system,
        sampling=_sampling(args),
        max_tokens=args.max_tokens,
        nice=shell.frame.nice if args.nice is None else args.nice,
        command=shell.frame.line,
        context_tokens=args.ctx,
        sink=sink_of(shell.frame),
        cpus=args.cpus,
        gpus=args.gpus,
        mem_bytes=args.mem,
        wait=waits(shell, args),
    )


def _sampling(args: argparse.Namespace) -> Sampling:
    names = ("temperature", "top_k", "top_p", "min_p", "seed", "ignore_eos", "exact")
    return replace(
        Sampling(), **{name: value for name in names if (value := getattr(args, name, None)) is not None}
    )


def _prompts(shell: Shell, args: argparse.Namespace) -> tuple[str, ...]:
    """Words first, then a blank line, then the file. With --lines, that for each line. Raises UsageError."""
    words = " ".join(args.words)
    content = content_of(shell, args.file, has_words=bool(words))
    if args.lines:
        lines = (words if content is None else content).splitlines()
        prompts = tuple(line.strip() for line in lines if line.strip())
        if content is not None and words:
            prompts = tuple(f"{words}\n\n{line}" for line in prompts)
    else:
        prompts = tuple(text for text in ["\n\n".join(filter(None, (words, content)))] if text.strip())
    if not prompts:
        raise UsageError("run: no prompt", f"`run {args.model} your words`, or -f FILE, or `< FILE`")
    return prompts


def content_of(shell: Shell, file: str | None, *, has_words: bool) -> str | None:
    """The text of -f, of `< file`, or of a standard input that is not a terminal; bytes pass undamaged."""
    if file is not None and file != "-":
        with shell.interrupts.raised(), open_file(file, "rb") as opened:
            return _read(opened, file)
    if shell.frame.stdin is not None:
        with shell.interrupts.raised():
            return _read(shell.frame.stdin, "the input")
    if file is None and (has_words or shell.frame.background or shell.interactive):
        return None
    stdin: BinaryIO | None = shell.stdin
    if stdin is None or stdin.isatty():
        return None
    with shell.interrupts.raised():
        return _read(stdin, "standard input")


def _read(file: BinaryIO, name: str) -> str:
    """The whole of it. Raises LlmosError where there is no end in sight, or it cannot be read."""
    try:
        content = file.read(_INPUT_MAX_BYTES + 1)
    except OSError as error:
        raise LlmosError(f"{name}: {error.strerror}") from error
    if len(content) > _INPUT_MAX_BYTES:
        hint = "all of the input is read before the first answer: `split` it"
        raise LlmosError(f"{name}: more than {human_bytes(_INPUT_MAX_BYTES)}", hint)
    return content.decode("utf-8", "surrogateescape")


def _fork_arguments(parser: Arguments) -> None:
    parser.add("target", metavar="PID|%JOB", completes=("pid", "job"))
    parser.add("--seed", type=int, metavar="N", help="draw other tokens from here on")


def _fork(shell: Shell, args: argparse.Namespace) -> int:
    return start(shell, shell.system.fork(pid_of(shell, args.target), args.seed, sink_of(shell.frame)))


SPECS = (
    CommandSpec(
        "run",
        "start a process that answers a prompt; a model that is not loaded is loaded first",
        _run,
        _arguments,
        (
            "run nano --cpus 0.5 --mem 512M -f report.md summarize > sum.txt &",
            "run nano --lines < q.txt",
        ),
        notes="Words are joined by blanks, never file patterns; `--` ends the options. Input is read first.",
        group="processes",
        background=True,
        patterns=False,
    ),
    CommandSpec(
        "fork",
        "copy a process as it is, KV and all; both go on",
        _fork,
        _fork_arguments,
        ("fork %1 --seed 2 > other.txt &",),
        notes="The copy's output begins with what the original had said.",
        group="processes",
        background=True,
    ),
)
