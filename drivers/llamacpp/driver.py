"""The llama.cpp driver: what the kernel asks before an engine exists.

Owner: the kernel's device table. Imports nothing native; the model is opened in a worker.
Not here: computing (engine.py), the worker itself (drivers/worker.py).
"""

import sys
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import Literal

from drivers.llamacpp import confirm, deadly, estimate, layout, parts, shape
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
    "metal": "drivers.llamacpp.engine:open_engine_metal",
}


class LlamaCppDriver:
    """Fills `kernel.device.Driver` for GGUF files."""

    name = "llamacpp"

    def __init__(self, isolation: Literal["worker", "none"] = "worker") -> None:
        self.isolation = isolation

    def devices(self) -> Sequence[DeviceInfo]:
        ram_bytes = layout.ram_bytes()
        cpu = DeviceInfo("cpu", "cpu", f"{layout.cores()} cores", ram_bytes)
        if sys.platform != "darwin":
            return (cpu,)
        return cpu, DeviceInfo("metal", "metal", "Apple GPU, memory shared with the CPU", ram_bytes)

    def inspect(self, path: Path) -> ModelInfo:
        return shape.model_info(parts.read(path))

    def estimate(self, model: ModelInfo, options: EngineOptions) -> Estimate:
        head = parts.read(model.path)
        return estimate.estimate(head, self._layout(head, options))

    def confirm(self, model: ModelInfo, options: EngineOptions) -> Estimate:
        head = parts.read(model.path)
        decided = self._layout(head, options)
        return estimate.of_all_slabs(confirm.confirm(head, estimate.setup_of(decided)), decided)

    def open(
        self,
        model: ModelInfo,
        device: DeviceInfo,
        options: EngineOptions,
        progress: Progress,
        log: LogLine,
    ) -> EngineHost:
        if device.kind not in _FACTORIES:
            raise UsageError(f"GGUF models run on the CPU and on Metal, not on {device.name}")
        head = parts.read(model.path)
        deadly.check_vocabulary(head)
        decided = self._layout(head, options)
        if self.isolation == "none":
            return _open_inline(_FACTORIES[device.kind], model.path, decided.options, progress, log)
        from drivers.worker import WorkerHost

        return WorkerHost.spawn(
            factory=_FACTORIES[device.kind],
            path=model.path,
            options=decided.options,
            progress=progress,
            log=log,
        )

    @staticmethod
    def _layout(head: Header, options: EngineOptions) -> layout.Layout:
        return layout.decide(head, options, layout.free_ram_bytes(), layout.cores())


def _open_inline(
    factory: str, path: Path, options: EngineOptions, progress: Progress, log: LogLine
) -> EngineHost:
    """The engine on the dispatcher's thread: no supervision, for files that are trusted."""
    module, function = factory.split(":")
    engine = getattr(import_module(module), function)(str(path), options, None, progress, log)
    return InlineHost(engine)
