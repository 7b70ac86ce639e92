"""Opens an engine's parts: the weights, the first slab, and what is measured on it.

Owner: the engine, which frees them. Not here: which layout (layout.py).
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from drivers.llamacpp import layout, native, parts
from drivers.llamacpp.budget import Budget, classes
from drivers.llamacpp.buffers import Buffers, Sizes, admit
from drivers.llamacpp.calibrate import Costs, measure
from drivers.llamacpp.estimate import estimate
from drivers.llamacpp.header import Header
from drivers.llamacpp.invariance import is_invariant
from drivers.llamacpp.slab import Slab
from drivers.llamacpp.slabs import Slabs
from drivers.llamacpp.weights import Weights, fingerprint
from kernel.device import EngineInfo, EngineOptions, Estimate, LogLine, Progress


@dataclass(frozen=True, slots=True)
class Loaded:
    """What an engine is made of."""

    info: EngineInfo
    weights: Weights
    slabs: Slabs
    costs: Costs
    model: bytes  # the fingerprint of its file


def load(
    path: str, options: EngineOptions, abort_flag: Any, progress: Progress, log: LogLine, on_gpu: bool
) -> Loaded:
    """Raises ModelNotFound, ModelInvalid, UsageError, AdmissionRefused, Interrupted."""
    head = parts.read(Path(path))
    buffers = Buffers()
    native.start(log, buffers.hear)
    free_bytes = native.gpu_free_bytes if on_gpu else layout.free_ram_bytes
    decided = layout.decide(head, options, free_bytes(), layout.cores(), on_gpu)
    admit(estimate(head, decided).total_bytes, free_bytes())
    weights = Weights(path, on_gpu, progress)
    try:
        return _on(weights, head, decided, buffers, free_bytes, abort_flag)
    except BaseException:
        weights.free()
        raise


def _on(
    weights: Weights,
    head: Header,
    decided: layout.Layout,
    buffers: Buffers,
    free_bytes: Callable[[], int],
    abort_flag: Any,
) -> Loaded:
    """The rest, on loaded weights."""
    sizes, expected = Sizes(head, decided.on_gpu), estimate(head, decided)
    make = partial(_slab, weights, decided, abort_flag)
    windows = classes(decided.window_tokens) if decided.kv_tokens else (decided.window_tokens,)
    first = make(windows[0], _budget(decided, windows, sizes, expected).first_seats(windows[0]))
    if not first.plain and (len(windows) > 1 or first.seats < decided.seats):  # KV cannot be moved
        first.free()
        buffers.forget_contexts()
        windows = (decided.window_tokens,)
        seats = max(1, decided.pool_tokens // windows[0])
        decided = replace(decided, window_tokens=windows[0], seats=seats, kv_tokens=0)
        first = make(decided.window_tokens, decided.seats)
    try:
        sizes.learn(first.window_tokens, first.seats, buffers)
        costs = measure(first)
    except BaseException:
        first.free()
        raise
    exact_alone = decided.on_gpu or not weights.can_roll_back or not is_invariant(head)
    budget = _budget(decided, windows, sizes, expected)
    slabs = Slabs(first, make, budget, sizes.of_unified, free_bytes, costs.curve, exact_alone)
    kv_bytes, compute_bytes = sizes.correct(expected)
    info = EngineInfo(
        context_tokens=decided.window_tokens,
        sequences=decided.seats,
        weights_bytes=weights.bytes + buffers.repacked_bytes,
        kv_bytes_per_token=buffers.kv_bytes // (first.window_tokens * first.seats),
        kv_bytes=kv_bytes,
        compute_bytes=compute_bytes,
        step_cost_s={count: costs.curve.round_s(count) for count in costs.curve.least_s},
        prefill_token_s=costs.prefill_token_s,
        copy_token_s=costs.dump_token_s,
        abortable=weights.can_roll_back,
    )
    return Loaded(info, weights, slabs, costs, fingerprint(head))


def _slab(
    weights: Weights,
    decided: layout.Layout,
    abort_flag: Any,
    window_tokens: int,
    seats: int,
    unified: bool = False,
) -> Slab:
    one = replace(decided, window_tokens=window_tokens, seats=seats, kv_tokens=0, unified=unified)
    return Slab(weights, one, abort_flag)


def _budget(decided: layout.Layout, windows: tuple[int, ...], sizes: Sizes, expected: Estimate) -> Budget:
    limit_bytes = max(sum(sizes.correct(expected)), sizes.of(decided.window_tokens, 1))
    return Budget(windows, decided.seats, limit_bytes, sizes.of)
