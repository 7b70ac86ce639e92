"""One llama.cpp context: a number of seats of one size over shared weights.

Each seat has its own stream of the KV cache, and on a CPU flash attention is off: faster there with many
sequences, and with Q8_0 or Q4_0 weights a sequence's logits do not depend on what runs beside it. In a
unified slab all seats have one pool of cells instead, and a cell may belong to several (family.py); there,
all attend over the cells of all. The KV cache is committed when the slab is made.

Owner: one engine, which runs on one thread; two threads in a context abort the process.
Not here: what a sequence is (sequence.py), who sits where (seating.py), what to compute next (engine.py).
"""

import ctypes
from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from drivers.commons import Commons
from drivers.llamacpp import native
from drivers.llamacpp.layout import Layout, chunk_tokens
from drivers.llamacpp.native import lib
from drivers.llamacpp.weights import Weights
from kernel.errors import AdmissionRefused, KernelFault, WorkerDied

ABORTED = 2
_STATE_HEAD_BYTES = 12

State = npt.NDArray[np.uint8]


class Seated(Protocol):
    """What the slab needs to know of a sequence: `tokens[:computed]` are in the KV cache of `seat`."""

    seat: int
    tokens: list[int]
    computed: int


class Slab:
    """Seats, the batch that feeds them, and the logits that come out."""

    def __init__(self, weights: Weights, layout: Layout, abort_flag: Any) -> None:
        self.seats = layout.seats
        self.unified = layout.unified
        self.commons = Commons()  # seats of a unified slab that hold the same cells
        self.capacity_tokens = chunk_tokens(layout.window_tokens, layout.seats, layout.on_gpu)
        self._weights = weights
        self._abort_flag = abort_flag  # referenced for as long as native code reads it
        self.context = lib.llama_init_from_model(weights.handle, self._params(layout))
        if not self.context:
            raise AdmissionRefused(
                f"llama.cpp cannot make a context of {layout.seats} x {layout.window_tokens} tokens",
                "ask for fewer sequences or a smaller context",
            )
        self.window_tokens = int(lib.llama_n_ctx_seq(self.context))
        self._memory = lib.llama_get_memory(self.context)
        self._make_batch()
        self._learn_state_form()
        self._logits = np.empty((0, 0), np.float32)
        self._logits_at = 0

    def _params(self, layout: Layout) -> Any:
        params = lib.llama_context_default_params()
        params.n_ctx = layout.window_tokens * (1 if layout.unified else layout.seats)
        params.n_batch = params.n_ubatch = self.capacity_tokens
        params.n_seq_max = params.n_outputs_max = layout.seats
        params.n_threads = params.n_threads_batch = layout.threads
        params.flash_attn_type, params.kv_unified = int(layout.on_gpu), layout.unified
        params.offload_kqv = params.op_offload = layout.on_gpu
        params.abort_callback = native.abort_callback
        params.abort_callback_data = ctypes.addressof(self._abort_flag)
        return params

    def _make_batch(self) -> None:
        """Arrays that the native batch points into, so that filling it is filling them."""
        size = self.capacity_tokens
        numbers: Any = ctypes.c_int32 * size  # ctypes takes lists in slice assignments; its stubs do not
        self._tokens, self._positions, self._seats = numbers(), numbers(), numbers()
        self._outputs: Any = (ctypes.c_int8 * size)()
        self._ones = numbers(*[1] * size)
        each, at = ctypes.POINTER(ctypes.c_int32), ctypes.addressof(self._seats)
        self._seat_at = (each * size)(*(ctypes.cast(at + 4 * row, each) for row in range(size)))
        self._batch = lib.llama_batch(
            n_tokens=0,
            token=self._tokens,
            pos=self._positions,
            n_seq_id=self._ones,
            seq_id=self._seat_at,
            logits=self._outputs,
        )

    def compute(self, plan: Sequence[tuple[Seated, int]]) -> list[int] | None:
        """One forward pass: for each (sequence, count), the next `count` of its tokens.

        Returns the batch rows that have logits: the last of each sequence that is now computed to its
        end. None if the pass was aborted; then `computed` tells how far each seat came.
        """
        tokens: list[int] = []
        positions: list[int] = []
        seats: list[int] = []
        wanted: list[int] = []
        for sequence, count in plan:
            begin = sequence.computed
            end = begin + count
            tokens += sequence.tokens[begin:end]
            positions += range(begin, end)
            seats += [sequence.seat] * count
            wanted += [0] * (count - 1)
            wanted.append(end == len(sequence.tokens))
        if not self._decode(tokens, positions, seats, wanted):
            return None
        return [row for row, is_wanted in enumerate(wanted) if is_wanted]

    def _decode(self, tokens: list[int], positions: list[int], seats: list[int], wanted: list[int]) -> bool:
        count = self._batch.n_tokens = len(tokens)
        self._tokens[:count] = tokens
        self._positions[:count] = positions
        self._seats[:count] = seats
        self._outputs[:count] = wanted
        answer = lib.llama_decode(self.context, self._batch)
        if answer == ABORTED:
            ctypes.memset(ctypes.addressof(self._abort_flag), 0, 1)
            return False
        if answer:
            raise KernelFault(f"llama.cpp could not compute a batch of {count} tokens (code {answer})")
        if self._weights.on_gpu:
            lib.llama_synchronize(self.context)  # gives up the interpreter lock; `get_logits` would not
        return True

    def logits(self) -> npt.NDArray[np.float32]:
        """Logits of the last pass, a row for each output in the order of the batch. Valid until the next."""
        at = native.get_logits(self.context)
        if at != self._logits_at:
            if not at:
                raise KernelFault("llama.cpp has no logits")
            shape = (self.seats, self._weights.vocabulary_tokens)
            values = (ctypes.c_float * (shape[0] * shape[1])).from_address(at)
            self._logits, self._logits_at = np.ctypeslib.as_array(values).reshape(shape), at
        return self._logits

    def computed(self, seat: int) -> int:
        """Tokens in the KV cache of a seat."""
        return int(native.pos_max(self._memory, seat)) + 1

    def cut(self, seat: int, keep_tokens: int) -> None:
        """Drop all but the first tokens of a seat. What others have of them stays theirs."""
        native.seq_rm(self._memory, seat, keep_tokens, -1)
        self.commons.cut(seat, keep_tokens)

    def share(self, source: int, target: int, tokens: int) -> None:
        """Have a seat of a unified slab hold the first tokens of another one, in the same cells."""
        self.cut(target, 0)
        native.seq_cp(self._memory, source, target, 0, tokens)
        self.commons.share(source, target, tokens)

    def clear(self) -> None:
        """Empty every seat of a slab that shares nothing."""
        lib.llama_memory_clear(self._memory, False)

    def read(self, seat: int) -> State:
        """The KV state of a seat; of a plain cache in a form that a slab of any number of seats takes."""
        state = self._native_state(seat)
        if not self.plain:
            return state
        before, after = (0, 0) if self.unified else (seat, self.seats - 1 - seat)
        return state[_STATE_HEAD_BYTES + 4 * before : state.size - 4 * after]

    def read_first(self, seat: int, tokens: int, computed: int) -> State:
        """The KV state of the first tokens of a seat. The native form cannot be cut, so the seat is."""
        whole = self.read(seat)
        self.cut(seat, tokens)
        first = self.read(seat)
        self.cut(seat, 0)
        if not self.write(seat, whole, computed):
            raise WorkerDied("llama.cpp did not take back the state of a sequence")
        return first

    def write(self, seat: int, state: State, tokens: int) -> bool:
        """Put a KV state of so many tokens into an empty seat. False if it is none; the seat stays empty."""
        if self.plain:
            rest = np.zeros(4 * (self._streams - 1), np.uint8)
            state = np.concatenate((self._state_head, state, rest))
        taken = lib.llama_state_seq_set_data(self.context, _pointer(state, ctypes.c_uint8), state.size, seat)
        if taken == state.size and self.computed(seat) == tokens:
            return True
        self.cut(seat, 0)
        return False

    def _native_state(self, seat: int) -> State:
        size = lib.llama_state_seq_get_size(self.context, seat)
        state = np.empty(size, np.uint8)
        if lib.llama_state_seq_get_data(self.context, _pointer(state, ctypes.c_uint8), size, seat) != size:
            raise KernelFault("llama.cpp did not give the state of a sequence")
        return state

    def _learn_state_form(self) -> None:
        """A native state is: magic, sequence, number of streams; then per stream a cell count and its cells.

        Only the sequence's own stream has cells, so the other counts (zeros) can be left out and be put
        back for another number of streams. Caches that are made of several parts have more to say of an
        empty seat, and are left as they are.
        """
        self._streams = 1 if self.unified else self.seats
        empty = self._native_state(0)
        self.plain = (
            empty.size == _STATE_HEAD_BYTES + 4 * self._streams and not empty[_STATE_HEAD_BYTES:].any()
        )
        self._state_head = empty[:_STATE_HEAD_BYTES]

    def free(self) -> None:
        if self.context:
            lib.llama_free(self.context)
            self.context = None


def _pointer(array: npt.NDArray[Any], kind: Any) -> Any:
    return array.ctypes.data_as(ctypes.POINTER(kind))
