"""What llama.cpp itself says a load will take: its own dry run, which allocates neither weights nor cache.

It reads the header and the vocabulary with native code, which a damaged file can bring down: so it runs in
a process of its own, `python -m drivers.llamacpp.confirm PATH WINDOW SEATS CHUNK GPU_LAYERS`, or in a worker
that is about to load the same file anyway.
Not here: the estimate from the header alone (estimate.py), the real load (weights.py, slab.py).
"""

import contextlib
import json
import os
import resource
import signal
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from drivers.llamacpp.estimate import Setup, repacked_bytes
from drivers.llamacpp.header import Header, type_number
from kernel.device import Estimate
from kernel.errors import KernelFault, ModelInvalid

TIME_LIMIT_S: Final = 60.0  # a vocabulary of 128k tokens takes one second
_LOAD_NONE: Final = 0
_ENVIRONMENT: Final = {"OMP_WAIT_POLICY": "PASSIVE", "GGML_NO_BACKTRACE": "1"}


def confirm(header: Header, setup: Setup, environment: Mapping[str, str]) -> Estimate:
    """Ask in a process of its own. Raises ModelInvalid: llama.cpp refuses the file, or dies of it."""
    numbers = (setup.window_tokens, setup.seats, setup.chunk_tokens, setup.gpu_layers)
    command = [sys.executable, "-P", "-m", __name__, os.fspath(header.path), *map(str, numbers)]
    import_path = os.pathsep.join(entry or str(Path.cwd()) for entry in sys.path)
    try:
        done = subprocess.run(
            command,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            env={**os.environ, **_ENVIRONMENT, **environment, "PYTHONPATH": import_path},
            start_new_session=True,
            timeout=TIME_LIMIT_S,
            check=False,
        )
    except subprocess.TimeoutExpired:
        raise ModelInvalid(f"{header.path}: llama.cpp looked at it for {TIME_LIMIT_S:.0f} s") from None
    return _said(header, done)


def _said(header: Header, done: subprocess.CompletedProcess[bytes]) -> Estimate:
    if done.returncode < 0:
        with contextlib.suppress(ValueError):
            name = signal.Signals(-done.returncode).name
            raise ModelInvalid(f"{header.path}: llama.cpp dies of it ({name}){_last_line(done.stderr)}")
    try:
        answer = json.loads(done.stdout)
    except ValueError:
        raise KernelFault(f"the dry run ended with {done.returncode}{_last_line(done.stderr)}") from None
    if "refused" in answer:
        raise ModelInvalid(f"{header.path}: llama.cpp refuses it: {answer['refused'][:200]}")
    weights_bytes = answer["weights_bytes"] + repacked_bytes(header)
    return Estimate(weights_bytes, answer["kv_bytes"], answer["compute_bytes"])


def _last_line(raw: bytes) -> str:
    lines = raw.decode("utf-8", "replace").splitlines()
    return f": {lines[-1][:200]}" if lines else ""


def measure(path: str, setup: Setup) -> dict[str, int]:
    """Ask in this process. Raises ModelInvalid."""
    from drivers.llamacpp import native  # deferred: the parent has no need of the library
    from drivers.llamacpp.buffers import Buffers

    buffers, last = Buffers(), [""]
    native.start(lambda level, line: last.append(line) if level == "error" else None, buffers.hear)
    model = native.lib.llama_model_load_from_file(
        path.encode("utf-8", "surrogateescape"), _model_params(native.lib, setup)
    )
    if not model:
        raise ModelInvalid(last[1] if len(last) > 1 else "no reason given")
    try:
        context = native.lib.llama_init_from_model(model, _context_params(native.lib, setup))
        if not context:
            raise ModelInvalid(last[-1] or "no reason given")
        native.lib.llama_free(context)
        return {
            "weights_bytes": int(native.lib.llama_model_size(model)),
            "kv_bytes": buffers.cache_bytes,
            "compute_bytes": buffers.compute_bytes,
        }
    finally:
        native.lib.llama_model_free(model)


def _model_params(lib: Any, setup: Setup) -> Any:
    params = lib.llama_model_default_params()
    params.n_gpu_layers, params.no_alloc, params.load_mode = setup.gpu_layers, True, _LOAD_NONE
    return params


def _context_params(lib: Any, setup: Setup) -> Any:
    """As slab.py has them."""
    params = lib.llama_context_default_params()
    params.n_ctx = setup.seats * setup.window_tokens
    params.n_batch = params.n_ubatch = setup.chunk_tokens
    params.n_seq_max = params.n_outputs_max = setup.seats
    params.n_threads = params.n_threads_batch = 1
    params.flash_attn_type, params.kv_unified = int(setup.flash), False
    params.offload_kqv = params.op_offload = setup.gpu_layers > 0
    params.type_k, params.type_v = type_number(setup.key_type), type_number(setup.value_type)
    params.swa_full = setup.full_windows
    return params


def main() -> int:
    """One JSON object on standard output."""
    path, window, seats, chunk, gpu_layers = sys.argv[1], *map(int, sys.argv[2:6])
    _, hard = resource.getrlimit(resource.RLIMIT_CORE)
    resource.setrlimit(resource.RLIMIT_CORE, (0, hard))
    try:
        setup = Setup(window, seats, chunk, flash=gpu_layers > 0, gpu_layers=gpu_layers)
        answer: dict[str, Any] = dict(measure(path, setup))
    except ModelInvalid as reason:
        answer = {"refused": reason.message}
    print(json.dumps(answer))
    return 0


if __name__ == "__main__":
    sys.exit(main())
