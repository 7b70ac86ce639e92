"""NVIDIA GPUs, where the local build of llama.cpp has a CUDA part. Loads nothing native of llama.cpp.

A process sees the GPU it is to compute on and no other, by its environment: so no number of a card has to be
agreed on with the CUDA runtime, which orders them by speed, and one that computes on the CPU does not spend
the seconds and the hundreds of MiB that CUDA takes to start.
Not here: the Apple GPU (driver.py), what is done on a GPU (engine.py).
"""

import importlib.util
import os
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any, Final

from kernel.device import DeviceInfo

_VISIBLE: Final = "CUDA_VISIBLE_DEVICES"  # CUDA reads it when a process uses it first


def gpus() -> tuple[DeviceInfo, ...]:
    """Those that this process may use."""
    return tuple(
        DeviceInfo(
            name, "cuda", _text(nvml.nvmlDeviceGetName(card)), nvml.nvmlDeviceGetMemoryInfo(card).total
        )
        for nvml, name, card in _cards()
    )


def free_bytes(device: DeviceInfo) -> int:
    """Memory that no program uses now."""
    return next(
        (
            int(nvml.nvmlDeviceGetMemoryInfo(card).free)
            for nvml, name, card in _cards()
            if name == device.name
        ),
        0,
    )


def environment(device: DeviceInfo) -> Mapping[str, str]:
    """For a process that is to compute on a device."""
    uuids = (_text(nvml.nvmlDeviceGetUUID(card)) for nvml, name, card in _cards() if name == device.name)
    return {_VISIBLE: next(uuids, "")}


def _cards() -> Iterator[tuple[Any, str, Any]]:
    """(NVML, our name of it, its handle) of each."""
    nvml = _nvml()
    if nvml is None:
        return
    allowed = os.environ.get(_VISIBLE)
    for index in range(nvml.nvmlDeviceGetCount()):
        card = nvml.nvmlDeviceGetHandleByIndex(index)
        uuid = _text(nvml.nvmlDeviceGetUUID(card))
        if allowed is None or any(
            word == str(index) or (word and uuid.startswith(word)) for word in allowed.split(",")
        ):
            yield nvml, f"gpu{index}", card


@cache
def _nvml() -> Any:
    """The library, initialised; None where llama.cpp could not use a GPU, or there is none."""
    if not _has_cuda():
        return None
    try:
        import pynvml

        pynvml.nvmlInit()
    except Exception:  # no library, no driver, no right
        return None
    return pynvml


def _has_cuda() -> bool:
    folder = os.environ.get("LLAMA_CPP_LIB_PATH")
    if folder is None:
        spec = importlib.util.find_spec("llama_cpp")
        places = list(spec.submodule_search_locations or ()) if spec is not None else []
        folder = str(Path(places[0]) / "lib") if places else ""
    return any(Path(folder).glob("*ggml-cuda*"))


def _text(name: str | bytes) -> str:
    return name.decode() if isinstance(name, bytes) else name
