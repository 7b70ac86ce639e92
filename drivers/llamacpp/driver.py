"""The llama.cpp driver: what the kernel asks before an engine exists.

Owner: the kernel's device table. Imports nothing native; the model is opened in a worker.
Not here: computing (engine.py), the worker itself (drivers/worker.py).
"""

import sys
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import Literal

from drivers.llamacpp import confirm, deadly, estimate, gpus, layout, parts, shape
from drivers.llamacpp.header import Header
from kernel.device import (
    DeviceInfo,
    EngineHost,
    EngineOptions,
    Estimate,
    InlineHost,
    LogLine,
    ModelInfo,
    Progress,
)
from kernel.errors import UsageError

_FACTORIES = {
    "cpu": "drivers.llamacpp.engine:open_engine",
    "metal": "drivers.llamacpp.engine:open_engine_on_gpu",
    "cuda": "drivers.llamacpp.engine:open_engine_on_gpu",
}


class LlamaCppDriver:
    """Fills `kernel.device.Driver` for GGUF files."""

    name = "llamacpp"

    def __init__(self, isolation: Literal["worker", "none"] = "worker") -> None:
        self.isolation = isolation

    def devices(self) -> Sequence[DeviceInfo]:
        ram_bytes = layout.ram_bytes()
        cpu = DeviceInfo("cpu", "cpu", f"{layout.cores()} cores", ram_bytes)
        if sys.platform == "darwin":
            return cpu, DeviceInfo("metal", "metal", "Apple GPU, memory shared with the CPU", ram_bytes)
        return (cpu, *gpus.gpus()) if self.isolation == "worker" else (cpu,)  # a process sees one GPU at most

    def inspect(self, path: Path) -> ModelInfo:
        return shape.model_info(parts.read(path))

    def free_bytes(self, device: DeviceInfo) -> int | None:
        if device.kind == "cuda":
            return gpus.free_bytes(device)
        return layout.free_ram_bytes()

    def estimate(self, model: ModelInfo, options: EngineOptions, device: DeviceInfo) -> Estimate:
        head = parts.read(model.path)
        return estimate.estimate(head, self._layout(head, options, device))

    def confirm(self, model: ModelInfo, options: EngineOptions, device: DeviceInfo) -> Estimate:
        head = parts.read(model.path)
        decided = self._layout(head, options, device)
        slab = confirm.confirm(head, estimate.setup_of(decided), gpus.environment(device))
        return estimate.of_all_slabs(slab, decided)

    def open(
        self,
        model: ModelInfo,
        device: DeviceInfo,
        options: EngineOptions,
        progress: Progress,
        log: LogLine,
    ) -> EngineHost:
        if device.kind not in _FACTORIES:
            raise UsageError(f"GGUF models run on the CPU and on GPUs, not on {device.name}")
        head = parts.read(model.path)
        deadly.check_vocabulary(head)
        decided = self._layout(head, options, device)
        if self.isolation == "none":
            return _open_inline(_FACTORIES[device.kind], model.path, decided.options, progress, log)
        from drivers.worker import WorkerHost

        return WorkerHost.spawn(
            factory=_FACTORIES[device.kind],
            path=model.path,
            options=decided.options,
            progress=progress,
            log=log,
            environment=gpus.environment(device),
        )

    def _layout(self, head: Header, options: EngineOptions, device: DeviceInfo) -> layout.Layout:
        free_bytes = self.free_bytes(device) or 0
        return layout.decide(head, options, free_bytes, layout.cores(), device.kind != "cpu")


def _open_inline(
    factory: str, path: Path, options: EngineOptions, progress: Progress, log: LogLine
) -> EngineHost:
    """The engine on the dispatcher's thread: no supervision, for files that are trusted."""
    module, function = factory.split(":")
    engine = getattr(import_module(module), function)(str(path), options, None, progress, log)
    return InlineHost(engine)
