"""llama.cpp's C interface, loaded the way this driver needs it.

Two rules made visible: calls that take microseconds go through `fast` (a ctypes.PyDLL, which keeps
the interpreter lock: giving it up costs up to 5 ms per busy thread), calls that compute or copy go
through `lib`. Importing this module loads the native library into the process.
Not here: what the calls are used for.
"""

import ctypes
import importlib.metadata
import importlib.util
import os
import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any, Final

from kernel.device import LogLine
from kernel.errors import AdmissionRefused, KernelFault

# Before libgomp is loaded: its spinning barriers cost a factor of 30 to 400 beside a busy process.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("GGML_NO_BACKTRACE", "1")  # a failed assertion would start gdb first

BINDING: Final = "0.3.36"  # the only version whose structures these calls were checked against
LEVELS: Final = {2: "info", 3: "warn", 4: "error"}
CONTINUED: Final = 5
_GPUS: Final = (1, 2)  # GGML_BACKEND_DEVICE_TYPE_GPU, and _IGPU


def _import_bindings() -> Any:
    """Import `llama_cpp.llama_cpp` without its parent's __init__, which pulls in the high-level API.

    The stand-in parent is taken away again, so that a later `import llama_cpp` is the real one.
    """
    if importlib.metadata.version("llama-cpp-python") != BINDING:
        raise KernelFault(f"llama-cpp-python is not {BINDING}", f"pip install llama-cpp-python=={BINDING}")
    spec = importlib.util.find_spec("llama_cpp")
    if spec is None or "llama_cpp" in sys.modules:
        return importlib.import_module("llama_cpp.llama_cpp")
    stand_in = ModuleType("llama_cpp")
    stand_in.__path__ = list(spec.submodule_search_locations or [])
    sys.modules["llama_cpp"] = stand_in
    try:
        return importlib.import_module("llama_cpp.llama_cpp")
    finally:
        del sys.modules["llama_cpp"]


lib: Final[Any] = _import_bindings()
_held = ctypes.PyDLL(lib._lib._name, handle=lib._lib._handle)


def _fast(name: str) -> Any:
    function, declared = getattr(_held, name), getattr(lib._lib, name)
    function.argtypes, function.restype = declared.argtypes, declared.restype
    return function


get_logits = _fast("llama_get_logits")
get_logits.restype = ctypes.c_void_p  # an address; numpy makes the view
pos_max = _fast("llama_memory_seq_pos_max")
seq_cp = _fast("llama_memory_seq_cp")
seq_rm = _fast("llama_memory_seq_rm")
token_is_eog = _fast("llama_vocab_is_eog")
token_to_piece = _fast("llama_token_to_piece")
chain_add = _fast("llama_sampler_chain_add")
chain_remove = _fast("llama_sampler_chain_remove")
init_dist = _fast("llama_sampler_init_dist")
sampler_free = _fast("llama_sampler_free")
sample = _fast("llama_sampler_sample")

# `bool callback(void *data)`, asked after every graph node: strlen of a two-byte buffer is 1 as soon as
# its first byte is set. Native, so it never takes the interpreter lock.
abort_callback = ctypes.cast(ctypes.CDLL(None).strlen, lib.ggml_abort_callback)


def gpu_free_bytes() -> int:
    """Memory that the first GPU of the local build has left. Raises AdmissionRefused if there is none."""
    calls = lib._lib
    calls.ggml_backend_dev_count.restype = ctypes.c_size_t
    calls.ggml_backend_dev_get.argtypes = [ctypes.c_size_t]
    calls.ggml_backend_dev_get.restype = ctypes.c_void_p
    calls.ggml_backend_dev_type.argtypes = [ctypes.c_void_p]
    size = ctypes.POINTER(ctypes.c_size_t)
    calls.ggml_backend_dev_memory.argtypes = [ctypes.c_void_p, size, size]
    for index in range(calls.ggml_backend_dev_count()):
        device = calls.ggml_backend_dev_get(index)
        if calls.ggml_backend_dev_type(device) in _GPUS:
            free, total = ctypes.c_size_t(), ctypes.c_size_t()
            calls.ggml_backend_dev_memory(device, ctypes.byref(free), ctypes.byref(total))
            return free.value
    raise AdmissionRefused("llama.cpp finds no GPU it was built for", "`devices` lists what there is")


def check_binding() -> None:
    """Refuse a native library whose structures are laid out differently from the binding's."""
    context, model = lib.llama_context_default_params(), lib.llama_model_default_params()
    if (context.n_ctx, context.n_batch, context.n_seq_max, context.type_k) != (512, 2048, 1, 1) or (
        not context.swa_full or context.kv_unified or not model.use_extra_bufts
    ):
        version = lib.llama_version().decode()
        raise KernelFault(f"the llama.cpp library {version} does not match its Python binding {BINDING}")


class _Chatter:
    """Joins the library's log fragments to lines and passes them on; its debug lines are dropped.

    The native callback is one per process: the last engine opened gets the lines.
    """

    def __init__(self) -> None:
        self.sinks: list[LogLine] = []
        self._line = ""
        self._level = 1

    def write(self, level: int, text: bytes, _data: object) -> None:
        if level != CONTINUED:
            self._flush()
            self._level = level
        self._line += text.decode("utf-8", "replace")
        if self._line.endswith("\n"):
            self._flush()

    def _flush(self) -> None:
        line, self._line = self._line.strip("\n"), ""
        if not line.strip() or self._level not in LEVELS:
            return
        for sink in self.sinks:
            sink(LEVELS[self._level], line)


_chatter: Final = _Chatter()
_log_callback = lib.llama_log_callback(_chatter.write)  # referenced for as long as the library may call it


def start(log: LogLine, overhear: Callable[[str, str], None]) -> None:
    """Initialise the library; send its log lines to both sinks from now on."""
    _chatter.sinks = [overhear, log]
    lib.llama_log_set(_log_callback, None)
    check_binding()
    lib.llama_backend_init()
