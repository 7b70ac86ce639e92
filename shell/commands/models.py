"""Commands on models: load, unload, models. `load` also continues a checkpoint."""

import time
from argparse import Namespace
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from kernel.errors import (
    CheckpointInvalid,
    Interrupted,
    LlmosError,
    ModelInvalid,
    ModelNotFound,
    NotPermitted,
    UsageError,
)
from kernel.snapshot import ModelView, SystemView
from kernel.syscall import EngineOptions, ModelInfo, Signal
from kernel.units import human_bytes, short_bytes, short_time
from shell.commands.chat import turns_of
from shell.commands.run import add_wait, content_of, tokens, waits
from shell.commands.store import fit_of, sizes_of
from shell.jobs import can_talk, listens, start
from shell.registry import Arguments, CommandSpec
from shell.render import Column, bar, short_count, to_json, write_table
from shell.session import Shell
from shell.sink import sink_of

_POLL_S = 0.1
_CHECKPOINT = b"LLMOSCKP"


def _load_arguments(parser: Arguments) -> None:
    parser.add("model", metavar="MODEL|CHECKPOINT", completes=("model", "file"))
    parser.add(
        "--ctx", type=tokens, default=0, metavar="N", help="context window of each process, in tokens: 8k"
    )
    parser.add(
        "--seats", type=tokens, default=0, metavar="N", help="processes that can hold their KV at once"
    )
    parser.add("--threads", type=tokens, default=0, metavar="N", help="compute threads")
    parser.add(
        "--device",
        default="",
        metavar="NAME",
        help="on this device; without it, on a GPU only if the model does not fit in RAM",
    )
    parser.add("--dry-run", action="store_true", help="load nothing: say what it would take")
    parser.add("--json", action="store_true", help="with --dry-run: one object, in bytes")
    add_wait(parser)


def _load(shell: Shell, args: Namespace) -> int:
    if args.json and not args.dry_run:
        raise UsageError("load: --json goes with --dry-run", "`models --json` tells of what is loaded")
    head = _head(args.model)
    if head == _CHECKPOINT:
        return _load_checkpoint(shell, args)
    if args.dry_run:
        return _dry_run(shell, args)
    try:
        return _load_model(shell, args)
    except (ModelInvalid, ModelNotFound) as error:
        if head == b"":
            raise ModelInvalid(f"{args.model} is empty: neither a model nor a checkpoint") from error
        if head is not None and _CHECKPOINT.startswith(head):
            raise CheckpointInvalid(f"{args.model} ends after {len(head)} bytes") from error
        if head is not None and isinstance(error, ModelNotFound):
            raise ModelInvalid(f"{args.model} is neither a model nor a checkpoint") from error
        raise


def _load_checkpoint(shell: Shell, args: Namespace) -> int:
    """Go on with it; to a chat without a terminal, each line of the input is said."""
    for option in ("dry_run", "ctx", "seats", "threads", "device"):
        if getattr(args, option):
            name = option.replace("_", "-")
            raise UsageError(f"load: {args.model} is a checkpoint; --{name} is for models")
    pid = shell.system.restore(Path(args.model), sink_of(shell.frame))
    if listens(shell.system.process(pid)) and not can_talk(shell):
        try:
            _say_input(shell, pid, args.model)
        except BaseException:  # ^C while it was read
            with suppress(LlmosError):
                shell.system.signal(pid, Signal.KILL)
            raise
    return start(shell, pid)


def _say_input(shell: Shell, pid: int, name: str) -> None:
    turns = turns_of(content_of(shell, None, has_words=False) or "")
    for turn in turns:
        shell.system.say(pid, turn)
    if not turns and not shell.frame.background:
        shell.note(f"{pid} ends: nobody talks to it. `load {name} < FILE` says each line of it")


def _load_model(shell: Shell, args: Namespace) -> int:
    began_s = time.monotonic()
    options = EngineOptions(args.ctx, args.seats, args.threads)
    view = shell.system.load(args.model, options, wait=waits(shell, args), device=args.device)
    if view.state == "waiting" and not shell.err.animated:
        shell.note(f"{view.name} waits for memory")
    if shell.frame.background:
        return 0
    view = _wait_load(shell, args.model, view.name, began_s)
    shell.note(_loaded(view, time.monotonic() - began_s))
    return 0


def _dry_run(shell: Shell, args: Namespace) -> int:
    """The estimate from the header, and beside it what the native library's own dry run says."""
    options = EngineOptions(args.ctx, args.seats, args.threads)
    info, expected = shell.system.inspect(args.model, options, args.device)
    confirmed = shell.system.confirm(args.model, options, args.device)
    fits = fit_of(info, confirmed, shell.system.snapshot())
    columns = {"estimate": sizes_of(expected), "dry_run": sizes_of(confirmed)}
    if args.json or shell.json:
        shell.out.line(to_json({"path": str(info.path), **columns, "fit": fits}))
        return 0
    shell.out.line(f"{'':<8} {'estimate':>10} {'dry run':>10}")
    for kind in columns["estimate"]:
        cells = " ".join(f"{human_bytes(column[kind]):>10}" for column in columns.values())
        shell.out.line(f"{kind.removesuffix('_bytes'):<8} {cells}")
    shell.out.line(f"fits in {fits:>11}")
    return 0


def _head(name: str) -> bytes | None:
    """The first bytes of a regular file; None: a model's name, or one that the kernel will say more about."""
    try:
        path = Path(name)
        if not path.is_file():
            return None
        with path.open("rb") as file:
            return file.read(len(_CHECKPOINT))
    except (OSError, ValueError):
        return None


def _wait_load(shell: Shell, name: str, shown: str, began_s: float) -> ModelView:
    """Wait with a progress bar; ^C cancels. Raises what made the load fail, Interrupted."""
    cancelled = False
    try:
        while (done := shell.system.wait_load(name, _POLL_S)) is None:
            if shell.interrupts.take_interrupt():
                cancelled = True
                shell.system.cancel_load(name)
            _draw(shell, shown, time.monotonic() - began_s)
    except LlmosError as error:
        raise (Interrupted(f"{shown}: loading was cancelled") if cancelled else error) from None
    finally:
        if shell.err.animated:
            shell.err.emit("\r\x1b[K")
    return done


def _draw(shell: Shell, name: str, elapsed_s: float) -> None:
    view = next((model for model in shell.system.models() if model.name == name), None)
    if not shell.err.animated or view is None:
        return
    width = shell.err.width or 80
    text = (
        _progress(view, elapsed_s, max(width - 50, 5)) if width >= 60 else f"{name} {view.load_progress:4.0%}"
    )
    shell.err.emit(f"\r{text[: width - 1]}\x1b[K")


def _progress(view: ModelView, elapsed_s: float, width: int) -> str:
    """`nano  ▇▇▇░░  81%  4.1/5.1 GiB  2.3 GB/s  eta 0:01`"""
    total = view.info.file_bytes if view.info else 0
    if view.state != "loading":
        return f"{view.name}  waits for memory  {short_time(elapsed_s)}"
    done = int(total * view.load_progress)
    rate = done / elapsed_s if elapsed_s else 0.0
    eta = short_time((total - done) / rate) if rate else "-:--"
    sizes = f"{short_bytes(done)}/{short_bytes(total)}"
    drawn = f"{bar(view.load_progress, width)} {view.load_progress:4.0%}"
    return f"{view.name}  {drawn}  {sizes}  {rate / 1e9:.1f} GB/s  eta {eta}"


def _loaded(view: ModelView, seconds: float) -> str:
    text = f"loaded {view.name}"
    if view.engine:
        text += (
            f"  {human_bytes(view.engine.weights_bytes)} + KV {human_bytes(view.engine.kv_bytes)} reserved"
        )
    return f"{text} in {seconds:.1f} s   {view.device}"


def _unload_arguments(parser: Arguments) -> None:
    parser.add("model", nargs="?", metavar="MODEL", completes=("model",))
    parser.add("--all", action="store_true", help="every model that is not in use or pinned; 1 if one is")


def _unload(shell: Shell, args: Namespace) -> int:
    if args.all == bool(args.model):
        raise UsageError("unload: which model?", "`unload MODEL` or `unload --all`")
    names = [args.model]
    if args.all:
        names = [model.name for model in shell.system.models() if model.state in ("loaded", "loading")]
    kept = [_unload_or_say(shell, name, keep=args.all) for name in names].count(False)
    if args.all and not names:
        shell.note("no model is loaded")
    return 1 if kept else 0


def _unload_or_say(shell: Shell, name: str, *, keep: bool) -> bool:
    """With `keep`, a model that cannot be unloaded now is told of; else that is an error."""
    try:
        freed_bytes = shell.system.unload(name)
    except NotPermitted as error:
        if not keep:
            raise
        shell.note(f"kept: {error.message}")
        return False
    shell.note(f"unloaded {name}, freed {human_bytes(freed_bytes)}")
    return True


def _pin_arguments(parser: Arguments) -> None:
    parser.add("model", metavar="MODEL", completes=("model",))


def _pin(shell: Shell, args: Namespace) -> int:
    shell.system.pin(args.model)
    return 0


def _unpin(shell: Shell, args: Namespace) -> int:
    shell.system.pin(args.model, False)
    return 0


def _models_arguments(parser: Arguments) -> None:
    parser.add("--json", action="store_true", help="one array, all fields")


def _models(shell: Shell, args: Namespace) -> int:
    machine = shell.system.snapshot()
    rows = [_row(shell, view, machine) for view in shell.system.models()]
    if args.json or shell.json:
        shell.out.line(to_json([{**asdict(row.view), "fit": row.fit} for row in rows]))
        return 0
    write_table(shell.out, _COLUMNS, rows)
    return 0


@dataclass(frozen=True, slots=True)
class _Row:
    """A model, its header read if it is on disk only, and where it would fit."""

    view: ModelView
    fit: str = ""

    @property
    def info(self) -> ModelInfo | None:
        return self.view.info


def _row(shell: Shell, view: ModelView, machine: SystemView) -> _Row:
    if view.state != "disk" or Path(view.path).is_dir():
        return _Row(view)
    try:
        info, estimate = shell.system.inspect(view.path)
    except LlmosError as error:
        return _Row(replace(view, error=error.message))
    return _Row(replace(view, info=info), fit_of(info, estimate, machine))


def _state(row: _Row) -> str:
    if row.view.state == "loading":
        return f"{row.view.load_progress:.0%}"
    return "pinned" if row.view.pinned and row.view.state == "loaded" else row.view.state


_STATE_COLOURS = {
    "loaded": "green",
    "pinned": "green",
    "loading": "cyan",
    "waiting": "cyan",
    "failed": "red",
    "quarantined": "red",
}

_COLUMNS: list[Column[_Row]] = [
    Column("NAME", lambda r: r.view.name, keep=99, flexible=True),
    Column("STATE", _state, keep=90, colour=lambda r: _STATE_COLOURS.get(r.view.state, "")),
    Column("DEV", lambda r: r.view.device or "-", keep=30),
    Column("FIT", lambda r: r.fit or "-", keep=55),
    Column("SIZE", lambda r: short_bytes(r.info.file_bytes) if r.info else "-", right=True, keep=80),
    Column("PARAMS", lambda r: short_count(r.info.parameters) if r.info else "-", right=True, keep=60),
    Column("QUANT", lambda r: r.info.quantization if r.info else "-", keep=50),
    Column("CTX", lambda r: str(r.info.context_tokens) if r.info else "-", right=True, keep=40),
    Column("PROCS", lambda r: str(r.view.processes), right=True, keep=70),
    Column("ABOUT", lambda r: r.view.error or r.view.description, keep=10, flexible=True),
]

SPECS = (
    CommandSpec(
        "load",
        "load a model, or continue a checkpoint as a new process",
        _load,
        _load_arguments,
        ("load nano", "load qwen3-8b --ctx 8k", "load qwen3-8b --ctx 32k --dry-run", "load work.ckpt &"),
        notes="^C cancels. With `&` it loads in the background. Idle models that are not pinned make room.",
        group="models",
        background=True,
    ),
    CommandSpec(
        "unload",
        "close a model and free its memory",
        _unload,
        _unload_arguments,
        ("unload nano", "unload --all"),
        group="models",
    ),
    CommandSpec(
        "pin",
        "keep a loaded model in memory, though nothing runs on it",
        _pin,
        _pin_arguments,
        ("pin nano",),
        notes="Without a pin, an idle model goes when another needs its memory, and at `unload`.",
        group="models",
    ),
    CommandSpec("unpin", "take a pin back", _unpin, _pin_arguments, ("unpin nano",), group="models"),
    CommandSpec(
        "models",
        "list models, loaded or not",
        _models,
        _models_arguments,
        ("models", "models --json"),
        group="models",
        aliases=("ls",),
    ),
)
