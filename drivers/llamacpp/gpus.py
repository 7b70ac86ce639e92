"""NVIDIA GPUs, where the local build of llama.cpp has a CUDA part. Loads nothing native of llama.cpp.

A process sees the GPU it is to compute on and no other, by its environment: so no number of a card has to be
agreed on with the CUDA runtime, which orders them by speed, and one that computes on the CPU does not spend
the seconds and the hundreds of MiB that CUDA takes to start. Numbers in CUDA_VISIBLE_DEVICES are read as
nvidia-smi's (CUDA_DEVICE_ORDER=PCI_BUS_ID); UUIDs are exact.
Not here: the Apple GPU (driver.py), what is done on a GPU (engine.py).
"""

import importlib.util
import os
from collections.abc import Callable, Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any, Final, NamedTuple

from kernel.device import DeviceInfo

_VISIBLE: Final = "CUDA_VISIBLE_DEVICES"  # CUDA reads it when a process uses it first


class _Card(NamedTuple):
    name: str  # ours
    uuid: str
    title: str
    memory: Any  # as NVML tells it


def gpus() -> tuple[DeviceInfo, ...]:
    """Those that this process may use, and that answer."""
    return tuple(DeviceInfo(card.name, "cuda", card.title, int(card.memory.total)) for card in _cards())


def free_bytes(device: DeviceInfo) -> int:
    """Memory that no program uses now; none of a card that does not answer."""
    return next((int(card.memory.free) for card in _cards() if card.name == device.name), 0)


def environment(device: DeviceInfo) -> Mapping[str, str]:
    """For a process that is to compute on a device."""
    return {_VISIBLE: next((card.uuid for card in _cards() if card.name == device.name), "")}


def _cards() -> Iterator[_Card]:
    """Those that answer: one may be lost, or not be ours to ask."""
    nvml = _nvml()
    if nvml is None:
        return
    for index in range(_answer(nvml, nvml.nvmlDeviceGetCount) or 0):
        card = _answer(nvml, _card, nvml, index)
        if card is not None and _is_visible(index, card.uuid):
            yield card


def _card(nvml: Any, index: int) -> _Card:
    card = nvml.nvmlDeviceGetHandleByIndex(index)
    uuid, title = (_text(ask(card)) for ask in (nvml.nvmlDeviceGetUUID, nvml.nvmlDeviceGetName))
    return _Card(f"gpu{index}", uuid, title, nvml.nvmlDeviceGetMemoryInfo(card))


def _answer(nvml: Any, question: Callable[..., Any], *args: Any) -> Any:
    try:
        return question(*args)
    except nvml.NVMLError:
        return None


def _is_visible(index: int, uuid: str) -> bool:
    """Whether the user has left a card to CUDA: by its number, or the beginning of its UUID."""
    allowed = os.environ.get(_VISIBLE)
    words = [word.strip() for word in (allowed or "").split(",")]
    return allowed is None or any(word == str(index) or (word and uuid.startswith(word)) for word in words)


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
    return bool(folder) and any(Path(folder).glob("*ggml-cuda*"))


def _text(name: str | bytes) -> str:
    return name.decode() if isinstance(name, bytes) else name
