"""Whether a row's logits depend on how many rows are computed with it.

Owner: none, a pure function. Measured, not promised by llama.cpp: on the CPU, with a stream of KV per
seat and no flash attention, products with Q8_0 and Q4_0 weights give equal bits for any batch, any
chunks of two tokens or more, and any number of threads. F16, F32 and K-quants do not.
Not here: what is done where they do (planner.py).
"""

from typing import Final

from drivers.llamacpp.header import GGML_TYPES, Header

_INVARIANT: Final = frozenset({"Q8_0", "Q4_0"})
_ROW_STEP: Final = 32  # rows of another length are computed by other kernels


def is_invariant(header: Header) -> bool:
    """Whether every matrix product of a model is known to be independent of its batch."""
    is_tied = not any(tensor.name == "output.weight" for tensor in header.tensors)
    return all(
        GGML_TYPES[tensor.type][0] in _INVARIANT and len(tensor.dims) == 2 and tensor.dims[0] % _ROW_STEP == 0
        for tensor in header.tensors
        if len(tensor.dims) > 1 and (is_tied or tensor.name != "token_embd.weight")  # else only looked up
    )
