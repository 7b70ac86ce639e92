"""Greedy generation as a plain loop over llama.cpp's calls: the yardstick for the engine's overhead.

The same context settings as slab.py, and nothing else: fill the batch, decode, take the arg max. The context
is kept, and emptied, between two runs, as the engine keeps its own.
Not here: text, sampling, sequences that come and go.
"""

import ctypes
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from drivers.llamacpp import native
from drivers.llamacpp.layout import WINDOW_STEP_TOKENS, chunk_tokens
from drivers.llamacpp.native import lib
from kernel.errors import KernelFault


@dataclass(frozen=True, slots=True)
class RawRun:
    """What `generate` did: the output tokens of each prompt, and the time of prompts and outputs."""

    tokens: tuple[tuple[int, ...], ...]
    prefill_s: float
    decode_s: float


class RawLoop:
    """A model loaded, with one context for as many prompts as there are seats."""

    def __init__(
        self, path: str, seats: int, window_tokens: int, threads: int = 1, on_gpu: bool = False
    ) -> None:
        """`window_tokens` is per seat; to compare, open the engine with the same numbers."""
        native.start(_silent, _silent)
        params = lib.llama_model_default_params()
        params.n_gpu_layers = 999 if on_gpu else 0
        self._model = lib.llama_model_load_from_file(path.encode(), params)
        if not self._model:
            raise KernelFault(f"{path} does not load")
        vocabulary = lib.llama_model_get_vocab(self._model)
        self._vocabulary = int(lib.llama_vocab_n_tokens(vocabulary))
        ends = [token for token in range(self._vocabulary) if native.token_is_eog(vocabulary, token)]
        self._ends = np.array(ends, np.intp)
        self._excluded = self._ends[:0]
        self._chunk_tokens = chunk_tokens(window_tokens, seats, on_gpu)
        params = _params(seats, window_tokens, threads, self._chunk_tokens, on_gpu)
        self._context = lib.llama_init_from_model(self._model, params)
        if not self._context:
            lib.llama_model_free(self._model)
            raise KernelFault(f"llama.cpp cannot make a context of {seats} x {window_tokens} tokens")
        self._batch = lib.llama_batch_init(self._chunk_tokens, 0, 1)

    def free(self) -> None:
        lib.llama_batch_free(self._batch)
        lib.llama_free(self._context)
        lib.llama_model_free(self._model)

    def generate(self, prompts: Sequence[Sequence[int]], output_tokens: int, *, ignore_eos: bool) -> RawRun:
        """Continue all prompts together, greedily; with `ignore_eos` never by a token that ends."""
        lib.llama_memory_clear(lib.llama_get_memory(self._context), False)
        self._excluded = self._ends if ignore_eos else self._ends[:0]
        batch = self._batch
        begin_s = time.perf_counter()
        outputs = [[self._prefill(seat, prompt)] for seat, prompt in enumerate(prompts)]
        prefilled_s = time.perf_counter()
        seats = range(len(prompts))
        batch.n_tokens = len(prompts)
        for seat in seats:
            batch.n_seq_id[seat], batch.seq_id[seat][0], batch.logits[seat] = 1, seat, 1
        for step in range(output_tokens - 1):
            for seat in seats:
                batch.token[seat] = outputs[seat][-1]
                batch.pos[seat] = len(prompts[seat]) + step
            self._decode()
            for seat in seats:
                outputs[seat].append(self._argmax(seat))
        decoded_s = time.perf_counter()
        return RawRun(tuple(map(tuple, outputs)), prefilled_s - begin_s, decoded_s - prefilled_s)

    def _prefill(self, seat: int, prompt: Sequence[int]) -> int:
        """Compute a prompt in chunks; returns the first token after it."""
        batch = self._batch
        for begin in range(0, len(prompt), self._chunk_tokens):
            chunk = prompt[begin : begin + self._chunk_tokens]
            batch.n_tokens = len(chunk)
            for row, token in enumerate(chunk):
                batch.token[row], batch.pos[row] = token, begin + row
                batch.n_seq_id[row], batch.seq_id[row][0] = 1, seat
                batch.logits[row] = begin + row == len(prompt) - 1
            self._decode()
        return self._argmax(-1)

    def _decode(self) -> None:
        if code := lib.llama_decode(self._context, self._batch):
            raise KernelFault(f"llama_decode answers {code}")

    def _argmax(self, row: int) -> int:
        logits = lib.llama_get_logits_ith(self._context, row)
        address = ctypes.cast(logits, ctypes.c_void_p).value or 0
        values = np.ctypeslib.as_array((ctypes.c_float * self._vocabulary).from_address(address))
        values[self._excluded] = -np.inf
        return int(values.argmax())


def _silent(_level: str, _line: str) -> None:
    """Nobody reads the library's chatter here."""


def _params(seats: int, window_tokens: int, threads: int, chunk_tokens: int, on_gpu: bool) -> Any:
    params = lib.llama_context_default_params()
    params.n_ctx = seats * -(-window_tokens // WINDOW_STEP_TOKENS) * WINDOW_STEP_TOKENS
    params.n_batch = params.n_ubatch = chunk_tokens
    params.n_seq_max = params.n_outputs_max = seats
    params.n_threads = params.n_threads_batch = threads
    params.flash_attn_type, params.kv_unified = int(on_gpu), False
    return params
