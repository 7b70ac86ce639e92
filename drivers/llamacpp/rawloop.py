"""Greedy generation as a plain loop over llama.cpp's calls: the yardstick for the engine's overhead.

The same context settings as slab.py, and nothing else: fill the batch, decode, take the arg max.
Not here: text, sampling, sequences that come and go.
"""

import ctypes
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from drivers.llamacpp import native
from drivers.llamacpp.layout import CHUNK_TOKENS, WINDOW_STEP_TOKENS
from drivers.llamacpp.native import lib
from kernel.errors import KernelFault


@dataclass(frozen=True, slots=True)
class RawRun:
    """What `generate` did: the output tokens of each prompt, and the time of prompts and outputs."""

    tokens: tuple[tuple[int, ...], ...]
    prefill_s: float
    decode_s: float


def generate(
    path: str, prompts: Sequence[Sequence[int]], output_tokens: int, window_tokens: int, threads: int = 1
) -> RawRun:
    """Load a GGUF file and continue all prompts together by so many tokens, greedily.

    `window_tokens` is per prompt; to compare, open the engine with the same number.
    """
    native.start(_silent, _silent)
    params = lib.llama_model_default_params()
    params.n_gpu_layers = 0
    model = lib.llama_model_load_from_file(path.encode(), params)
    if not model:
        raise KernelFault(f"{path} does not load")
    context = lib.llama_init_from_model(model, _params(len(prompts), window_tokens, threads))
    try:
        return _generate(
            context, lib.llama_vocab_n_tokens(lib.llama_model_get_vocab(model)), prompts, output_tokens
        )
    finally:
        lib.llama_free(context)
        lib.llama_model_free(model)


def _silent(_level: str, _line: str) -> None:
    """Nobody reads the library's chatter here."""


def _params(seats: int, window_tokens: int, threads: int) -> Any:
    params = lib.llama_context_default_params()
    params.n_ctx = seats * -(-window_tokens // WINDOW_STEP_TOKENS) * WINDOW_STEP_TOKENS
    params.n_batch = params.n_ubatch = max(CHUNK_TOKENS, seats)
    params.n_seq_max = params.n_outputs_max = seats
    params.n_threads = params.n_threads_batch = threads
    params.flash_attn_type, params.kv_unified = 0, False
    return params


def _generate(context: int, vocabulary: int, prompts: Sequence[Sequence[int]], output_tokens: int) -> RawRun:
    batch = lib.llama_batch_init(max(CHUNK_TOKENS, len(prompts)), 0, 1)
    begin_s = time.perf_counter()
    outputs = [[_prefill(context, vocabulary, batch, seat, prompt)] for seat, prompt in enumerate(prompts)]
    prefilled_s = time.perf_counter()
    seats = range(len(prompts))
    batch.n_tokens = len(prompts)
    for seat in seats:
        batch.n_seq_id[seat], batch.seq_id[seat][0], batch.logits[seat] = 1, seat, 1
    for step in range(output_tokens - 1):
        for seat in seats:
            batch.token[seat] = outputs[seat][-1]
            batch.pos[seat] = len(prompts[seat]) + step
        _decode(context, batch)
        for seat in seats:
            outputs[seat].append(_argmax(context, vocabulary, seat))
    decoded_s = time.perf_counter()
    lib.llama_batch_free(batch)
    return RawRun(tuple(map(tuple, outputs)), prefilled_s - begin_s, decoded_s - prefilled_s)


def _prefill(context: int, vocabulary: int, batch: Any, seat: int, prompt: Sequence[int]) -> int:
    """Compute a prompt in chunks; returns the first token after it."""
    for begin in range(0, len(prompt), CHUNK_TOKENS):
        chunk = prompt[begin : begin + CHUNK_TOKENS]
        batch.n_tokens = len(chunk)
        for row, token in enumerate(chunk):
            batch.token[row], batch.pos[row] = token, begin + row
            batch.n_seq_id[row], batch.seq_id[row][0] = 1, seat
            batch.logits[row] = begin + row == len(prompt) - 1
        _decode(context, batch)
    return _argmax(context, vocabulary, -1)


def _decode(context: int, batch: Any) -> None:
    if code := lib.llama_decode(context, batch):
        raise KernelFault(f"llama_decode answers {code}")


def _argmax(context: int, vocabulary: int, row: int) -> int:
    logits = lib.llama_get_logits_ith(context, row)
    address = ctypes.cast(logits, ctypes.c_void_p).value or 0
    values = np.ctypeslib.as_array((ctypes.c_float * vocabulary).from_address(address))
    return int(values.argmax())
