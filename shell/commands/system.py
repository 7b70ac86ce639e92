"""The whole machine: top, free, uptime, dmesg."""

import json
from argparse import Namespace
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from datetime import datetime

from kernel.errors import UsageError
from kernel.snapshot import LogView, PoolView, ShareView, SystemView
from kernel.syscall import HostSample
from kernel.units import short_bytes, short_time
from shell.process_table import process_columns, state_counts
from shell.registry import Arguments, CommandSpec
from shell.render import Column, bar, to_json, write_table
from shell.session import Shell
from shell.terminal import one_line

_LEVELS = ("debug", "info", "warn", "error")
_LEVEL_COLOURS = {"debug": "dim", "warn": "yellow", "error": "red"}


def _top_arguments(parser: Arguments) -> None:
    parser.add("-1", "--once", action="store_true", help="print one frame as text")
    parser.add("--json", action="store_true", help="print one snapshot with all fields")


def _top(shell: Shell, args: Namespace) -> int:
    if args.json or shell.json:
        shell.out.line(to_json(shell.system.snapshot()))
        return 0
    if args.once or not shell.out.animated:
        _print_frame(shell, shell.system.snapshot())
        return 0
    if shell.open_monitor is None:
        raise UsageError("top: there is no monitor here", "`top -1` prints one frame")
    return shell.open_monitor()


def _print_frame(shell: Shell, view: SystemView) -> None:
    out = shell.out
    out.line(_uptime_line(view))
    for device in view.devices:
        rates = f"decode {device.tokens_per_s:.0f} prefill {device.prefill_tokens_per_s:.0f} tok/s"
        busy = f"{bar(device.busy, 10)} {device.busy:4.0%}"
        out.line(f"{device.info.name:8} {busy}  {rates}  batch {device.batch:.1f}  queue {device.runnable}")
    for pool in view.pools:
        used = pool.used_bytes / pool.capacity_bytes if pool.capacity_bytes else 0.0
        sizes = f"{short_bytes(pool.used_bytes)}/{short_bytes(pool.capacity_bytes)}"
        out.line(f"{pool.name:8} {bar(used, 10)} {used:4.0%}  {sizes}")
    out.line()
    write_table(out, process_columns(shell), view.processes)


def _uptime_line(view: SystemView) -> str:
    clock = datetime.fromtimestamp(view.time_s).strftime("%H:%M:%S")
    rate = sum(device.tokens_per_s for device in view.devices)
    count = len(view.processes)
    processes = f"{count} process{'' if count == 1 else 'es'} {state_counts(view.processes)}".rstrip()
    return f"{clock} up {short_time(view.uptime_s)}, {processes}, {rate:.0f} tok/s, policy {view.policy}"


def _uptime_arguments(parser: Arguments) -> None:
    parser.add("--json", action="store_true", help="one object, in seconds")


def _uptime(shell: Shell, args: Namespace) -> int:
    view = shell.system.snapshot()
    if args.json or shell.json:
        plain = {"time_s": view.time_s, "uptime_s": view.uptime_s, "processes": len(view.processes)}
        host = shell.system.host()
        sensors = asdict(host) if host else None
        shell.out.line(json.dumps({**plain, "policy": view.policy, "host": sensors}))
    else:
        shell.out.line(_uptime_line(view))
        shell.out.lines(_host_lines(shell.system.host()))
    return 0


def _host_lines(host: HostSample | None) -> list[str]:
    """The machine, and a line for each GPU."""
    if host is None:
        return []
    load = " ".join(f"{mean:.2f}" for mean in host.load_average)
    lines = [f"load {load} · LLMOS and its workers hold {short_bytes(host.ram_ours_bytes)} of memory"]
    for gpu in host.gpus:
        used, total = short_bytes(gpu.memory_used_bytes), short_bytes(gpu.memory_total_bytes)
        facts = (("%", gpu.utilization_percent), (" °C", gpu.temperature_c), (" W", gpu.power_w))
        told = " · ".join(f"{value:.0f}{unit}" for unit, value in facts if value is not None)
        lines.append(f"{gpu.name} {used}/{total} · {told}")
    return lines


@dataclass(frozen=True, slots=True)
class _MemoryRow:
    """A pool, or below it a claim: in bytes, or (`milli`) in thousandths of a processor."""

    name: str
    kind: str
    used: int
    capacity: int | None
    free: int | None
    milli: bool = False


def _free_arguments(parser: Arguments) -> None:
    parser.add("-b", "--bytes", action="store_true", help="in bytes")
    parser.add("--json", action="store_true", help="one array, in bytes")


def _free(shell: Shell, args: Namespace) -> int:
    view = shell.system.snapshot()
    if args.json or shell.json:
        shell.out.line(to_json([*view.pools, *view.shares]))
        return 0

    def size(row: _MemoryRow, value: int | None) -> str:
        if value is None:
            return ""
        if row.milli:
            return f"{value / 1000:g}"
        return str(value) if args.bytes else short_bytes(value)

    columns: list[Column[_MemoryRow]] = [
        Column("POOL", lambda row: row.name, keep=99, flexible=True),
        Column("KIND", lambda row: row.kind, keep=50),
        Column("TOTAL", lambda row: size(row, row.capacity), right=True, keep=60),
        Column("USED", lambda row: size(row, row.used), right=True, keep=90),
        Column("FREE", lambda row: size(row, row.free), right=True, keep=80),
    ]
    rows = [row for pool in view.pools for row in _memory_rows(pool)]
    write_table(shell.out, columns, rows + [row for share in view.shares for row in _share_rows(share)])
    return 0


def _memory_rows(pool: PoolView) -> Iterator[_MemoryRow]:
    yield _MemoryRow(pool.name, "", pool.used_bytes, pool.capacity_bytes, pool.free_bytes)
    if pool.reserve_bytes:
        yield _MemoryRow(
            _branch(not pool.claims) + "the machine's", "reserve", pool.reserve_bytes, None, None
        )
    for claim in pool.claims:
        branch = _branch(claim is pool.claims[-1])
        yield _MemoryRow(branch + claim.owner, claim.kind, claim.size_bytes, None, None)


def _share_rows(share: ShareView) -> Iterator[_MemoryRow]:
    yield _MemoryRow(share.name, "", share.used_milli, share.capacity_milli, share.free_milli, True)
    for claim in share.claims:
        branch = _branch(claim is share.claims[-1])
        yield _MemoryRow(branch + claim.owner, "declared", claim.milli, None, None, True)


def _branch(last: bool) -> str:
    return "└ " if last else "├ "


def _dmesg_arguments(parser: Arguments) -> None:
    parser.add("-n", dest="last", type=int, metavar="N", help="the last N lines")
    parser.add("--level", choices=_LEVELS, metavar="LEVEL", help="at least debug, info, warn, error")
    parser.add("--json", action="store_true", help="one array; every line, unless there is a --level")


def _dmesg(shell: Shell, args: Namespace) -> int:
    if args.last is not None and args.last < 0:
        raise UsageError("dmesg: -n must not be negative")
    as_json = args.json or shell.json
    lines = _selected(shell, "debug" if as_json and not args.level else args.level)
    if args.last is not None:
        lines = lines[len(lines) - min(args.last, len(lines)) :]
    if as_json:
        shell.out.line(to_json(lines))
    else:
        shell.out.lines(_log_line(shell, line) for line in lines)
    return 0


def _selected(shell: Shell, level: str | None) -> list[LogView]:
    """Lines from a level on; without one, all but what engines say of themselves while all is well."""
    lines = shell.system.log()
    if level is not None:
        return [line for line in lines if _rank(line) >= _LEVELS.index(level)]
    engines = {model.name for model in shell.system.models()}
    warn = _LEVELS.index("warn")
    return [line for line in lines if line.source not in engines or _rank(line) >= warn]


def _log_line(shell: Shell, line: LogView) -> str:
    text = one_line(f"[{line.time_s:12.6f}] {line.source}: {line.text}")
    return shell.out.paint(text, _LEVEL_COLOURS.get(line.level, ""))


def _rank(line: LogView) -> int:
    return _LEVELS.index(line.level) if line.level in _LEVELS else len(_LEVELS)


SPECS = (
    CommandSpec(
        "top",
        "the monitor: devices, memory and processes, live",
        _top,
        _top_arguments,
        ("top", "top -1"),
        notes="Without a terminal that can move its cursor it prints one frame.",
        group="system",
    ),
    CommandSpec(
        "free",
        "memory and processors: pools, and who holds what",
        _free,
        _free_arguments,
        ("free", "free -b"),
        group="system",
    ),
    CommandSpec("uptime", "how long and how busy", _uptime, _uptime_arguments, ("uptime",), group="system"),
    CommandSpec(
        "dmesg",
        "the kernel log",
        _dmesg,
        _dmesg_arguments,
        ("dmesg -n 20", "dmesg --level debug"),
        notes="Without --level: what the kernel says, and what engines warn of.",
        group="system",
    ),
)
