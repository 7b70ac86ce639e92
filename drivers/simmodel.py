"""What a simulated model is: its size, its speed, and what will go wrong with it.

On disk it is a JSON object with fields of `SimModel`, "faults" being one with fields of `SimFaults`.
A path that ends in ".sim" and does not exist is a model of default size, seeded by its name.

Not here: the engine (sim).
"""

import json
import zlib
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

from kernel import errors

_FILE_LIMIT_BYTES = 64 << 10


@dataclass(frozen=True, slots=True)
class SimFaults:
    """What goes wrong, and when: the first step, open, dump or restore is 1; 0 is never."""

    die_at_step: int = 0
    hang_at_step: int = 0
    slow_at_step: int = 0
    slow_s: float = 0.0  # what the slow step takes on top
    fail_open_at: int = 0
    fail_dump_at: int = 0
    fail_restore_at: int = 0
    fail_with: str = "KernelFault"  # an error of kernel.errors, or MemoryError, OSError
    refuse_load: str = ""  # likewise; empty: the load succeeds
    first_loads: int = 0  # faults of a SimDriver's first loads only; 0: of all


@dataclass(frozen=True, slots=True)
class SimModel:
    """Size and speed of a simulated model. The default is a small model on a fast CPU."""

    seed: int = 1
    context_tokens: int = 4096
    sequences: int = 16
    kv_pool_tokens: int = 0  # for all sequences together; 0: as many as they can need
    chunk_tokens: int = 256  # of prompts, per step
    mean_tokens: int = 200  # expected output until the model ends by itself; 0: it never does
    weights_bytes: int = 64 << 20
    kv_bytes_per_token: int = 1024
    compute_bytes: int = 1 << 20
    load_s: float = 0.0
    base_s: float = 0.002  # of each step
    decode_s: float = 0.0005  # per sequence that decodes
    prompt_token_s: float = 0.0001
    kv_token_s: float = 0.0  # per token of KV that a step attends to
    copy_token_s: float = 0.0  # to dump or restore a token's KV
    shares_prefixes: bool = False  # whether what other seats hold of a prompt is not computed again
    faults: SimFaults = SimFaults()

    def __post_init__(self) -> None:
        """Raises ValueError."""
        if min(self.context_tokens - 1, self.sequences, self.chunk_tokens) < 1 or self.kv_bytes_per_token < 4:
            raise ValueError("the least is 2 tokens of context, 1 sequence, 1 token a chunk, 4 bytes a token")
        if 0 < self.kv_pool_tokens < self.context_tokens:
            raise ValueError("the KV pool holds less than one sequence")


_T = TypeVar("_T", SimFaults, SimModel)


def read_model(path: Path) -> SimModel:
    """Raises ModelNotFound, ModelInvalid."""
    try:
        text = path.read_bytes()[:_FILE_LIMIT_BYTES]
    except OSError:
        if path.suffix == ".sim":
            return SimModel(seed=zlib.crc32(path.name.encode()))
        raise errors.ModelNotFound(f"{path} is not a file") from None
    try:
        values = _object(json.loads(text))
        faults = _filled(SimFaults(), _object(values.pop("faults", {})))
        return replace(_filled(SimModel(), values), faults=faults)
    except (ValueError, RecursionError) as error:
        raise errors.ModelInvalid(f"{path.name} is not a sim model: {error}") from None


def _object(value: object) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ValueError("not a JSON object")
    return value


def _filled(default: _T, values: dict[str, Any]) -> _T:
    """`default` with these fields replaced, if they exist and are numbers or text as it has them."""
    for name, value in values.items():
        kind = type(getattr(default, name, None))
        numeric = type(value) in (int, float) and kind is float
        if not (numeric or type(value) is kind) or kind not in (bool, int, float, str):
            raise ValueError(f"{name} cannot be {value!r}")
    return replace(default, **values)


def error_named(name: str) -> type[Exception]:
    """An error of our tree by its class name, or one of two that engines are known to raise."""
    known: dict[str, type[Exception]] = {"MemoryError": MemoryError, "OSError": OSError}
    found = known.get(name) or getattr(errors, name, None)
    if not (isinstance(found, type) and issubclass(found, Exception)):
        raise errors.UsageError(f"no error is called {name}")
    return found
