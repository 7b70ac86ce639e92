"""Commands on model files: show, pull, cp, rm.

The store itself is handed in by boot, as the full-screen monitor is: the shell knows only its face.
"""

from __future__ import annotations

import time
from argparse import Namespace
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Protocol, TypeVar

from kernel.errors import Interrupted, ModelNotFound, NotPermitted, UsageError
from kernel.snapshot import SystemView
from kernel.syscall import Estimate, ModelInfo
from kernel.units import human_bytes, short_bytes, short_time
from shell.registry import Arguments, CommandSpec
from shell.render import bar, short_count, to_json
from shell.session import Shell
from shell.terminal import fit, one_line

T = TypeVar("T")

_DRAW_S = 0.1
_RATE_S = 5.0  # what a rate is measured over
_GPU_KINDS = {"gguf": ("metal", "cuda"), "safetensors": ("cuda",), "sim": ("sim",)}  # that run a format
_YES = ("y", "yes")

Progress = Callable[[str, int, int], None]  # file, bytes here, bytes in all


class Facts(Protocol):
    """What a model's file says of itself. The texts are from strangers."""

    @property
    def name(self) -> str: ...
    @property
    def path(self) -> Path: ...
    @property
    def origin(self) -> str: ...
    @property
    def files(self) -> int: ...
    @property
    def size_bytes(self) -> int: ...
    @property
    def metadata(self) -> Mapping[str, str]: ...
    @property
    def chat_template(self) -> bool: ...


class Owned(Protocol):
    """A model in LLMOS's own folder."""

    @property
    def name(self) -> str: ...
    @property
    def path(self) -> Path: ...
    @property
    def size_bytes(self) -> int: ...


class ModelStore(Protocol):
    """Models on disk. Every call raises LlmosError for what the user can be told."""

    def facts(self, name: str) -> Facts: ...
    def owned(self, name: str) -> Owned: ...
    def remove(self, name: str) -> int: ...
    def copy(self, source: str, name: str) -> str: ...
    def pull(self, source: str, progress: Progress) -> str: ...
    def export(self, name: str, target: Path, progress: Progress) -> None: ...


def _show_arguments(parser: Arguments) -> None:
    parser.add("model", metavar="MODEL", completes=("model", "file"))
    parser.add("--json", action="store_true", help="one object, in bytes")


def _show(store: ModelStore, shell: Shell, args: Namespace) -> int:
    facts = on_shelf(shell, args.model, store.facts)
    info, estimate = shell.system.inspect(str(facts.path))
    fits = fit_of(info, estimate, shell.system.snapshot())
    if args.json or shell.json:
        needs = sizes_of(estimate)
        told = {"name": facts.name, "path": str(facts.path), "origin": facts.origin, "files": facts.files}
        more = {"metadata": dict(facts.metadata), "chat_template": facts.chat_template}
        shell.out.line(to_json({**told, "info": asdict(info), "estimate": needs, "fit": fits, **more}))
        return 0
    for label, text in _rows(facts, info, estimate, fits):
        shell.out.line(f"{label:<13} {one_line(text)}")
    return 0


def on_shelf(shell: Shell, name: str, act: Callable[[str], T]) -> T:
    """Of a model on the shelf, or in use by the name that `models` lists it under. Raises as the store."""
    try:
        return act(name)
    except ModelNotFound:
        return act(str(shell.system.inspect(name)[0].path))


def sizes_of(estimate: Estimate) -> dict[str, int]:
    """For --json, and for who wants them all."""
    return {**asdict(estimate), "total_bytes": estimate.total_bytes}


def _rows(facts: Facts, info: ModelInfo, estimate: Estimate, fits: str) -> list[tuple[str, str]]:
    parts = {
        "weights": estimate.weights_bytes,
        "KV": estimate.kv_bytes,
        "compute": estimate.compute_bytes,
    }
    needs = " + ".join(f"{kind} {human_bytes(size)}" for kind, size in parts.items())
    files = f" in {facts.files} files" if facts.files > 1 else ""
    return [
        ("name", facts.name),
        ("file", str(facts.path)),
        ("from", facts.origin),
        *((label.replace("_", " "), text) for label, text in facts.metadata.items()),
        ("architecture", info.architecture),
        ("parameters", short_count(info.parameters)),
        ("quantization", info.quantization),
        ("size", human_bytes(facts.size_bytes) + files),
        ("context", f"{info.context_tokens} tokens"),
        ("KV", f"{human_bytes(info.kv_bytes_per_token)} per token" if info.kv_bytes_per_token else "none"),
        ("chat template", "yes" if facts.chat_template else "no"),
        ("needs", f"{needs} = {human_bytes(estimate.total_bytes)}"),
        ("fits in", fits),
    ]


def fit_of(info: ModelInfo, estimate: Estimate, view: SystemView) -> str:
    """Where a model fits: "VRAM", "RAM", "later" (once something else has gone), "no"."""
    free = {pool.name: pool.free_bytes for pool in view.pools}
    need = estimate.total_bytes
    gpus = [d.info for d in view.devices if d.info.kind in _GPU_KINDS.get(info.format, ())]
    cpus = [d.info for d in view.devices if d.info.kind == "cpu"]
    if any(need <= free.get(gpu.pool, 0) for gpu in gpus):
        return "VRAM"
    if any(need <= free.get(cpu.pool, 0) for cpu in cpus):
        return "RAM"
    return "later" if any(need <= device.memory_bytes for device in (*gpus, *cpus)) else "no"


def _pull_arguments(parser: Arguments) -> None:
    parser.add("source", metavar="hf:ORG/REPO[:FILE|:QUANT]")


def _pull(store: ModelStore, shell: Shell, args: Namespace) -> int:
    drawn = ProgressBar(shell)
    began_s = time.monotonic()
    try:
        name = interruptible(shell, "pull", lambda: store.pull(args.source, drawn.draw))
    finally:
        drawn.clear()
    shell.note(f"pulled {name} in {short_time(time.monotonic() - began_s)}")
    return 0


@dataclass(slots=True)
class ProgressBar:
    """One line on a terminal's standard error: how far a file is."""

    shell: Shell
    drawn_s: float = 0.0
    seen: deque[tuple[float, int]] = field(default_factory=deque)  # when so many bytes were here

    def draw(self, name: str, done: int, total: int) -> None:
        now_s = time.monotonic()
        err = self.shell.err
        if not err.animated or (now_s - self.drawn_s < _DRAW_S and done < total):
            return
        self.drawn_s = now_s
        width = err.width or 80
        err.emit(f"\r{fit(self._text(one_line(name), done, total, now_s, width), width - 1)}\x1b[K")

    def _text(self, name: str, done: int, total: int, now_s: float, width: int) -> str:
        rate = self._rate(now_s, done)
        eta = short_time((total - done) / rate) if rate else "-:--"
        share = done / total if total else 1.0
        numbers = f"{share:4.0%}  {short_bytes(done)}/{short_bytes(total)}  {rate / 1e6:.1f} MB/s  eta {eta}"
        room = width - len(numbers) - 4
        shown = fit(name, max(room - 10, 10))
        return f"{shown} {bar(share, room - len(shown))} {numbers}" if room > 15 else f"{share:4.0%} {name}"

    def _rate(self, now_s: float, done: int) -> float:
        """Bytes per second over the last seconds."""
        if self.seen and done < self.seen[-1][1]:  # the next file
            self.seen.clear()
        self.seen.append((now_s, done))
        while now_s - self.seen[0][0] > _RATE_S and len(self.seen) > 2:
            self.seen.popleft()
        then_s, before = self.seen[0]
        return (done - before) / (now_s - then_s) if now_s > then_s else 0.0

    def clear(self) -> None:
        if self.drawn_s:
            self.shell.err.emit("\r\x1b[K")


def interruptible(shell: Shell, what: str, act: Callable[[], T]) -> T:
    """Run what knows nothing of our interrupts, with ^C as Python has it. Raises Interrupted."""
    try:
        with shell.interrupts.raised():
            return act()
    except KeyboardInterrupt:
        shell.interrupts.pressed = True  # the list of commands ends here
        hint = "the same `pull` again goes on where this one ended" if what == "pull" else ""
        raise Interrupted(f"{what} was interrupted", hint) from None


def _cp_arguments(parser: Arguments) -> None:
    parser.add("source", metavar="SOURCE", completes=("model", "file"))
    parser.add("name", metavar="NAME")


def _cp(store: ModelStore, shell: Shell, args: Namespace) -> int:
    def copy(source: str) -> str:
        return store.copy(source, args.name)

    name = interruptible(shell, "cp", lambda: on_shelf(shell, args.source, copy))
    shell.note(f"copied to {name}")
    return 0


def _rm_arguments(parser: Arguments) -> None:
    parser.add("model", metavar="MODEL", completes=("model",))
    parser.add("-y", "--yes", action="store_true", help="do not ask")


def _rm(store: ModelStore, shell: Shell, args: Namespace) -> int:
    model = store.owned(args.model)
    _check_unused(shell, model)
    if not args.yes and not _confirmed(shell, f"remove {model.name}, {human_bytes(model.size_bytes)}?"):
        return 1
    freed = store.remove(model.name)
    shell.note(f"removed {model.name}, freed {human_bytes(freed)}")
    return 0


def _check_unused(shell: Shell, model: Owned) -> None:
    """Raises NotPermitted for a model that is open: its worker would not come back after a crash."""
    for view in shell.system.snapshot().models:
        if view.path == str(model.path) and view.state != "failed":
            raise NotPermitted(f"{model.name} is {view.state}", f"`unload {view.name}` first")


def _confirmed(shell: Shell, question: str) -> bool:
    """Ask once, at the prompt only: a script means what it says."""
    if not shell.interactive or shell.stdin is None or not shell.stdin.isatty():
        return True
    shell.out_line_done()
    shell.err.emit(f"{one_line(question)} [y/N] ")
    stdin = shell.stdin
    answer = interruptible(shell, "rm", lambda: stdin.readline(100).decode("utf-8", "replace"))
    return answer.strip().lower() in _YES


def store_commands(store: ModelStore | None) -> tuple[CommandSpec, ...]:
    """The commands, on this store. Without one they can be listed and checked, not run."""

    def on(run: Callable[[ModelStore, Shell, Namespace], int]) -> Callable[[Shell, Namespace], int]:
        return partial(run, store) if store is not None else _no_store

    return (
        CommandSpec(
            "show",
            "a model's facts: shape, licence, what it needs, where it fits",
            on(_show),
            _show_arguments,
            ("show nano", "show ~/models/qwen3-8b.gguf --json"),
            notes="Fits in: VRAM, RAM, later (once something else is unloaded) or no.",
            group="models",
        ),
        CommandSpec(
            "pull",
            "fetch a GGUF model from the Hugging Face hub",
            on(_pull),
            _pull_arguments,
            ("pull hf:Qwen/Qwen3-0.6B-GGUF", "pull hf:ggml-org/gemma-3-1b-it-GGUF:Q4_K_M"),
            notes="^C stops; the same pull goes on where it ended. Reads HF_ENDPOINT and HF_TOKEN.",
            group="models",
        ),
        CommandSpec(
            "cp",
            "keep a model in LLMOS's own folder, under a name",
            on(_cp),
            _cp_arguments,
            ("cp ~/Downloads/model.gguf mine", "cp llama3.2:3b llama3"),
            notes="On one disk it is a hard link and takes no room.",
            group="models",
        ),
        CommandSpec(
            "rm",
            "delete a model from LLMOS's own folder",
            on(_rm),
            _rm_arguments,
            ("rm old-model", "rm old-model -y"),
            notes="Wants the whole name. Asks at the prompt, never in a script.",
            group="models",
            patterns=False,
        ),
    )


def _no_store(shell: Shell, args: Namespace) -> int:
    raise UsageError("there is no store of models here")
