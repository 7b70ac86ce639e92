"""From the kernel's tables to frozen views.

Lock: the process table's, held by the caller.
Not here: the views themselves (snapshot), how they are printed (shell, tui).
"""

from kernel.dispatcher import Dispatcher
from kernel.explain import held_out, rate_of
from kernel.models import CatalogEntry, Model
from kernel.process import Process, State
from kernel.snapshot import BY_HAND, DeviceView, ModelView, ProcessView


def process_view(process: Process, model: Model | None, now_s: float) -> ProcessView:
    ended_s = now_s if process.ended_s is None else process.ended_s
    elapsed_s = ended_s - process.started_s
    said = process.rate.total if process.rate else 0.0  # what it was loaded or forked with is not its own
    average = said / elapsed_s if elapsed_s > 0 else 0.0
    engine = model.host.info if model and model.host else None
    told = process.is_chat or not process.alive  # one bad line of many is told at the end
    error = process.error if told else None
    due, holds = process.share_due, process.admitted and process.alive
    if model is not None:
        due += sum(model.queue.due(t) for t in process.threads if t in model.queue)
    return ProcessView(
        pid=process.pid,
        ppid=process.ppid,
        nice=process.nice,
        state=process.state.value,
        program=process.spec.program,
        model=process.model,
        device=model.device.name if model and engine else "",
        threads=len(process.threads),
        prompt_tokens=process.prompt_tokens,
        output_tokens=process.output_tokens,
        shared_tokens=process.shared_tokens,
        tokens_per_s=rate_of(process, now_s) if process.alive else average,
        context_tokens=process.tokens(),
        context_limit_tokens=engine.context_tokens * max(len(process.threads), 1) if engine else 0,
        kv_bytes=_kv_bytes(process, model),
        device_s=process.device_s,
        started_s=process.started_wall_s,
        elapsed_s=elapsed_s,
        first_token_s=process.first_token_s,
        items_done=process.items_done,
        items_total=process.items,
        share_due=due,
        share_received=process.share_received,
        waits_for=_waits_for(process, model),
        exit_code=process.exit_code,
        error=error.message if error else "",
        hint=error.hint if error else "",
        command=process.spec.command,
        items_failed=process.items_failed,
        hung_up=process.hung_up,
        cpus=process.spec.cpus if holds else 0.0,
        gpus=process.spec.gpus if holds else 0.0,
        mem_bytes=process.spec.mem_bytes if holds else 0,
    )


def device_view(dispatcher: Dispatcher, processes: list[Process], now_s: float) -> DeviceView:
    meter, models = dispatcher.meter, {model.name for model in dispatcher.models}
    states = [p.state for p in processes if p.model in models]
    return DeviceView(
        info=dispatcher.device,
        busy=min(1.0, meter.busy.per_s(now_s)),
        tokens_per_s=meter.output.per_s(now_s),
        prefill_tokens_per_s=meter.prefill.per_s(now_s),
        running=states.count(State.RUNNING),
        runnable=states.count(State.RUNNABLE),
        batch=meter.batch(now_s),
    )


def disk_view(entry: CatalogEntry) -> ModelView:
    """A model that nobody has asked for yet."""
    return ModelView(
        name=entry.name,
        path=str(entry.path),
        state="disk",
        device="",
        processes=0,
        load_progress=0.0,
        restarts=0,
        worker_pid=None,
        error="",
        info=None,
        engine=None,
        description=entry.description,
    )


def _kv_bytes(process: Process, model: Model | None) -> int:
    """KV that its tokens occupy, on a seat or swapped out; what several hold together counts in one."""
    swapped = sum(t.kv.size_bytes for t in process.threads if t.kv is not None)
    if model is None or model.host is None:
        return swapped
    seated = ((t, t.seat) for t in process.threads if t.kv is None and t.seat is not None)
    tokens = sum(max(0, thread.computed - model.borrowed.get(seat, 0)) for thread, seat in seated)
    return swapped + tokens * model.host.info.kv_bytes_per_token


def _waits_for(process: Process, model: Model | None) -> str:
    if process.state is State.STOPPED:
        return "a CONT signal"
    if process.state is State.SLEEPING:
        return "its user"
    if process.state is State.ZOMBIE or model is None:
        return ""
    if held_out(process, model):
        return BY_HAND
    if process.waits_for:
        return process.waits_for
    if model.host is None:
        return f"{model.name} to load"
    if process.state in (State.RUNNABLE, State.SWAPPED) and all(t.seat is None for t in process.threads):
        return f"one of {len(model.seats)} seats of {model.name}"
    return ""
